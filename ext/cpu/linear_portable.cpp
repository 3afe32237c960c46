// The matrix kernels in plain C++: any architecture, any processor.
#include "lanes_portable.h"
#include "linear_kernel.h"

namespace exl {
namespace {

struct Portable {
  using Part = Part128;
  static constexpr int few_rows = 1;
  static constexpr int tile_rows = 2;

  static EXL_INLINE Lanes<Part128> nibbles(const uint8_t* bytes) {
    float value[16];
    for (int i = 0; i < 16; ++i) value[i] = float((bytes[i / 2] >> (i % 2 * 4)) & 15);
    return Lanes<Part128>::load(value);
  }

  template <int bits>
  struct Decoder {
    static constexpr bool tabled = bits <= 5;
    float table[tabled ? 1 << bits : 1];
    float scale, zero;

    void zero_at(float z) { zero = z; }
    void scale_by(float s) {
      scale = s;
      if (tabled) {
        for (int code = 0; code < 1 << bits; ++code) table[code] = weight(code);
      }
    }
    float weight(int code) const { return half_to_float(float_to_half((float(code) - zero) * scale)); }
    Lanes<Part128> next(const uint8_t* step) const {
      float out[16];
      for (int lane = 0; lane < 16; ++lane) {
        const int code = int(code_in_step(step, bits, lane_code(bits, lane)));
        out[lane] = tabled ? table[code] : weight(code);
      }
      return Lanes<Part128>::load(out);
    }
  };
};

constexpr LinearIsa table = linear_isa<Portable>();

}  // namespace

const LinearIsa& linear_portable() { return table; }

}  // namespace exl
