// The packed kernels in plain C++: any architecture, any processor.
#include <cmath>

#include "linear_packed_kernel.h"

namespace exl {
namespace {

// The compiler makes of these what the baseline has. Shifts may carry bits into a neighbour byte: masks remove them.
typedef uint32_t Eight __attribute__((vector_size(32)));
typedef int32_t EightSigned __attribute__((vector_size(32)));
typedef float EightFloats __attribute__((vector_size(32)));

struct Portable {
  using V = Eight;
  using F = EightFloats;
  template <int>
  using For = Portable;
  static constexpr int scaled_sets = 0;
  static constexpr int plain_rows = 1, residual_rows = 1;

  static EXL_INLINE V load(const uint8_t* p) {
    V out;
    std::memcpy(&out, p, sizeof(out));
    return out;
  }
  static EXL_INLINE V quad_of(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return V{} + four;
  }
  template <int n>
  static EXL_INLINE V shift(V v) {
    if constexpr (n < 0) return v << -n;
    return v >> (n < 0 ? 0 : n);
  }
  template <int m>
  static EXL_INLINE V mask(V v) {
    return v & uint32_t(m) * 0x01010101u;
  }
  template <int m>
  static EXL_INLINE V merge(V a, V b) {
    return a | mask<m>(b);
  }

  template <int, int, bool>
  struct Sum {
    EightSigned sum;
    EXL_INLINE void begin(V value) { sum = EightSigned(value); }
    template <int>
    EXL_INLINE void add(V codes, V inputs) {
      for (int j = 0; j < 32; j += 8) sum += EightSigned(codes >> j & 255u) * (EightSigned(inputs << (24 - j)) >> 24);
    }
    EXL_INLINE V total() const { return V(sum); }
  };

  static EXL_INLINE V spread(int32_t v) { return V{} + uint32_t(v); }
  static EXL_INLINE V plus(V a, V b) { return a + b; }
  template <int n>
  static EXL_INLINE V left(V v) {
    return v << n;
  }
  static EXL_INLINE V times(V a, V b) { return a * b; }
  static EXL_INLINE V bytes(const uint8_t* p) {
    V out;
    for (int i = 0; i < 8; ++i) out[i] = p[i];
    return out;
  }
  static EXL_INLINE F to_float(V v) { return __builtin_convertvector(EightSigned(v), F); }
  static EXL_INLINE F all(const float* p) { return F{*p, *p, *p, *p, *p, *p, *p, *p}; }
  static EXL_INLINE F fma(F a, F b, F c) {
    for (int i = 0; i < 8; ++i) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
  }
  static EXL_INLINE F mul(F a, F b) { return a * b; }
  static EXL_INLINE F load_floats(const float* p) {
    F out;
    std::memcpy(&out, p, sizeof(out));
    return out;
  }
  static EXL_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  static EXL_INLINE F halves(const uint8_t* p) {
    F out;
    for (int i = 0; i < 8; ++i) {
      uint16_t bits;
      std::memcpy(&bits, p + 2 * i, 2);
      out[i] = half_to_float(bits);
    }
    return out;
  }
  static EXL_INLINE F lookup(const float* table, const uint8_t* nibbles, int block) {
    F out;
    for (int i = 0; i < 8; ++i) {
      const int at = block / 2 * 16 + i % 2 * 8 + block % 2 * 4 + i / 2;
      out[i] = table[nibbles[at / 2] >> at % 2 * 4 & 15];
    }
    return out;
  }
};

constexpr PackedIsa table = packed_isa<Portable>();

}  // namespace

const PackedIsa& linear_packed_portable() { return table; }

}  // namespace exl
