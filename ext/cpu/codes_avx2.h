// The codes of a quantized cache row by AVX2. Interface: attention_kernel.h; layout: ../common/kv_rows.h.
#pragma once

#include <cstring>

#include "../common/kv_rows.h"
#include "lanes_avx2.h"

namespace exl {
namespace {

template <class T>
EXL_INLINE T read_bits(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Codes 8 * half to 8 * half + 7 of a plane of `width` bits.
template <int width>
EXL_INLINE __m256i plane_256(const uint8_t* plane, int half) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (width == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane + 8 * half)));
  } else if constexpr (width == 4) {
    const __m256i shift = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12), _mm256_set1_epi32(16 * half));
    const __m256i both = _mm256_set1_epi64x(read_bits<int64_t>(plane));
    return _mm256_and_si256(_mm256_srlv_epi32(both, shift), _mm256_set1_epi32(15));
  } else {
    const int word = width == 2 ? read_bits<int32_t>(plane) : read_bits<uint16_t>(plane);
    const __m256i first = _mm256_set1_epi32(8 * width * half);
    const __m256i shift = _mm256_add_epi32(width == 2 ? _mm256_slli_epi32(lane, 1) : lane, first);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shift), _mm256_set1_epi32((1 << width) - 1));
  }
}

template <int bits>
struct CodesAvx2 {
  __m256 scale, zero;  // of a group

  explicit EXL_INLINE CodesAvx2(const uint8_t* half)
      : scale(_mm256_cvtph_ps(_mm_set1_epi16(read_bits<int16_t>(half)))),
        zero(_mm256_mul_ps(scale, _mm256_set1_ps(0.5f - kv_middle(bits)))) {}

  // Values 8 * half to 8 * half + 7 of a step.
  EXL_INLINE Part256 part(const uint8_t* step, int half) const {
    __m256i codes = _mm256_setzero_si256();
    if constexpr ((bits & 8) != 0) codes = plane_256<8>(step, half);
    if constexpr ((bits & 4) != 0) codes = plane_256<4>(step, half), step += 8;
    if constexpr ((bits & 2) != 0) {
      codes = _mm256_or_si256(_mm256_slli_epi32(codes, 2), plane_256<2>(step, half));
      step += 4;
    }
    if constexpr ((bits & 1) != 0) codes = _mm256_or_si256(_mm256_slli_epi32(codes, 1), plane_256<1>(step, half));
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale, zero)};
  }
};

}  // namespace
}  // namespace exl
