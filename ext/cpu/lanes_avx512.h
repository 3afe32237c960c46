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
  static constexpr bool sums_of_16 = true;
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

  // One step of the tree for two sums at once: lane l of the result is a[l] + a[l ^ d] where bit d of l is clear, and
  // the same of b where it is set.
  template <int d>
  static EXL_INLINE __m512 fold(__m512 a, __m512 b) {
    constexpr __mmask16 high = d == 8 ? 0xff00 : d == 4 ? 0xf0f0 : d == 2 ? 0xcccc : 0xaaaa;
    const __m512 own = _mm512_mask_blend_ps(high, a, b);
    if constexpr (d == 8) return _mm512_add_ps(own, _mm512_shuffle_f32x4(a, b, 0x4e));
    if constexpr (d == 2) return _mm512_add_ps(own, _mm512_shuffle_ps(a, b, 0x4e));
    const __m512 other = _mm512_mask_blend_ps(high, b, a);
    if constexpr (d == 4) return _mm512_add_ps(own, _mm512_shuffle_f32x4(other, other, 0xb1));
    return _mm512_add_ps(own, _mm512_permute_ps(other, 0xb1));
  }
  // out[r * stride + c] (+)= the sum of the lanes of a[4 * r + c], by the tree of sums4. Half the work of four of them.
  static EXL_INLINE void sums4x4(const Part512* a, float* out, int64_t stride, bool add) {
    __m512 eight[8], four[4];
    EXL_UNROLL for (int i = 0; i < 8; ++i) eight[i] = fold<8>(a[i].v, a[i + 8].v);
    EXL_UNROLL for (int i = 0; i < 4; ++i) four[i] = fold<4>(eight[i], eight[i + 4]);
    const __m512 sums = fold<1>(fold<2>(four[0], four[2]), fold<2>(four[1], four[3]));
    const auto put = [&](float* to, __m128 row) { _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), row) : row); };
    put(out, _mm512_castps512_ps128(sums));
    put(out + stride, _mm512_extractf32x4_ps(sums, 1));
    put(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
    put(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
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
