// Runs CUDA kernels on the CPU, for tests: one fiber per CUDA thread, the blocks of a grid one after another.
// ../cuda/exl_cuda.h includes it when the compiler is not nvcc; the runtime is cuda_host.cpp and cuda_warp.cpp.
//
// What it finds: threads that miss a barrier or meet at different ones, lanes that diverge in a warp operation, copies
// of cp.async that nobody waits for or that are read too early, results that depend on the order of threads or blocks
// (compare them bitwise over `Order`s); under AddressSanitizer every access outside shared or global memory; under
// ThreadSanitizer every missing __syncthreads, __syncwarp and fence. What it cannot tell: speed, bank conflicts,
// occupancy, the rounding inside tensor cores, and whether our reading of a fragment layout is the hardware's.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "../cuda/stream.h"
#include "control.h"
#include "cuda_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
// EXL_SHARED and EXL_DYN_SMEM give poisoned arrays whose bounds are checked; a raw __shared__ would escape both.
#define __shared__ static_assert(false, "use EXL_SHARED(T, name, [N]) or EXL_DYN_SMEM(T, name)");

namespace exl_emu {

struct Config {
  Order order = Order::forward;
  uint64_t seed = 0;               // of Order::random
  bool strict_exit = true;         // a thread that has exited may not leave others at a barrier; stricter than hardware
  bool strict_cp_async = true;     // copies still pending when their thread exits are an error
  size_t smem_limit = 101376;      // bytes: 99 KiB, what compute capability 8.6, 8.9 and 12.0 allow a block
  size_t stack_bytes = 64 * 1024;  // per fiber
  unsigned race_sets = 16;         // ThreadSanitizer: blocks with identities of their own (it allows 8000 threads)
};
Config& config();

struct Stats {
  uint64_t launches, blocks, threads, switches, warp_ops;
};
Stats& stats();

// What a kernel did wrong, with block, thread and line.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Ctx {
  uint3 tid, bid;
  dim3 bdim, gdim;
  int lane, warp, linear;
};
extern Ctx* cur;  // the CUDA thread that runs now

using Thunk = void (*)(void*);
void launch_raw(const char* name, dim3 grid, dim3 block, size_t smem, Thunk fn, void* arg);

// Arguments are converted once, on the caller's stack, and passed by value as on the device.
template <class... P, class... A>
void launch(const char* name, dim3 grid, dim3 block, size_t smem, cudaStream_t, void (*kernel)(P...), A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, std::tuple<P...>(static_cast<P>(args)...)};
  launch_raw(
      name, grid, block, smem,
      [](void* p) {
        auto* c = static_cast<Call*>(p);
        std::apply(c->kernel, c->args);
      },
      &call);
}

[[noreturn]] void fail(const char* file, int line, const std::string& message);
void* shared_slot(const void* key, size_t bytes, size_t align, const char* file, int line);
void* dyn_smem();
int sync_block(bool predicate, const char* file, int line);  // returns how many threads brought a true predicate
void fence();
void note_atomic(const void* address);
void cp_async(void* dst, const void* src, int bytes, int src_bytes, const char* file, int line);
void cp_commit();
void cp_wait(int newest_left);

// A meeting of the lanes in `mask`: the last to come runs `exec` on the arguments of all (null for absent lanes).
enum class Kind : int { sync, shuffle, vote, reduce, mma, ldmatrix };
using WarpFn = void (*)(void** args, unsigned mask);
void warp_op(Kind kind, unsigned mask, void* arg, WarpFn exec, const char* file, int line);

struct ShuffleArg {
  uint64_t in, out;
  int source, width, mode;  // 0 index, 1 up, 2 down, 3 xor
};
struct VoteArg {
  int predicate;
  unsigned ballot;
};
struct ReduceArg {
  int64_t value;
  int mode;  // 0 add, 1 min, 2 max
};
struct MmaArg {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};
struct LdmatrixArg {
  uint32_t* r;
  const void* row;
  int count;
  bool trans;
};
void shuffle_exec(void** args, unsigned mask);
void vote_exec(void** args, unsigned mask);
void reduce_exec(void** args, unsigned mask);
void mma_f16_exec(void** args, unsigned mask);
void mma_bf16_exec(void** args, unsigned mask);
void ldmatrix_exec(void** args, unsigned mask);

