// One AVX2 register of 8 float32 lanes. Interface: lanes.h.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "lanes.h"

namespace exl {
namespace {

struct Part256 {
  static constexpr int width = 8;
  static constexpr bool sums_of_16 = false;
  __m256 v;

  static EXL_INLINE Part256 all(float value) { return {_mm256_set1_ps(value)}; }
  static EXL_INLINE Part256 load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static EXL_INLINE Part256 load(const Half* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static EXL_INLINE Part256 load(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  template <class T>
  static EXL_INLINE Part256 load_part(const T* from, int count) {
    T whole[width] = {};
    std::memcpy(whole, from, sizeof(T) * size_t(count));
    return load(whole);
  }
  EXL_INLINE void store(float* to) const { _mm256_storeu_ps(to, v); }

  static EXL_INLINE __m128 quarter(const Part256* a) {
    const __m256 half = _mm256_add_ps(a[0].v, a[1].v);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  static EXL_INLINE void sums4(const Part256* a, const Part256* b, const Part256* c, const Part256* d, float* sums) {
    const __m128 qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
};

EXL_INLINE Part256 operator+(Part256 a, Part256 b) { return {_mm256_add_ps(a.v, b.v)}; }
EXL_INLINE Part256 operator-(Part256 a, Part256 b) { return {_mm256_sub_ps(a.v, b.v)}; }
EXL_INLINE Part256 operator*(Part256 a, Part256 b) { return {_mm256_mul_ps(a.v, b.v)}; }
EXL_INLINE Part256 operator/(Part256 a, Part256 b) { return {_mm256_div_ps(a.v, b.v)}; }
EXL_INLINE Part256 fma(Part256 a, Part256 b, Part256 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
EXL_INLINE Part256 maximum(Part256 a, Part256 b) { return {_mm256_max_ps(a.v, b.v)}; }
EXL_INLINE Part256 round_half(Part256 a) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
// a * 2^n, n being the integer in the low bits of t's representation; the result must be a normal number.
EXL_INLINE Part256 times_power(Part256 a, Part256 t) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(t.v), 23)))};
}
// x < limit ? yes : no, so `no` where x is NaN.
EXL_INLINE Part256 below(Part256 x, Part256 limit, Part256 yes, Part256 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ))};
}

}  // namespace
}  // namespace exl
