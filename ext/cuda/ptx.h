// Every PTX instruction that the kernels use, each with the code that stands for it in the emulation. One signature,
// two bodies. Fragment layouts are those of the PTX ISA; tests/cuda/test_ptx.py compares both sides on a GPU.
#pragma once

#include "exl_cuda.h"

namespace ptx {

#if defined(__CUDACC__)
#define PTX_FN __device__ __forceinline__
PTX_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#else
#define PTX_FN inline
#endif

// ---- matrix multiply: d = a * b + c, one warp, fp32 accumulators; d and c may be the same array -------------------
// a 16x16 row-major: a[0] rows g, k 2t..; a[1] rows g+8; a[2] rows g, k 2t+8..; a[3] rows g+8, k 2t+8..
// b 16x8 by columns: b[0] k 2t.., column g; b[1] k 2t+8..
// c, d 16x8: [0] row g, column 2t; [1] row g, column 2t+1; [2], [3] the same of row g+8
// with g = lane / 4, t = lane % 4; two elements to a register, the lower k in the lower half.

PTX_FN void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4] EXL_HERE_) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  exl_emu::MmaArg arg{d, a, b, c};
  exl_emu::warp_op(exl_emu::Kind::mma, ~0u, &arg, exl_emu::mma_f16_exec, f_, l_);
#endif
}

PTX_FN void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const float (&c)[4] EXL_HERE_) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  exl_emu::MmaArg arg{d, a, b, c};
  exl_emu::warp_op(exl_emu::Kind::mma, ~0u, &arg, exl_emu::mma_bf16_exec, f_, l_);
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements out of shared memory -----------------------------------------------
// Lane i gives the address of row i % 8 of matrix i / 8 (x2: lanes 0..15; all lanes must give a valid address).
// Lane (g, t) gets of matrix j: r[j] = elements 2t, 2t+1 of row g; transposed: rows 2t, 2t+1 of column g.

#if defined(__CUDACC__)
#define PTX_LDMATRIX_4(trans)                                                                                   \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];"                         \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory")
#define PTX_LDMATRIX_2(trans)                                                           \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0,%1}, [%2];"       \
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory")
#else
#define PTX_LDMATRIX_4(trans) exl_emu::ldmatrix(r, row, 4, trans[0] == '.', f_, l_)
#define PTX_LDMATRIX_2(trans) exl_emu::ldmatrix(r, row, 2, trans[0] == '.', f_, l_)
#endif
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row EXL_HERE_) { PTX_LDMATRIX_4(""); }
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row EXL_HERE_) { PTX_LDMATRIX_4(".trans"); }
PTX_FN void ldmatrix_x2(uint32_t (&r)[2], const void* row EXL_HERE_) { PTX_LDMATRIX_2(""); }
PTX_FN void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row EXL_HERE_) { PTX_LDMATRIX_2(".trans"); }
#undef PTX_LDMATRIX_4
#undef PTX_LDMATRIX_2

// ---- cp.async: global to shared memory behind the back of the thread ----------------------------------------------
// Addresses aligned to the size. _zfill copies the first `src_bytes` bytes and fills the rest with zeros; with
// src_bytes = 0 the source is not read. A copy is visible to its own thread after commit and wait<N> (all but the N
// newest groups are done), to others after a barrier on top.

#if defined(__CUDACC__)
#define PTX_CP_ASYNC(cache, size, src_size)                                                                     \
  asm volatile("cp.async." cache ".shared.global [%0], [%1], " size ", %2;" ::"r"(shared_address(dst)), "l"(src), \
               "r"(src_size)                                                                                    \
               : "memory")
#else
#define PTX_CP_ASYNC(cache, size, src_size) \
  exl_emu::cp_async(dst, src, (size)[0] == '1' ? 16 : (size)[0] - '0', src_size, f_, l_)
