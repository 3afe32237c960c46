// The codes of a quantized cache row by AVX-512. Interface: attention_kernel.h; layout: ../common/kv_rows.h.
#pragma once

#include "lanes_avx512.h"

#include <cstring>

#include "../common/kv_rows.h"

namespace exl {
namespace {

template <class T>
EXL_INLINE T read_bits(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// 16 codes of a plane of `width` bits; above them, in every lane, bits of their neighbours.
template <int width>
EXL_INLINE __m512i plane_512(const uint8_t* plane) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (width == 8) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
  } else if constexpr (width == 4) {
    const __m512i shift = _mm512_slli_epi32(_mm512_srli_epi32(lane, 1), 2);
    return _mm512_srlv_epi32(_mm512_set1_epi64(read_bits<int64_t>(plane)), shift);
  } else if constexpr (width == 2) {
    return _mm512_srlv_epi32(_mm512_set1_epi32(read_bits<int32_t>(plane)), _mm512_slli_epi32(lane, 1));
  } else {
    return _mm512_srlv_epi32(_mm512_set1_epi32(read_bits<uint16_t>(plane)), lane);
  }
}

template <int width>
EXL_INLINE __m512i append_plane(__m512i codes, const uint8_t* plane) {
  const __m512i low = _mm512_and_si512(plane_512<width>(plane), _mm512_set1_epi32((1 << width) - 1));
  return _mm512_or_si512(_mm512_slli_epi32(codes, width), low);
}

template <int bits>
struct CodesAvx512 {
  __m512 scale, zero;  // of a group; up to 4 bits the value of every code, so that one permutation looks 16 of them up

  explicit EXL_INLINE CodesAvx512(const uint8_t* half) {
    const __m512 all = _mm512_cvtph_ps(_mm256_set1_epi16(read_bits<int16_t>(half)));
    if constexpr (bits <= 4) {
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << bits) - 1)));
      scale = _mm512_mul_ps(_mm512_add_ps(code, _mm512_set1_ps(0.5f - kv_middle(bits))), all);
      zero = all;
    } else {
      scale = all;
      zero = _mm512_mul_ps(all, _mm512_set1_ps(0.5f - kv_middle(bits)));
    }
  }

  // The values of a step; there is only part 0.
  EXL_INLINE Part512 part(const uint8_t* step, int) const {
    if constexpr (bits == 2 || bits == 4) {  // the lookup takes the low 4 bits of a lane
      return {_mm512_permutexvar_ps(plane_512<bits>(step), scale)};
    } else if constexpr (bits == 3) {
      return {_mm512_permutexvar_ps(append_plane<1>(plane_512<2>(step), step + 4), scale)};
    } else {
      __m512i codes = plane_512<bits == 8 ? 8 : 4>(step);
      if constexpr (bits < 8) codes = _mm512_and_si512(codes, _mm512_set1_epi32(15));
      if constexpr (bits == 6 || bits == 7) codes = append_plane<2>(codes, step + 8);
      if constexpr (bits == 5 || bits == 7) codes = append_plane<1>(codes, step + (bits == 7 ? 12 : 8));
      return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, zero)};
    }
  }
};

}  // namespace
}  // namespace exl
