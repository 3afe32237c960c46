// The input of the packed kernels in 8-bit integers, see linear_packed.h. Internal linkage, see isa.h.
#pragma once

#include <cstring>

#include "../common/half.h"
#include "linear_packed_isa.h"

namespace exl {
namespace {

// Plain loops that the compiler turns into vector code; the same result in any instruction set.
void quantize_row(const Packed& w, const float* x, bool residual, uint8_t* row, InputSpan* spans) {
  constexpr float kRound = 12582912.0f;  // adding and taking away 1.5 * 2^23 rounds to an integer, ties to even
  const int32_t* rows = w.rows();
  const Span* span = w.spans();
  const int64_t unit_bytes = residual ? 2 * kUnit : kUnit;
  for (int64_t i = 0; i < w.header->spans; ++i, ++span) {
    const int count = (span->units & 7) * int(kUnit);  // the mask tells the compiler that it is small and positive
    alignas(64) float gathered[kSpanUnits * kUnit];
    const float* value = x;
    if (rows != nullptr) {
      for (int k = 0; k < count; ++k) gathered[k] = rows[k] < 0 ? 0.0f : x[rows[k]];
      value = gathered;
      rows += count;
    } else {
      x += count;
    }
    uint32_t top = 0;
    for (int k = 0; k < count; ++k) {
      const uint32_t size = float_to_bits(value[k]) & 0x7fffffffu;
      top = size > top ? size : top;
    }
    const float most = bits_to_float(top);
    if (!(most >= 1e-30f) || top >= 0x7f800000u) {
      std::memset(row, 0, size_t(count / kUnit * unit_bytes));
      spans[i] = {top >= 0x7f800000u ? bits_to_float(0x7fc00000u) : 0.0f, 0};
      row += count / kUnit * unit_bytes;
      continue;
    }
    const float inverse = 127.0f / most;
    int32_t sum = 0, rest_sum = 0;
    for (int u = 0; u < count / int(kUnit); ++u, value += kUnit, row += unit_bytes) {
      int8_t main[kUnit], rest[kUnit];
      for (int k = 0; k < kUnit; ++k) {
        const float scaled = value[k] * inverse, whole = (scaled + kRound) - kRound;
        const float more = (scaled - whole) * 256.0f + kRound - kRound;
        const int32_t a = int32_t(whole), b = int32_t(more < 127.0f ? more : 127.0f);
        main[k] = int8_t(a);
        rest[k] = int8_t(b);
        sum += a;
        rest_sum += b;
      }
      std::memcpy(row, main, kUnit);
      if (residual) std::memcpy(row + kUnit, rest, kUnit);
    }
    const float scale = most / 127.0f;
    spans[i] = residual ? InputSpan{scale / 256.0f, -(256 * sum + rest_sum)} : InputSpan{scale, -sum};
  }
}

}  // namespace
}  // namespace exl
