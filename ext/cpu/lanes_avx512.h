// One AVX-512 register of 16 float32 lanes. Interface: lanes.h.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 headers trip over their "undefined" values
#endif

#include <immintrin.h>

#include "lanes.h"

namespace exl {
namespace {

struct Part512 {
  static constexpr int width = 16;
  __m512 v;

  static EXL_INLINE Part512 all(float value) { return {_mm512_set1_ps(value)}; }
  static EXL_INLINE Part512 load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static EXL_INLINE Part512 load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static EXL_INLINE Part512 load(const BFloat16* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static EXL_INLINE __mmask16 first(int count) { return __mmask16((1u << count) - 1u); }
  static EXL_INLINE Part512 load_part(const float* from, int count) {
    return {_mm512_maskz_loadu_ps(first(count), from)};
  }
  static EXL_INLINE Part512 load_part(const Half* from, int count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from))};
  }
  static EXL_INLINE Part512 load_part(const BFloat16* from, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), from));
  }
  EXL_INLINE void store(float* to) const { _mm512_storeu_ps(to, v); }

  static EXL_INLINE Part512 widen(__m256i bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))};
  }

  static EXL_INLINE __m128 quarter(const Part512& a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static EXL_INLINE void sums4(const Part512* a, const Part512* b, const Part512* c, const Part512* d, float* sums) {
    const __m128 qa = quarter(*a), qb = quarter(*b), qc = quarter(*c), qd = quarter(*d);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
};

EXL_INLINE Part512 operator+(Part512 a, Part512 b) { return {_mm512_add_ps(a.v, b.v)}; }
EXL_INLINE Part512 operator-(Part512 a, Part512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
EXL_INLINE Part512 operator*(Part512 a, Part512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
EXL_INLINE Part512 operator/(Part512 a, Part512 b) { return {_mm512_div_ps(a.v, b.v)}; }
EXL_INLINE Part512 fma(Part512 a, Part512 b, Part512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
EXL_INLINE Part512 maximum(Part512 a, Part512 b) { return {_mm512_max_ps(a.v, b.v)}; }
EXL_INLINE Part512 round_half(Part512 a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
// a * 2^n, n being the integer in the low bits of t's representation; the result must be a normal number.
EXL_INLINE Part512 times_power(Part512 a, Part512 t) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)))};
}
// x < limit ? yes : no, so `no` where x is NaN.
EXL_INLINE Part512 below(Part512 x, Part512 limit, Part512 yes, Part512 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_LT_OQ), no.v, yes.v)};
}

}  // namespace
}  // namespace exl
