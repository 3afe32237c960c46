// The matrix kernels for AVX2 with FMA and F16C. Widths up to 4 bits look their weights up in a table of one column's
// group; wider ones compute them.
#include "lanes_avx2.h"
#include "linear_kernel.h"

namespace exl {
namespace {

using L = Lanes<Part256>;

struct Avx2 {
  using Part = Part256;
  static constexpr int few_rows = 2;
  static constexpr int tile_rows = 3;

  static EXL_INLINE L nibbles(const uint8_t* bytes) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), low = _mm_set1_epi8(15);
    const __m128i both = _mm_unpacklo_epi8(_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low));
    return {{{_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both))},
             {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)))}}};
  }

  template <int bits>
  struct Decoder;
};

// Constants of lanes 8 * half .. 8 * half + 7.
template <int half>
EXL_INLINE __m256i constants(const LaneConstants& c) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(c.lane + 8 * half));
}


template <>
struct Avx2::Decoder<2> {
  __m256 steps, table;  // period 4; a lookup uses 3 bits of the index
  EXL_INLINE void zero_at(float zero) { steps = differences<Part256>(0, 4, zero).part[0].v; }
  EXL_INLINE void scale_by(float scale) { table = round_half(Part256{steps} * Part256::all(scale)).v; }
  EXL_INLINE L next(const uint8_t* step) const {
    int32_t word;
    std::memcpy(&word, step, 4);
    const __m256i all = _mm256_set1_epi32(word);
    const __m256i low = _mm256_srlv_epi32(all, constants<0>(kShift2));
    const __m256i high = _mm256_srlv_epi32(all, constants<1>(kShift2));
    return {{{_mm256_permutevar8x32_ps(table, low)}, {_mm256_permutevar8x32_ps(table, high)}}};
  }
};

template <>
struct Avx2::Decoder<3> {
  __m256 steps, table;  // period 8; a lookup uses 3 bits of the index
  EXL_INLINE void zero_at(float zero) { steps = differences<Part256>(0, 8, zero).part[0].v; }
  EXL_INLINE void scale_by(float scale) { table = round_half(Part256{steps} * Part256::all(scale)).v; }
  EXL_INLINE L next(const uint8_t* step) const {
    int64_t words;
    std::memcpy(&words, step - 1, 8);
    const __m256i all = _mm256_set1_epi64x(words);
    const __m256i low = _mm256_srlv_epi32(all, constants<0>(kShift3));
    const __m256i high = _mm256_srlv_epi32(all, constants<1>(kShift3));
    return {{{_mm256_permutevar8x32_ps(table, low)}, {_mm256_permutevar8x32_ps(table, high)}}};
  }
};

template <>
struct Avx2::Decoder<4> {
  L steps, table;
  EXL_INLINE void zero_at(float zero) { steps = differences<Part256>(0, 16, zero); }
  EXL_INLINE void scale_by(float scale) { table = round_half(steps * L::all(scale)); }
  EXL_INLINE Part256 look_up(__m256i index) const {
    const __m256 low = _mm256_permutevar8x32_ps(table.part[0].v, index);
    const __m256 high = _mm256_permutevar8x32_ps(table.part[1].v, index);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
  }
  EXL_INLINE L next(const uint8_t* step) const {
    int64_t words;
    std::memcpy(&words, step, 8);
    const __m256i all = _mm256_set1_epi64x(words);
    const __m256i low = _mm256_srlv_epi32(all, constants<0>(kShift4));
    const __m256i high = _mm256_srlv_epi32(all, constants<1>(kShift4));
    return {{look_up(low), look_up(high)}};
  }
};

// The codes of lanes 8 * half .. 8 * half + 7 of a step, as floats.
template <int bits, int half>
EXL_INLINE Part256 codes_of(const uint8_t* step) {
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step)));
  const __m256i bytes = _mm256_shuffle_epi8(all, constants<half>(kBytes<bits>));
  const __m256i codes = _mm256_srlv_epi32(bytes, constants<half>(kShift<bits>));
  return {_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << bits) - 1)))};
}

template <int bits>
struct Avx2::Decoder {
  float zero;
  L scale, minus_zero;
  EXL_INLINE void zero_at(float z) { zero = z; }
  EXL_INLINE void scale_by(float s) { scale = L::all(s), minus_zero = L::all(-(zero * s)); }
  EXL_INLINE L next(const uint8_t* step) const {
    return weights_of<Part256>({{codes_of<bits, 0>(step), codes_of<bits, 1>(step)}}, scale, minus_zero);
  }
};

constexpr LinearIsa table = linear_isa<Avx2>();

}  // namespace

const LinearIsa& linear_avx2() { return table; }

}  // namespace exl
