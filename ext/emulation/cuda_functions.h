// Device functions of CUDA that the kernels use beyond warps and barriers: caches, atomics, bits, float intrinsics.
// The fast intrinsics (__expf and the like) are exact here; kernels are judged by tolerances that cover both.
#pragma once

#include <type_traits>

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldca(const T* p) { return *p; }
template <class T, class U>
void __stcg(T* p, U value) { *p = value; }
template <class T, class U>
void __stcs(T* p, U value) { *p = value; }

// Atomics are relaxed, as on the device. On floating point the order of arrival would decide the rounding: refused.
#define EXL_EMU_ATOMIC(name, expression)                                                  \
  template <class T, class U>                                                             \
  T name(T* p, U operand) {                                                               \
    static_assert(std::is_integral_v<T>, #name ": integers only, results must not depend on the order of arrival"); \
    exl_emu::note_atomic(p);                                                              \
    const T value = static_cast<T>(operand), old = __atomic_load_n(p, __ATOMIC_RELAXED);  \
    __atomic_store_n(p, static_cast<T>(expression), __ATOMIC_RELAXED);                    \
    return old;                                                                           \
  }
EXL_EMU_ATOMIC(atomicAdd, old + value)
EXL_EMU_ATOMIC(atomicSub, old - value)
EXL_EMU_ATOMIC(atomicMax, old > value ? old : value)
EXL_EMU_ATOMIC(atomicMin, old < value ? old : value)
EXL_EMU_ATOMIC(atomicAnd, old & value)
EXL_EMU_ATOMIC(atomicOr, old | value)
EXL_EMU_ATOMIC(atomicXor, old ^ value)
EXL_EMU_ATOMIC(atomicExch, value)
EXL_EMU_ATOMIC(atomicInc, old >= value ? T(0) : old + 1)
#undef EXL_EMU_ATOMIC
template <class T>
T atomicCAS(T* p, T expected, T wanted) {
  static_assert(std::is_integral_v<T>, "atomicCAS: integers only");
  exl_emu::note_atomic(p);
  __atomic_compare_exchange_n(p, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
  return unsigned(((uint64_t(hi) << 32) | lo) >> (s & 31));
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
  return unsigned(((uint64_t(hi) << 32) | lo) << (s & 31) >> 32);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return c;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i & 15u;
    unsigned byte = unsigned(bytes >> 8 * (which & 7u)) & 255u;
    if (which & 8u) byte = byte & 128u ? 255u : 0u;
    r |= byte << 8 * i;
  }
  return r;
}

inline unsigned __float_as_uint(float f) { return exl::float_to_bits(f); }
inline float __uint_as_float(unsigned u) { return exl::bits_to_float(u); }
inline int __float_as_int(float f) { return int(exl::float_to_bits(f)); }
inline float __int_as_float(int i) { return exl::bits_to_float(unsigned(i)); }
inline long long __double_as_longlong(double d) {
  long long r;
  std::memcpy(&r, &d, 8);
  return r;
}
inline double __longlong_as_double(long long i) {
  double r;
  std::memcpy(&r, &i, 8);
  return r;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float f) { return int(std::nearbyint(f)); }
inline int __float2int_rz(float f) { return int(f); }
inline int __float2int_rd(float f) { return int(std::floor(f)); }
inline int __float2int_ru(float f) { return int(std::ceil(f)); }
inline unsigned __float2uint_rn(float f) { return unsigned(std::nearbyint(f)); }
inline float __int2float_rn(int i) { return float(i); }
inline float __uint2float_rn(unsigned i) { return float(i); }

template <class T>
T max(T a, T b) { return a > b ? a : b; }
template <class T>
T min(T a, T b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int b) { return a > b ? a : b; }
inline int64_t max(int a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int b) { return a < b ? a : b; }
inline int64_t min(int a, int64_t b) { return a < b ? a : b; }
