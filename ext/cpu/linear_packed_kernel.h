// The kernels of linear_packed.h, written once over an instruction set I. Included by linear_packed_<isa>.cpp only;
// internal linkage, see isa.h.
//
// I provides
//   V, F              integers and float32 of kLanes lanes (16, or 8: then a tile is two halves)
//   plain_rows, residual_rows   powers of two, at most 16
//   One               an I to be used for one row
//   scaled            whether Sum takes scaled codes (scale_log) up to 255
//   load(p)           kLanes * 4 bytes as V;     quad_of(p)  four bytes in every lane
//   shift<n>, mask<m>  bits moved right (n < 0: left) within at least 16-bit lanes, masked byte by byte
//   merge(a, b, m)    a | (b & m), m byte by byte
//   Sum<bits, chains, scaled> with begin(value), add<q>(codes, inputs), total(): value + the sums of products of an
//                     unsigned and a signed byte
//   plus, times, spread, bytes, to_float, halves, lookup ...: see the uses
#pragma once

#include <cstring>

#include "../common/half.h"
#include "lanes.h"
#include "linear_packed_isa.h"

namespace exl {
namespace {

// Where sums may be scaled, quad q is left where it lies in its line: its codes are scaled by 2^scale_log(bits, q).
constexpr int scale_log(int bits, int q) {
  return bits == 2 ? q % 4 * 2 : bits == 3 ? q % 2 * 3 : bits == 4 ? q % 2 * 4 : 0;
}

// Quad q of the unit at `unit`, column half included in the pointer. The lines are drawn in tiles.h.
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

// A place in a tile, moving from its begin to its end.
struct Cursor {
  const uint8_t* codes;   // of the next unit, or the scales before it
  const uint8_t* scales;  // of the groups here
  const uint8_t* x;       // the unit of the first row
};

template <class I>
struct Scales {
  const float* tables;
  ScaleKind kind;
  int32_t zero_base;
  int half;

  EXL_INLINE typename I::F of(const uint8_t* scales, int32_t group) const {
    if (kind == ScaleKind::exl2) return I::lookup(tables + group * 16, scales + (group & 7) * 8, half);
    return I::halves(scales + (group & (kind == ScaleKind::zeros ? 3 : 1)) * 32 + half * 16);
  }
  // minus * zero for every column.
  template <int bits>
  EXL_INLINE typename I::V centre(const uint8_t* scales, int32_t group, const int32_t* minus) const {
    const typename I::V inputs = I::quad_of(reinterpret_cast<const uint8_t*>(minus));
    if (kind != ScaleKind::zeros) return I::template left<bits - 1>(inputs);
    return I::times(I::plus(I::bytes(scales + 128 + (group & 3) * 16 + half * 8), I::spread(zero_base)), inputs);
  }
};

// All quads of a unit, one after another, into the sums of R rows.
template <class I, int bits, int R, bool residual, bool scaled, int q, class S>
EXL_INLINE void add_quads(const uint8_t* unit, const uint8_t* x, int64_t stride, S* main, S* rest) {
  const typename I::V codes = quad<I, bits, q, scaled>(unit);
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    main[r].template add<q>(codes, I::quad_of(x + r * stride + q * 4));
    if constexpr (residual) rest[r].template add<q>(codes, I::quad_of(x + r * stride + kUnit + q * 4));
  }
  if constexpr (q < 7) add_quads<I, bits, R, residual, scaled, q + 1>(unit, x, stride, main, rest);
}

// Spans [index, end) of one width. sums[R]: 16 columns row by row.
template <class I, int bits, int R, bool residual>
__attribute__((noinline)) void add_spans(const Scales<I>& scales, const Span* spans, int64_t index, int64_t end,
                                         const InputSpan* input, int64_t stride, Cursor& cursor, float* sums) {
  using F = typename I::F;
  // As many sums as hide the latency of a product, or, with few rows, as there are scales of codes.
  constexpr bool scaled = I::scaled && R <= 2 && bits <= 4;
  constexpr int chains = R == 1 || scaled ? 4 : R * (residual ? 2 : 1) < 4 ? 2 : 1;
  using S = typename I::template Sum<bits, chains, scaled>;
  Cursor at = cursor;
  F total[R];
  EXL_UNROLL for (int r = 0; r < R; ++r) total[r] = I::load_floats(sums + r * kTileColumns);
  for (; index < end; ++index) {
    const Span span = spans[index];
    const uint8_t* in = reinterpret_cast<const uint8_t*>(input + index);
    if (span.scales != 0) {
      at.scales = at.codes;
      at.codes += span.scales;
    }
    S main[R], rest[residual ? R : 1];
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      const int32_t* minus = &reinterpret_cast<const InputSpan*>(in + r * stride)->minus;
      const typename I::V centre = scales.template centre<bits>(at.scales, span.group, minus);
      if constexpr (residual) {
        main[r].begin(I::spread(0));
        rest[r].begin(centre);
      } else {
        main[r].begin(centre);
      }
    }
    const uint8_t* const stop = at.codes + span.units * bits * kLine;
    for (; at.codes != stop; at.codes += bits * kLine, at.x += residual ? 2 * kUnit : kUnit) {
      add_quads<I, bits, R, residual, scaled, 0>(at.codes + scales.half * I::kLanes * 4, at.x, stride, main, rest);
    }
    const F scale = scales.of(at.scales, span.group);
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      typename I::V sum = main[r].total();
      if constexpr (residual) sum = I::plus(I::template left<8>(sum), rest[r].total());
      const F factor = I::mul(scale, I::all(&reinterpret_cast<const InputSpan*>(in + r * stride)->scale));
      total[r] = I::fma(I::to_float(sum), factor, total[r]);
    }
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) I::store(sums + r * kTileColumns, total[r]);
  cursor = at;
}

