// The packed kernels with 64-byte registers and vpdpbusd: one instruction for 64 products.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in immintrin.h of GCC 12, wrongly (bug 105593)
#include <immintrin.h>

#include "linear_packed_kernel.h"

namespace exl {
namespace {

// The whole tile in two registers.
struct Avx512Vnni {
  struct V {
    __m512i part[2];
  };
  struct F {
    __m512 part[2];
  };
  template <int>
  using For = Avx512Vnni;
  static constexpr int scaled_sets = 4;
  static constexpr int plain_rows = 8, residual_rows = 4;

  template <class Out, class Op>
  static EXL_INLINE Out each(const Op& op) {
    return {op(0), op(1)};
  }

  static EXL_INLINE V load(const uint8_t* p) {
    return each<V>([&](int i) { return _mm512_loadu_si512(p + 64 * i); });
  }
  static EXL_INLINE V quad_of(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return spread(four);
  }
  template <int n>
  static EXL_INLINE V shift(V v) {
    if constexpr (n > 0) return each<V>([&](int i) { return _mm512_srli_epi16(v.part[i], n); });
    if constexpr (n < 0) return each<V>([&](int i) { return _mm512_slli_epi16(v.part[i], -n); });
    return v;
  }
  template <int m>
  static EXL_INLINE V mask(V v) {
    return each<V>([&](int i) { return _mm512_and_si512(v.part[i], _mm512_set1_epi8(m)); });
  }
  template <int m>
  static EXL_INLINE V merge(V a, V b) {
    return each<V>([&](int i) {
      return _mm512_ternarylogic_epi32(a.part[i], b.part[i], _mm512_set1_epi8(m), 0xf8);  // a | (b & c)
    });
  }

  template <int bits, int chains, bool of_scaled>
  struct Sum {
    V sum[chains];
    EXL_INLINE void begin(V value) {
      sum[0] = value;
      EXL_UNROLL for (int i = 1; i < chains; ++i) sum[i] = spread(0);
    }
    template <int q>
    EXL_INLINE void add(V codes, V inputs) {
      V& to = sum[q % chains];
      EXL_UNROLL for (int i = 0; i < 2; ++i) {
        to.part[i] = _mm512_dpbusd_epi32(to.part[i], codes.part[i], inputs.part[i]);
      }
    }
    EXL_INLINE V total() const {
      if constexpr (chains == 1) return sum[0];
      constexpr unsigned down = of_scaled ? unsigned(scale_log(bits, 1)) : 0u;
      return each<V>([&](int i) {
        return _mm512_add_epi32(sum[0].part[i], _mm512_srai_epi32(sum[chains - 1].part[i], down));
      });
    }
  };

  static EXL_INLINE V spread(int32_t v) {
    return each<V>([&](int) { return _mm512_set1_epi32(v); });
  }
  static EXL_INLINE V plus(V a, V b) {
    return each<V>([&](int i) { return _mm512_add_epi32(a.part[i], b.part[i]); });
  }
  template <int n>
  static EXL_INLINE V left(V v) {
    return each<V>([&](int i) { return _mm512_slli_epi32(v.part[i], n); });
  }
  static EXL_INLINE V times(V a, V b) {
    return each<V>([&](int i) { return _mm512_mullo_epi32(a.part[i], b.part[i]); });
  }
  static EXL_INLINE V bytes(const uint8_t* p) {
    return each<V>([&](int i) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
    });
  }
  static EXL_INLINE F to_float(V v) {
    return each<F>([&](int i) { return _mm512_cvtepi32_ps(v.part[i]); });
  }
  static EXL_INLINE F all(const float* p) {
    return each<F>([&](int) { return _mm512_set1_ps(*p); });
  }
  static EXL_INLINE F fma(F a, F b, F c) {
    return each<F>([&](int i) { return _mm512_fmadd_ps(a.part[i], b.part[i], c.part[i]); });
  }
  static EXL_INLINE F mul(F a, F b) {
    return each<F>([&](int i) { return _mm512_mul_ps(a.part[i], b.part[i]); });
  }
  static EXL_INLINE F load_floats(const float* p) {
    return each<F>([&](int i) { return _mm512_loadu_ps(p + 16 * i); });
  }
  static EXL_INLINE void store(float* p, F v) {
    EXL_UNROLL for (int i = 0; i < 2; ++i) _mm512_storeu_ps(p + 16 * i, v.part[i]);
  }
  static EXL_INLINE F halves(const uint8_t* p) {
    return each<F>([&](int i) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
    });
  }
  static EXL_INLINE F lookup(const float* table, const uint8_t* nibbles, int) {
    const __m512i shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512 values = _mm512_loadu_ps(table);
    return each<F>([&](int i) {
      int64_t all;
      std::memcpy(&all, nibbles + 8 * i, 8);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(all), shifts), values);
    });
  }
};

constexpr PackedIsa table = packed_isa<Avx512Vnni>();

}  // namespace

const PackedIsa& linear_packed_avx512vnni() { return table; }

}  // namespace exl
