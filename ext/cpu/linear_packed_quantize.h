// The input of the packed kernels in 8-bit integers, see linear_packed.h. Internal linkage, see isa.h.
#pragma once

#include <cstring>

#include "../common/half.h"
#include "lanes.h"
#include "linear_packed_isa.h"

namespace exl {
namespace {

// The bits of the largest |value[k]|, k < count, a multiple of kUnit: a NaN or infinity has the largest of all.
//
// quantize_units: main = round(value * inverse), ties to even, of `units` units; with `residual` each followed by
// rest = round((value * inverse - main) * 256), at most 127. Adds up both. The same result in any instruction set.
#if defined(__AVX512BW__)

EXL_INLINE uint32_t largest(const float* value, int count) {
  __m512i most = _mm512_setzero_si512();
  for (int k = 0; k < count; k += 16) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(value + k), _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epu32(most);
}

template <bool residual>
EXL_INLINE void quantize_units(const float* value, float inverse, int units, uint8_t* row, int32_t* sum,
                               int32_t* rest_sum) {
  const __m512 by = _mm512_set1_ps(inverse), finer = _mm512_set1_ps(256.0f);
  __m512i mains = _mm512_setzero_si512(), rests = _mm512_setzero_si512();
  for (int u = 0; u < 2 * units; ++u, value += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(value), by);
    const __m512i whole = _mm512_cvtps_epi32(scaled);
    uint8_t* to = residual ? row + u / 2 * 2 * kUnit + u % 2 * 16 : row + u * 16;
    mains = _mm512_add_epi32(mains, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
    if constexpr (!residual) continue;
    const __m512 more = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole)), finer);
    const __m512i rest = _mm512_min_epi32(_mm512_cvtps_epi32(more), _mm512_set1_epi32(127));
    rests = _mm512_add_epi32(rests, rest);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kUnit), _mm512_cvtepi32_epi8(rest));
  }
  *sum = _mm512_reduce_add_epi32(mains), *rest_sum = _mm512_reduce_add_epi32(rests);
}

#elif defined(__AVX2__)

EXL_INLINE __m128i fold(__m256i v, __m128i (*by)(__m128i, __m128i)) {
  __m128i four = by(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = by(four, _mm_shuffle_epi32(four, 0x4e));
  return by(four, _mm_shuffle_epi32(four, 0xb1));
}
EXL_INLINE __m128i most_of(__m128i a, __m128i b) { return _mm_max_epu32(a, b); }
EXL_INLINE __m128i total_of(__m128i a, __m128i b) { return _mm_add_epi32(a, b); }

EXL_INLINE uint32_t largest(const float* value, int count) {
  __m256i most = _mm256_setzero_si256();
  for (int k = 0; k < count; k += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + k));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  return uint32_t(_mm_cvtsi128_si32(fold(most, &most_of)));
}

// 32 integers of at most 127 in size, in order.
EXL_INLINE void store_bytes(const __m256i* v, uint8_t* to) {
  const __m256i ab = _mm256_packs_epi32(v[0], v[1]), cd = _mm256_packs_epi32(v[2], v[3]);
  const __m256i bytes = _mm256_packs_epi16(ab, cd), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
}

template <bool residual>
EXL_INLINE void quantize_units(const float* value, float inverse, int units, uint8_t* row, int32_t* sum,
                               int32_t* rest_sum) {
  const __m256 by = _mm256_set1_ps(inverse), finer = _mm256_set1_ps(256.0f);
  __m256i mains = _mm256_setzero_si256(), rests = _mm256_setzero_si256();
  for (int u = 0; u < units; ++u, value += kUnit, row += residual ? 2 * kUnit : kUnit) {
    __m256i whole[4], rest[4];
    EXL_UNROLL for (int i = 0; i < 4; ++i) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(value + 8 * i), by);
      whole[i] = _mm256_cvtps_epi32(scaled);
      mains = _mm256_add_epi32(mains, whole[i]);
      if constexpr (!residual) continue;
      const __m256 more = _mm256_mul_ps(_mm256_sub_ps(scaled, _mm256_cvtepi32_ps(whole[i])), finer);
      rest[i] = _mm256_min_epi32(_mm256_cvtps_epi32(more), _mm256_set1_epi32(127));
      rests = _mm256_add_epi32(rests, rest[i]);
    }
    store_bytes(whole, row);
    if constexpr (residual) store_bytes(rest, row + kUnit);
  }
  *sum = _mm_cvtsi128_si32(fold(mains, &total_of)), *rest_sum = _mm_cvtsi128_si32(fold(rests, &total_of));
}

