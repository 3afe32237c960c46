// The codes of a quantized cache row in plain C++. Interface: attention_kernel.h; layout: ../common/kv_rows.h.
#pragma once

#include <cstring>

#include "../common/kv_rows.h"
#include "lanes_portable.h"

namespace exl {
namespace {

template <int bits>
struct CodesPortable {
  float scale;

  explicit CodesPortable(const uint8_t* half) {
    uint16_t raw;
    std::memcpy(&raw, half, sizeof raw);
    scale = half_to_float(raw);
  }

  // Values 4 * i to 4 * i + 3 of a step.
  EXL_INLINE Part128 part(const uint8_t* step, int i) const {
    int32_t codes[Part128::width] = {};
    for (int width = 8; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      uint64_t plane = 0;
      if (width < 8) std::memcpy(&plane, step, size_t(2 * width));
      for (int j = 0; j < Part128::width; ++j) {
        const int at = Part128::width * i + j;
        const uint64_t code = width == 8 ? step[at] : (plane >> kv_code_bit(width, at)) & ((1u << width) - 1u);
        codes[j] = codes[j] << width | int32_t(code);
      }
      step += 2 * width;
    }
    return each([&](int j) { return (float(codes[j]) - (kv_middle(bits) - 0.5f)) * scale; });
  }
};

}  // namespace
}  // namespace exl
