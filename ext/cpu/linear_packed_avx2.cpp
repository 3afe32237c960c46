// The packed kernels with 32-byte registers and vpmaddubsw, which adds two products in 16 bits and saturates. So many
// of these sums are added in 16 bits as cannot overflow, and whole bytes are taken as two nibbles.
#include "linear_packed_256.h"

namespace exl {
namespace {

template <int parts>
struct Avx2 : Wide256<parts> {
  using Base = Wide256<parts>;
  using V = typename Base::V;
  template <int R>
  using For = Avx2<R == 1 ? 2 : 1>;
  static constexpr int scaled_sets = 0;
  static constexpr int plain_rows = 4, residual_rows = 2;

  static EXL_INLINE V products(V codes, V inputs) {
    return Base::template each<V>([&](int i) { return _mm256_maddubs_epi16(codes.part[i], inputs.part[i]); });
  }
  // Keeps the compiler from adding in another order, for which it lacks the registers.
  static EXL_INLINE __m256i here(__m256i v) {
    asm("" : "+x"(v));
    return v;
  }
  static EXL_INLINE V add16(V a, V b) {
    return Base::template each<V>([&](int i) { return here(_mm256_add_epi16(a.part[i], b.part[i])); });
  }
  static EXL_INLINE V fold16(V sum, V pairs, int times) {
    const __m256i factor = _mm256_set1_epi16(int16_t(times));
    return Base::template each<V>([&](int i) {
      return here(_mm256_add_epi32(sum.part[i], _mm256_madd_epi16(pairs.part[i], factor)));
    });
  }

  template <int bits, int, bool>
  struct Sum {
    static constexpr int fold = bits == 6 ? 2 : bits == 5 ? 4 : 8;  // 2 * 127 * (2^bits - 1) * fold <= 32767
    V sum, low, high;

    EXL_INLINE void begin(V value) { sum = value; }
    template <int q>
    EXL_INLINE void add(V codes, V inputs) {
      const V some = products(bits == 8 ? Base::template mask<0x0f>(codes) : codes, inputs);
      low = q % fold == 0 ? some : add16(low, some);
      if constexpr (bits == 8) {
        const V more = products(Base::template mask<0x0f>(Base::template shift<4>(codes)), inputs);
        high = q % fold == 0 ? more : add16(high, more);
      }
      if constexpr (q % fold == fold - 1) {
        sum = fold16(sum, low, 1);
        if constexpr (bits == 8) sum = fold16(sum, high, 16);
      }
    }
    EXL_INLINE V total() const { return sum; }
  };
};

constexpr PackedIsa table = packed_isa<Avx2<1>>();

}  // namespace

const PackedIsa& linear_packed_avx2() { return table; }

}  // namespace exl
