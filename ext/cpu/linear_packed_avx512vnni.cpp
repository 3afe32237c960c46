// The packed kernels with 64-byte registers and vpdpbusd: one instruction for 64 products.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in immintrin.h of GCC 12, wrongly (bug 105593)
#include <immintrin.h>

#include "linear_packed_kernel.h"

namespace exl {
namespace {

struct Avx512Vnni {
  using V = __m512i;
  using F = __m512;
  using One = Avx512Vnni;
  static constexpr int kLanes = 16;
  static constexpr bool scaled = true;
  static constexpr int plain_rows = 16, residual_rows = 8;

  static EXL_INLINE V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static EXL_INLINE V quad_of(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  template <int n>
  static EXL_INLINE V shift(V v) {
    if constexpr (n > 0) return _mm512_srli_epi16(v, n);
    if constexpr (n < 0) return _mm512_slli_epi16(v, -n);
    return v;
  }
  template <int m>
  static EXL_INLINE V mask(V v) {
    return _mm512_and_si512(v, _mm512_set1_epi8(m));
  }
  template <int m>
  static EXL_INLINE V merge(V a, V b) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(m), 0xf8);  // a | (b & c)
  }

  template <int bits, int chains, bool of_scaled>
  struct Sum {
    V sum[chains];
    EXL_INLINE void begin(V value) {
      sum[0] = value;
      EXL_UNROLL for (int i = 1; i < chains; ++i) sum[i] = _mm512_setzero_si512();
    }
    template <int q>
    EXL_INLINE void add(V codes, V inputs) {
      sum[q % chains] = _mm512_dpbusd_epi32(sum[q % chains], codes, inputs);
    }
    EXL_INLINE V total() const {
      V all = sum[0];
      EXL_UNROLL for (int i = 1; i < chains; ++i) {
        all = _mm512_add_epi32(all, of_scaled ? _mm512_srai_epi32(sum[i], unsigned(scale_log(bits, i))) : sum[i]);
      }
      return all;
    }
  };

  static EXL_INLINE V spread(int32_t v) { return _mm512_set1_epi32(v); }
  static EXL_INLINE V plus(V a, V b) { return _mm512_add_epi32(a, b); }
  template <int n>
  static EXL_INLINE V left(V v) {
    return _mm512_slli_epi32(v, n);
  }
  static EXL_INLINE V times(V a, V b) { return _mm512_mullo_epi32(a, b); }
  static EXL_INLINE V bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static EXL_INLINE F to_float(V v) { return _mm512_cvtepi32_ps(v); }
  static EXL_INLINE F all(const float* p) { return _mm512_set1_ps(*p); }
  static EXL_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static EXL_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static EXL_INLINE F load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static EXL_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static EXL_INLINE F halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static EXL_INLINE F lookup(const float* table, const uint8_t* nibbles, int) {
    int64_t all;
    std::memcpy(&all, nibbles, 8);
    const V shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(all), shifts), _mm512_loadu_ps(table));
  }
};

constexpr PackedIsa table = packed_isa<Avx512Vnni>();

}  // namespace

const PackedIsa& linear_packed_avx512vnni() { return table; }

}  // namespace exl
