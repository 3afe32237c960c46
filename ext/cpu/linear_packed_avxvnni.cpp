// The packed kernels with 32-byte registers and vpdpbusd, for processors with AVX-VNNI but without AVX-512 (and, for
// the test on others, in the form of AVX-512VL: tests/ext/packed_check.cpp).
#include "linear_packed_256.h"

namespace exl {
namespace {

// Half of a tile at once: 12 sums for three rows with the residual, and the codes, just fit in 16 registers.
struct AvxVnni : Wide256<2> {
  using Base = Wide256<2>;
  template <int>
  using For = AvxVnni;
  static constexpr int scaled_sets = 2;
  static constexpr int plain_rows = 4, residual_rows = 3;

  static EXL_INLINE __m256i products(__m256i sum, __m256i codes, __m256i inputs) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, codes, inputs);
#else
    return _mm256_dpbusd_epi32(sum, codes, inputs);
#endif
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
      EXL_UNROLL for (int i = 0; i < 2; ++i) to.part[i] = products(to.part[i], codes.part[i], inputs.part[i]);
    }
    EXL_INLINE V total() const {
      if constexpr (chains == 1) return sum[0];
      constexpr int down = of_scaled ? scale_log(bits, 1) : 0;
      return each<V>([&](int i) {
        return _mm256_add_epi32(sum[0].part[i], _mm256_srai_epi32(sum[chains - 1].part[i], down));
      });
    }
  };
};

constexpr PackedIsa table = packed_isa<AvxVnni>();

}  // namespace

const PackedIsa& linear_packed_avxvnni() { return table; }

}  // namespace exl