#endif
PTX_FN void cp_async4(void* dst, const void* src EXL_HERE_) { PTX_CP_ASYNC("ca", "4", 4); }
PTX_FN void cp_async8(void* dst, const void* src EXL_HERE_) { PTX_CP_ASYNC("ca", "8", 8); }
PTX_FN void cp_async16(void* dst, const void* src EXL_HERE_) { PTX_CP_ASYNC("cg", "16", 16); }
PTX_FN void cp_async4_zfill(void* dst, const void* src, int src_bytes EXL_HERE_) { PTX_CP_ASYNC("ca", "4", src_bytes); }
PTX_FN void cp_async8_zfill(void* dst, const void* src, int src_bytes EXL_HERE_) { PTX_CP_ASYNC("ca", "8", src_bytes); }
PTX_FN void cp_async16_zfill(void* dst, const void* src, int src_bytes EXL_HERE_) {
  PTX_CP_ASYNC("cg", "16", src_bytes);
}
#undef PTX_CP_ASYNC

// A cache policy for data that is read once: the first to be thrown out of L2. Take it once per thread.
PTX_FN uint64_t policy_evict_first() {
#if defined(__CUDACC__)
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#else
  return 0;
#endif
}

PTX_FN void cp_async16_hint(void* dst, const void* src, uint64_t policy EXL_HERE_) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "l"(policy)
               : "memory");
#else
  (void)policy;
  exl_emu::cp_async(dst, src, 16, 16, f_, l_);
#endif
}

PTX_FN void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  exl_emu::cp_commit();
#endif
}

template <int N>
PTX_FN void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  exl_emu::cp_wait(N);
#endif
}

// ---- loads and prefetches -------------------------------------------------------------------------------------------
// Read-only data that is used once: past L1 (no_allocate), in one transaction per thread. Aligned to its size. The
// memory must not be written while the kernel runs.

PTX_FN uint4 load16_once(const void* p) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}

PTX_FN uint2 load8_once(const void* p) {
#if defined(__CUDACC__)
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
#else
  return *static_cast<const uint2*>(p);
#endif
}

PTX_FN uint32_t load4_once(const void* p) {
#if defined(__CUDACC__)
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
#else
  return *static_cast<const uint32_t*>(p);
#endif
}

PTX_FN uint4 load16_hint(const void* p, uint64_t policy) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
#else
  (void)policy;
  return *static_cast<const uint4*>(p);
#endif
}

// A hint; the address may be anything.
PTX_FN void prefetch_l2(const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// ---- bits -----------------------------------------------------------------------------------------------------------

// Any function of three bits: LUT = f(0xF0, 0xCC, 0xAA). (a & b) | c is 0xEA.
template <uint32_t LUT>
PTX_FN uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(LUT < 256, "lop3 takes a table of 8 bits");
#if defined(__CUDACC__)
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return r;
#else
  uint32_t r = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    if (LUT >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return r;
#endif
}

// Byte i of the result is byte (selector nibble i) of the eight bytes b:a; with a nibble's top bit set, its sign.
PTX_FN uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
#else
  return __byte_perm(a, b, selector);
#endif
}

// 2^x to about 2 units in the last place; results below 2^-126 are flushed to zero.
PTX_FN float exp2_approx(float x) {
#if defined(__CUDACC__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  const float r = std::exp2(x);
  return std::fabs(r) < 1.17549435e-38f ? 0.0f : r;
#endif
}

// ---- programmatic dependent launch: nothing below compute capability 9.0 and without EXL_LAUNCH_PDL -----------------

// All writes of the kernel before this one are visible afterwards.
PTX_FN void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be started once every block has come here; only one launched by EXL_LAUNCH_PDL is, and it waits
// for the whole of this one in grid_wait.
PTX_FN void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Transposes an 8x8 matrix of 16-bit elements that lies in the lanes of a warp: lane (g, t) gives elements 2t, 2t+1 of
// row g and gets element g of rows 2t and 2t+1.
PTX_FN uint32_t movmatrix_trans(uint32_t a EXL_HERE_) {
#if defined(__CUDACC__)
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
#else
  const int g = exl_emu::cur->lane / 4, t = exl_emu::cur->lane % 4;
  const uint32_t low = __shfl_sync(~0u, a, 8 * t + g / 2, 32, f_, l_);
  const uint32_t high = __shfl_sync(~0u, a, 8 * t + 4 + g / 2, 32, f_, l_);
  return (low >> 16 * (g & 1) & 0xffffu) | high >> 16 * (g & 1) << 16;
#endif
}

}  // namespace ptx