#else

EXL_INLINE uint32_t largest(const float* value, int count) {
  uint32_t top = 0;
  for (int k = 0; k < count; ++k) {
    const uint32_t size = float_to_bits(value[k]) & 0x7fffffffu;
    top = size > top ? size : top;
  }
  return top;
}

template <bool residual>
EXL_INLINE void quantize_units(const float* value, float inverse, int units, uint8_t* row, int32_t* sum,
                               int32_t* rest_sum) {
  constexpr float kRound = 12582912.0f;  // adding and taking away 1.5 * 2^23 rounds to an integer, ties to even
  for (int u = 0; u < units; ++u, value += kUnit, row += residual ? 2 * kUnit : kUnit) {
    int8_t main[kUnit], rest[kUnit];
    for (int k = 0; k < kUnit; ++k) {
      const float scaled = value[k] * inverse, whole = (scaled + kRound) - kRound;
      const float more = (scaled - whole) * 256.0f + kRound - kRound;
      const int32_t a = int32_t(whole), b = int32_t(more < 127.0f ? more : 127.0f);
      main[k] = int8_t(a);
      rest[k] = int8_t(b);
      *sum += a;
      *rest_sum += b;
    }
    std::memcpy(row, main, kUnit);
    if (residual) std::memcpy(row + kUnit, rest, kUnit);
  }
}

#endif

void quantize_row(const Packed& w, const float* x, bool residual, uint8_t* row, InputSpan* spans) {
  const int32_t* rows = w.rows();
  const Span* span = w.spans();
  const int64_t unit_bytes = residual ? 2 * kUnit : kUnit;
  alignas(64) float gathered[2][kSpanUnits * kUnit];
  const auto gather = [&](int64_t i) {
    const int count = (span[i].units & 7) * int(kUnit);  // the mask tells the compiler that it is small and positive
    float* to = gathered[i % 2];
    for (int k = 0; k < count; k += 8) {
      EXL_UNROLL for (int j = k; j < k + 8; ++j) {
        to[j] = rows[j] < 0 ? 0.0f : x[rows[j]];
        __asm__("");  // one by one: gather instructions take longer
      }
    }
    rows += count;
  };
  if (rows != nullptr && w.header->spans > 0) gather(0);
  for (int64_t i = 0; i < w.header->spans; ++i) {
    const int count = (span[i].units & 7) * int(kUnit);
    const float* value = x;
    if (rows != nullptr) {  // one span ahead: wide loads right behind narrow stores would wait for them
      if (i + 1 < w.header->spans) gather(i + 1);
      value = gathered[i % 2];
    } else {
      x += count;
    }
    const uint32_t top = largest(value, count);
    const float most = bits_to_float(top);
    if (!(most >= 1e-30f) || top >= 0x7f800000u) {
      std::memset(row, 0, size_t(count / kUnit * unit_bytes));
      spans[i] = {top >= 0x7f800000u ? bits_to_float(0x7fc00000u) : 0.0f, 0};
      row += count / kUnit * unit_bytes;
      continue;
    }
    int32_t sum = 0, rest_sum = 0;
    if (residual) {
      quantize_units<true>(value, 127.0f / most, count / int(kUnit), row, &sum, &rest_sum);
    } else {
      quantize_units<false>(value, 127.0f / most, count / int(kUnit), row, &sum, &rest_sum);
    }
    row += count / kUnit * unit_bytes;
    const float scale = most / 127.0f;
    spans[i] = residual ? InputSpan{scale / 256.0f, -(256 * sum + rest_sum)} : InputSpan{scale, -sum};
  }
}

}  // namespace
}  // namespace exl