template <class I, int R, bool residual>
void multiply_rows(const Packed& w, int64_t panel, int64_t tile, const QuantizedRows& x, int64_t row, float* sums) {
  const PackedHeader& h = *w.header;
  const Panel& p = w.panel(panel);
  const Span* spans = w.spans();
  const uint8_t* first = x.data + row * x.stride;
  const InputSpan* input = reinterpret_cast<const InputSpan*>(first + x.spans_at);
  for (int half = 0; half < kTileColumns / I::kLanes; ++half) {
    const Scales<I> scales{w.tables(), h.kind, int32_t(h.zero_base), half};
    Cursor at{w.at(p.at + tile * p.tile_bytes), nullptr, first + p.unit * (residual ? 2 * kUnit : kUnit)};
    float* to = sums + half * I::kLanes;
    for (int64_t begin = p.span, end = begin, stop = begin + p.spans; begin < stop; begin = end) {
      const int32_t bits = spans[begin].bits;
      while (end < stop && spans[end].bits == bits) ++end;
      switch (bits) {
        case 2: add_spans<I, 2, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
        case 3: add_spans<I, 3, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
        case 4: add_spans<I, 4, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
        case 5: add_spans<I, 5, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
        case 6: add_spans<I, 6, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
        case 8: add_spans<I, 8, R, residual>(scales, spans, begin, end, input, x.stride, at, to); break;
      }
    }
  }
}

template <class I, bool residual>
void multiply_any(const Packed& w, int64_t panel, int64_t tile, const QuantizedRows& x, int64_t row, int rows,
                  float* sums) {
  constexpr int most = residual ? I::residual_rows : I::plain_rows;
  if (rows == 1) return multiply_rows<typename I::One, 1, residual>(w, panel, tile, x, row, sums);
  if constexpr (most >= 2) {
    if (rows == 2) return multiply_rows<I, 2, residual>(w, panel, tile, x, row, sums);
  }
  if constexpr (most >= 4) {
    if (rows <= 4) return multiply_rows<I, 4, residual>(w, panel, tile, x, row, sums);
  }
  if constexpr (most >= 8) {
    if (rows <= 8) return multiply_rows<I, 8, residual>(w, panel, tile, x, row, sums);
  }
  if constexpr (most >= 16) multiply_rows<I, 16, residual>(w, panel, tile, x, row, sums);
}

template <class I>
void multiply(const Packed& w, int64_t panel, int64_t tile, const QuantizedRows& x, int64_t row, int rows,
              float* sums) {
  if (x.residual) return multiply_any<I, true>(w, panel, tile, x, row, rows, sums);
  return multiply_any<I, false>(w, panel, tile, x, row, rows, sums);
}

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

template <class I>
constexpr PackedIsa packed_isa() {
  return {I::plain_rows, I::residual_rows, &quantize_row, &multiply<I>};
}

}  // namespace
}  // namespace exl
