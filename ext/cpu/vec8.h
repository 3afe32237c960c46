// Eight float32 lanes in plain C++ (the compilers' vector extension), for the small row kernels.
//
// The same source is compiled for the baseline and for AVX2, without contraction and in one order of operations, so
// every instruction set gives the same bits. Loads and stores take float32, float16 and bfloat16. Elements past the end
// of a row are handled by `load(p, count)`, which fills with zeros, and `store(v, p, count)`.
// Test: tests/ext/test_half.py, tests/ops/test_native_small.py
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/half.h"

// Left to itself the compiler calls the larger of these, passing vectors through memory: ten times slower.
#define EXL_INLINE inline __attribute__((always_inline))

namespace exl {
namespace {

typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef float F4 __attribute__((vector_size(16)));
typedef double D4 __attribute__((vector_size(32)));

constexpr int64_t kLanes = 8;

EXL_INLINE F8 splat(float value) { return F8{value, value, value, value, value, value, value, value}; }
EXL_INLINE U8 splat_bits(uint32_t value) { return U8{value, value, value, value, value, value, value, value}; }

// Four lanes of eight, as double. (An eight-lane double vector would be wider than AVX2 and live in memory.)
EXL_INLINE D4 widen(F8 v, int half) {
#if defined(__AVX__)
  // GCC 12 converts in pairs and makes every pair wait for the one before.
  const __m256 all = __m256(v);
  return D4(_mm256_cvtps_pd(half == 0 ? _mm256_castps256_ps128(all) : _mm256_extractf128_ps(all, 1)));
#else
  F4 four;
  std::memcpy(&four, reinterpret_cast<const char*>(&v) + 16 * half, sizeof four);
  return __builtin_convertvector(four, D4);
#endif
}

EXL_INLINE F8 select(I8 mask, F8 yes, F8 no) { return F8((U8(mask) & U8(yes)) | (~U8(mask) & U8(no))); }

// x, or `limit` where that is larger (smaller); NaN stays NaN.
EXL_INLINE F8 at_least(F8 limit, F8 x) {
#if defined(__AVX__)
  return F8(_mm256_max_ps(__m256(limit), __m256(x)));
#else
  return select(x < limit, limit, x);
#endif
}
EXL_INLINE F8 at_most(F8 limit, F8 x) {
#if defined(__AVX__)
  return F8(_mm256_min_ps(__m256(limit), __m256(x)));
#else
  return select(x > limit, limit, x);
#endif
}

EXL_INLINE F8 load(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

EXL_INLINE F8 load(const Half* p) {
#if defined(__F16C__)
  return F8(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  F8 v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

EXL_INLINE F8 load(const BFloat16* p) {
  H8 h;
  std::memcpy(&h, p, sizeof h);
  return F8(__builtin_convertvector(h, U8) << 16);
}

EXL_INLINE void store(F8 v, float* p) { std::memcpy(p, &v, sizeof v); }

EXL_INLINE void store(F8 v, Half* p) {
#if defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

EXL_INLINE void store(F8 v, BFloat16* p) {
  const U8 bits = U8(v);
  const U8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U8 quiet_nan = ((bits >> 16) & 0x8000u) | 0x7fc0u;
  const I8 is_nan = v != v;
  const H8 h = __builtin_convertvector((U8(is_nan) & quiet_nan) | (~U8(is_nan) & rounded), H8);
  std::memcpy(p, &h, sizeof h);
}

template <class T>
EXL_INLINE F8 load(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
EXL_INLINE void store(F8 v, T* p, int64_t count) {
  if (count >= kLanes) return store(v, p);
  T padded[kLanes];
  store(v, padded);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// Calls body(i, count) for every group of eight elements, then once for the rest. The full groups get a constant, so
// that the choice inside `load` and `store` disappears from the loop.
template <class Body>
EXL_INLINE void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, count - i);
}

// e^x, relative error below 1.5e-7 (about 1 ulp); 0 below -104, infinity above 88.8, NaN stays NaN.
// x = n ln2 + r with |r| <= ln2/2; e^r by a polynomial fitted to that interval (its own error 8e-10); times 2^n in two
// steps, so that neither factor leaves the range when the result is subnormal or just below the largest float.
EXL_INLINE F8 exp8(F8 x) {
  x = at_least(splat(-104.0f), x);
  x = at_most(splat(89.0f), x);
  const F8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const F8 shifted = x * 1.44269504f + magic;
  const F8 n = shifted - magic;
  F8 r = x - n * 0.693359375f;  // the high part of ln2 has so few bits that the product is exact
  r = r - n * -2.12194440e-4f;
  F8 p = splat(1.98992988e-4f);
  p = p * r + 1.39336614e-3f;
  p = p * r + 8.33329838e-3f;
  p = p * r + 4.16664630e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r + 1.0f;
  const U8 exponent = U8(shifted) - U8(magic);       // n, two's complement
  const U8 half = U8(I8(exponent) >> 1);             // n / 2, rounded down
  const F8 first = F8((half + 127u) << 23), second = F8((exponent - half + 127u) << 23);
  return p * first * second;
}

// x / (1 + e^-x). At -infinity the exact limit 0 is -inf/inf; torch gives NaN there as well.
EXL_INLINE F8 silu8(F8 x) { return x / (1.0f + exp8(-x)); }

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written as x * sigmoid of twice the argument: no cancellation at
// the negative end.
EXL_INLINE F8 gelu_tanh8(F8 x) {
  const F8 twice = 1.59576912f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp8(-twice));
}

// x * Phi(x), Phi the normal distribution function. For a = |x|, Phi(-a) = exp(-a^2/2) * R(1 / (1 + 0.26 a)) with R a
// polynomial fitted for least relative error on 0 <= a <= 14 (5.5e-9); Phi(a) = 1 - Phi(-a).
EXL_INLINE F8 gelu8(F8 x) {
  const F8 a = select(x < splat(0.0f), -x, x);
  const F8 t = 1.0f / (1.0f + 0.26f * a);
  F8 p = splat(3.39255482e-2f);
  p = p * t - 1.70515254e-1f;
  p = p * t + 2.90973753e-1f;
  p = p * t - 2.00799540e-1f;
  p = p * t + 2.00107366e-1f;
  p = p * t + 3.12133562e-2f;
  p = p * t + 1.09479465e-1f;
  p = p * t + 1.01715922e-1f;
  p = p * t + 1.03906550e-1f;
  p = p * t - 7.16311206e-6f;
  const F8 below = exp8(-0.5f * a * a) * p;
  return x * select(x < splat(0.0f), below, 1.0f - below);
}

EXL_INLINE F8 relu8(F8 x) { return select(x < splat(0.0f), splat(0.0f), x); }  // NaN stays NaN

}  // namespace
}  // namespace exl