inline void ldmatrix(uint32_t* r, const void* row, int count, bool trans, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(file, line, "ldmatrix: row address not aligned to 16 bytes");
  // Read here too, in instrumented code: the sanitizers do not see what the runtime reads.
  const auto* words = static_cast<const volatile uint32_t*>(row);
  if (cur->lane < 8 * count) (void)words[0], (void)words[1], (void)words[2], (void)words[3];
  LdmatrixArg arg{r, row, count, trans};
  warp_op(Kind::ldmatrix, ~0u, &arg, ldmatrix_exec, file, line);
}

template <class T>
T shuffle(unsigned mask, T value, int source, int width, int mode, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  ShuffleArg arg{0, 0, source, width, mode};
  std::memcpy(&arg.in, &value, sizeof(T));
  warp_op(Kind::shuffle, mask, &arg, shuffle_exec, file, line);
  std::memcpy(static_cast<void*>(&value), &arg.out, sizeof(T));
  return value;
}

}  // namespace exl_emu

#define threadIdx (::exl_emu::cur->tid)
#define blockIdx (::exl_emu::cur->bid)
#define blockDim (::exl_emu::cur->bdim)
#define gridDim (::exl_emu::cur->gdim)
static constexpr int warpSize = 32;

#define EXL_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::exl_emu::launch(#kernel, (grid), (block), (smem), (stream), kernel, __VA_ARGS__)
#define EXL_LAUNCH_PDL EXL_LAUNCH
#define EXL_SHARED(T, name, dims)                                             \
  static const char name##_key = 0;                                           \
  using name##_type = T dims;                                                 \
  auto& name = *static_cast<name##_type*>(                                    \
      ::exl_emu::shared_slot(&name##_key, sizeof(name##_type), alignof(name##_type), __FILE__, __LINE__))
#define EXL_DYN_SMEM(T, name) T* name = static_cast<T*>(::exl_emu::dyn_smem())

#define EXL_HERE const char *f_ = __builtin_FILE(), int l_ = __builtin_LINE()
#define EXL_HERE_ , EXL_HERE

inline void __syncthreads(EXL_HERE) { exl_emu::sync_block(false, f_, l_); }
inline int __syncthreads_count(int p EXL_HERE_) { return exl_emu::sync_block(p != 0, f_, l_); }
inline int __syncthreads_or(int p EXL_HERE_) { return exl_emu::sync_block(p != 0, f_, l_) != 0; }
inline int __syncthreads_and(int p EXL_HERE_) { return exl_emu::sync_block(p == 0, f_, l_) == 0; }
inline void __syncwarp(unsigned mask = ~0u EXL_HERE_) {
  exl_emu::warp_op(exl_emu::Kind::sync, mask, nullptr, nullptr, f_, l_);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32 EXL_HERE_) {
  return exl_emu::shuffle(mask, value, lane, width, 0, f_, l_);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32 EXL_HERE_) {
  return exl_emu::shuffle(mask, value, int(by), width, 1, f_, l_);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32 EXL_HERE_) {
  return exl_emu::shuffle(mask, value, int(by), width, 2, f_, l_);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32 EXL_HERE_) {
  return exl_emu::shuffle(mask, value, by, width, 3, f_, l_);
}
inline unsigned __ballot_sync(unsigned mask, int predicate EXL_HERE_) {
  exl_emu::VoteArg arg{predicate, 0};
  exl_emu::warp_op(exl_emu::Kind::vote, mask, &arg, exl_emu::vote_exec, f_, l_);
  return arg.ballot;
}
inline int __any_sync(unsigned mask, int predicate EXL_HERE_) { return __ballot_sync(mask, predicate, f_, l_) != 0; }
inline int __all_sync(unsigned mask, int predicate EXL_HERE_) { return __ballot_sync(mask, !predicate, f_, l_) == 0; }
// int and unsigned only, as on the device (compute capability 8.0 and above)
#define EXL_EMU_REDUCE(name, mode)                                                           \
  template <class T>                                                                         \
  T name(unsigned mask, T value EXL_HERE_) {                                                 \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, #name ": int or unsigned only");  \
    exl_emu::ReduceArg arg{int64_t(value), mode};                                            \
    exl_emu::warp_op(exl_emu::Kind::reduce, mask, &arg, exl_emu::reduce_exec, f_, l_);       \
    return T(arg.value);                                                                     \
  }
EXL_EMU_REDUCE(__reduce_add_sync, 0)
EXL_EMU_REDUCE(__reduce_min_sync, 1)
EXL_EMU_REDUCE(__reduce_max_sync, 2)
#undef EXL_EMU_REDUCE
inline void __threadfence() { exl_emu::fence(); }
inline void __threadfence_block() {}

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

#include "cuda_functions.h"
