// What the 32-byte instruction sets share: everything but the product of bytes. Included by linear_packed_avx2.cpp and
// linear_packed_avxvnni.cpp only. One row takes both halves of a tile at once, to load its input once for both; more
// rows one half after the other, for want of registers.
#pragma once

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in immintrin.h of GCC 12, wrongly (bug 105593)
#include <immintrin.h>

#include "linear_packed_kernel.h"

namespace exl {
namespace {

template <int parts>
struct Wide256 {
  struct V {
    __m256i part[parts];
  };
  struct F {
    __m256 part[parts];
  };

  template <class Out, class Op>
  static EXL_INLINE Out each(const Op& op) {
    Out out;
    EXL_UNROLL for (int i = 0; i < parts; ++i) out.part[i] = op(i);
    return out;
  }

  static EXL_INLINE V load(const uint8_t* p) {
    return each<V>([&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)); });
  }
  static EXL_INLINE V quad_of(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return spread(four);
  }
  template <int n>
  static EXL_INLINE V shift(V v) {
    if constexpr (n > 0) return each<V>([&](int i) { return _mm256_srli_epi16(v.part[i], n); });
    if constexpr (n < 0) return each<V>([&](int i) { return _mm256_slli_epi16(v.part[i], -n); });
    return v;
  }
  template <int m>
  static EXL_INLINE V mask(V v) {
    return each<V>([&](int i) { return _mm256_and_si256(v.part[i], _mm256_set1_epi8(m)); });
  }
  template <int m>
  static EXL_INLINE V merge(V a, V b) {
    b = mask<m>(b);
    return each<V>([&](int i) { return _mm256_or_si256(a.part[i], b.part[i]); });
  }

  static EXL_INLINE V spread(int32_t v) {
    return each<V>([&](int) { return _mm256_set1_epi32(v); });
  }
  static EXL_INLINE V plus(V a, V b) {
    return each<V>([&](int i) { return _mm256_add_epi32(a.part[i], b.part[i]); });
  }
  template <int n>
  static EXL_INLINE V left(V v) {
    return each<V>([&](int i) { return _mm256_slli_epi32(v.part[i], n); });
  }
  static EXL_INLINE V times(V a, V b) {
    return each<V>([&](int i) { return _mm256_mullo_epi32(a.part[i], b.part[i]); });
  }
  static EXL_INLINE V bytes(const uint8_t* p) {
    return each<V>([&](int i) {
      return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
    });
  }
  static EXL_INLINE F to_float(V v) {
    return each<F>([&](int i) { return _mm256_cvtepi32_ps(v.part[i]); });
  }
  static EXL_INLINE F all(const float* p) {
    return each<F>([&](int) { return _mm256_broadcast_ss(p); });
  }
  static EXL_INLINE F fma(F a, F b, F c) {
    return each<F>([&](int i) { return _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]); });
  }
  static EXL_INLINE F mul(F a, F b) {
    return each<F>([&](int i) { return _mm256_mul_ps(a.part[i], b.part[i]); });
  }
  static EXL_INLINE F load_floats(const float* p) {
    return each<F>([&](int i) { return _mm256_loadu_ps(p + 8 * i); });
  }
  static EXL_INLINE void store(float* p, F v) {
    EXL_UNROLL for (int i = 0; i < parts; ++i) _mm256_storeu_ps(p + 8 * i, v.part[i]);
  }
  static EXL_INLINE F halves(const uint8_t* p) {
    return each<F>([&](int i) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
    });
  }
  static EXL_INLINE F lookup(const float* table, const uint8_t* nibbles, int block) {
    int64_t all;
    const int half = block * parts;  // of 16 columns, in halves
    std::memcpy(&all, nibbles + half / 2 * 8, 8);
    const __m256i shifts = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12), wide = _mm256_set1_epi64x(all >> half % 2 * 16);
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    return each<F>([&](int i) {
      const __m256i index = _mm256_srlv_epi32(_mm256_srli_epi64(wide, 16 * i), shifts);
      const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 of the index chooses
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), top);
    });
  }
};

}  // namespace
}  // namespace exl
