// The matrix kernels for AVX-512. Widths up to 5 bits look their weights up in a table of one column's group, which
// lies in one or two registers; 6 and 8 bits compute them.
#include "lanes_avx512.h"
#include "linear_kernel.h"

namespace exl {
namespace {

using L = Lanes<Part512>;

struct Avx512 {
  using Part = Part512;
  static constexpr int few_rows = 4;
  static constexpr int tile_rows = 6;

  static EXL_INLINE L nibbles(const uint8_t* bytes) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), low = _mm_set1_epi8(15);
    const __m128i both = _mm_unpacklo_epi8(_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(both))};
  }

  template <int bits>
  struct Decoder;
};

EXL_INLINE __m512i constants(const LaneConstants& c) { return _mm512_load_si512(c.lane); }

template <>
struct Avx512::Decoder<2> {
  L steps, table;  // a lookup uses 4 bits of the index
  EXL_INLINE void zero_at(float zero) { steps = differences<Part512>(0, 4, zero); }
  EXL_INLINE void scale_by(float scale) { table = round_half(steps * L::all(scale)); }
  EXL_INLINE L next(const uint8_t* step) const {
    int32_t word;
    std::memcpy(&word, step, 4);
    const __m512i index = _mm512_srlv_epi32(_mm512_set1_epi32(word), constants(kShift2));
    return {_mm512_permutexvar_ps(index, table.part[0].v)};
  }
};

template <>
struct Avx512::Decoder<3> {
  L steps, table;  // a lookup uses 4 bits of the index
  EXL_INLINE void zero_at(float zero) { steps = differences<Part512>(0, 8, zero); }
  EXL_INLINE void scale_by(float scale) { table = round_half(steps * L::all(scale)); }
  EXL_INLINE L next(const uint8_t* step) const {
    int64_t words;
    std::memcpy(&words, step - 1, 8);
    const __m512i index = _mm512_srlv_epi32(_mm512_set1_epi64(words), constants(kShift3));
    return {_mm512_permutexvar_ps(index, table.part[0].v)};
  }
};

template <>
struct Avx512::Decoder<4> {
  L steps, table;
  EXL_INLINE void zero_at(float zero) { steps = differences<Part512>(0, 16, zero); }
  EXL_INLINE void scale_by(float scale) { table = round_half(steps * L::all(scale)); }
  EXL_INLINE L next(const uint8_t* step) const {
    int64_t words;
    std::memcpy(&words, step, 8);
    const __m512i index = _mm512_srlv_epi32(_mm512_set1_epi64(words), constants(kShift4));
    return {_mm512_permutexvar_ps(index, table.part[0].v)};
  }
};

// Codes of any width, one per lane from bit 0 on; what lies above a code is not cleared.
template <int bits>
EXL_INLINE __m512i codes_of(const uint8_t* step) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step)));
  return _mm512_srlv_epi32(_mm512_shuffle_epi8(all, constants(kBytes<bits>)), constants(kShift<bits>));
}

template <>
struct Avx512::Decoder<5> {
  L low_steps, high_steps, low, high;
  EXL_INLINE void zero_at(float zero) {
    low_steps = differences<Part512>(0, 32, zero);
    high_steps = differences<Part512>(16, 32, zero);
  }
  EXL_INLINE void scale_by(float scale) {
    low = round_half(low_steps * L::all(scale));
    high = round_half(high_steps * L::all(scale));
  }
  EXL_INLINE L next(const uint8_t* step) const {
    return {_mm512_permutex2var_ps(low.part[0].v, codes_of<5>(step), high.part[0].v)};
  }
};

template <>
struct Avx512::Decoder<6> {
  float zero;
  L scale, minus_zero;
  EXL_INLINE void zero_at(float z) { zero = z; }
  EXL_INLINE void scale_by(float s) { scale = L::all(s), minus_zero = L::all(-(zero * s)); }
  EXL_INLINE L next(const uint8_t* step) const {
    const __m512i codes = _mm512_and_si512(codes_of<6>(step), _mm512_set1_epi32(63));
    return weights_of<Part512>({_mm512_cvtepi32_ps(codes)}, scale, minus_zero);
  }
};

template <>
struct Avx512::Decoder<8> {
  float zero;
  L scale, minus_zero;
  EXL_INLINE void zero_at(float z) { zero = z; }
  EXL_INLINE void scale_by(float s) { scale = L::all(s), minus_zero = L::all(-(zero * s)); }
  EXL_INLINE L next(const uint8_t* step) const {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step)));
    return weights_of<Part512>({_mm512_cvtepi32_ps(codes)}, scale, minus_zero);
  }
};

constexpr LinearIsa table = linear_isa<Avx512>();

}  // namespace

const LinearIsa& linear_avx512() { return table; }

}  // namespace exl
