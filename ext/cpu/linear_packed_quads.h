// The codes of a unit of a tile (the lines are drawn in tiles.h), written over an instruction set I: see
// linear_packed_kernel.h. Internal linkage, see isa.h.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace exl {
namespace {

// Where sums may be scaled, odd quads are left where they lie in their line (2 bits: in the line or its upper half
// moved down): the codes of quad q are then scaled by 2^scale_log(bits, q), so even and odd quads have own sums.
constexpr int scale_log(int bits, int q) {
  return bits <= 4 ? q % 2 * bits : 0;
}

// Quad q of the unit at `unit`; the block of columns included in the pointer.
template <class I, int bits, int q, bool scaled>
EXL_INLINE typename I::V quad(const uint8_t* unit) {
  using V = typename I::V;
  const auto line = [&](auto l) { return I::load(unit + decltype(l)::value * kLine); };
  // Bits of a mask out of line l, moved right by n.
  const auto cut = [&](auto l, auto n, auto m) {
    return I::template mask<decltype(m)::value>(I::template shift<decltype(n)::value>(line(l)));
  };
  const auto join = [&](V low, auto l, auto n, auto m) {
    return I::template merge<decltype(m)::value>(low, I::template shift<decltype(n)::value>(line(l)));
  };
#define EXL_C(n) Constant<(n)>()
  constexpr int up = scaled ? scale_log(bits, q) : 0;
  if constexpr (bits == 8) return line(EXL_C(q));
  if constexpr (bits == 4) return cut(EXL_C(q / 2), EXL_C(q % 2 * 4 - up), EXL_C(0x0f << up));
  if constexpr (bits == 2) return cut(EXL_C(q / 4), EXL_C(q % 4 * 2 - up), EXL_C(0x03 << up));
  if constexpr (bits == 6) {
    constexpr int h = q / 4 * 3;
    if constexpr (q % 4 < 3) return cut(EXL_C(h + q % 4), EXL_C(0), EXL_C(0x3f));
    const V low = join(cut(EXL_C(h), EXL_C(6), EXL_C(0x03)), EXL_C(h + 1), EXL_C(4), EXL_C(0x0c));
    return join(low, EXL_C(h + 2), EXL_C(2), EXL_C(0x30));
  }
  if constexpr (bits == 5) {
    if constexpr (q < 5) return cut(EXL_C(q), EXL_C(0), EXL_C(0x1f));
    if constexpr (q < 7) {
      constexpr int h = q * 2 - 10;
      return join(cut(EXL_C(h), EXL_C(5), EXL_C(0x07)), EXL_C(h + 1), EXL_C(2), EXL_C(0x18));
    }
    const V low = join(cut(EXL_C(4), EXL_C(5), EXL_C(0x07)), EXL_C(1), EXL_C(4), EXL_C(0x08));
    return join(low, EXL_C(3), EXL_C(3), EXL_C(0x10));
  }
  if constexpr (bits == 3) {
    if constexpr (q < 6) return cut(EXL_C(q / 2), EXL_C(q % 2 * 3 - up), EXL_C(0x07 << up));
    return join(cut(EXL_C(q - 6), EXL_C(6 - up), EXL_C(0x03 << up)), EXL_C(2), EXL_C(q - 2 - up), EXL_C(0x04 << up));
  }
#undef EXL_C
}

}  // namespace
}  // namespace exl
