// The kernels of linear_packed.h, written once over an instruction set I. Included by linear_packed_<isa>.cpp only;
// internal linkage, see isa.h.
//
// A block is as many columns of a tile as there are registers for, at best the whole tile: a quad of the input is
// loaded once for all its columns. Where a tile has several blocks, they take turns span by span, so that the tile is
// still read from front to back.
//
// I provides
//   V, F              integers and float32, a lane for every column of a block
//   For<R>            an I to be used for R rows
//   plain_rows, residual_rows   the most rows of one pass: 8, or at most 4
//   scaled_sets       Sum takes scaled codes (scale_log) where a pass has at most so many sums of a block, main and
//                     rest counted each
//   load(p)           the lanes of a line as V;     quad_of(p)  four bytes in every lane
//   shift<n>, mask<m>  bits moved right (n < 0: left) within at least 16-bit lanes, masked byte by byte
//   merge(a, b, m)    a | (b & m), m byte by byte
//   Sum<bits, chains, scaled> with begin(value), add<q>(codes, inputs), total(): value + the sums of products of an
//                     unsigned and a signed byte
//   lookup(table, nibbles, block)   table[s - 1] by the nibbles of a tile
//   plus, times, spread, bytes, halves, to_float, mul, fma, load_floats, store ...: see the uses
#pragma once

#include <cstring>

#include "../common/half.h"
#include "lanes.h"
#include "linear_packed_isa.h"
#include "linear_packed_quads.h"
#include "linear_packed_quantize.h"

namespace exl {
namespace {

template <class I>
constexpr int kLanes = int(sizeof(typename I::F) / sizeof(float));
template <class I>
constexpr int kBlocks = int(kTileColumns) / kLanes<I>;

template <class I>
struct Scales {
  const float* tables;
  ScaleKind kind;
  int32_t zero_base;

  EXL_INLINE typename I::F of(const uint8_t* scales, int32_t group, int block) const {
    if (kind == ScaleKind::exl2) return I::lookup(tables + group * 16, scales + (group & 7) * 16, block);
    return I::halves(scales + (group & (kind == ScaleKind::zeros ? 3 : 1)) * 64 + block * kLanes<I> * 2);
  }
  // minus * zero for every column.
  template <int bits>
  EXL_INLINE typename I::V centre(const uint8_t* scales, int32_t group, int block, const int32_t* minus) const {
    const typename I::V inputs = I::quad_of(reinterpret_cast<const uint8_t*>(minus));
    if (kind != ScaleKind::zeros) return I::template left<bits - 1>(inputs);
    const typename I::V zeros = I::bytes(scales + 256 + (group & 3) * 32 + block * kLanes<I>);
    return I::times(I::plus(zeros, I::spread(zero_base)), inputs);
  }
};

// A place in a tile, moving from its begin to its end.
struct Cursor {
  const uint8_t* codes;   // of the next unit, or the scales before it
  const uint8_t* scales;  // of the groups here
  const uint8_t* x;       // the unit of the first row
};

constexpr int64_t kAhead = 4096;  // bytes from the use of codes to those asked for

// The processor's own prefetcher stops at the end of a page of 4 KiB and may have to look up where the next one lies:
// one line of a page to come, on entering a page, has both behind us when we get there.
constexpr uintptr_t kPage = 4096, kPagesAhead = 8;
EXL_INLINE void fetch_page(const uint8_t* at, int64_t step) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(at);
  if (place % kPage < uintptr_t(step)) {
    __builtin_prefetch(reinterpret_cast<const void*>(place / kPage * kPage + kPagesAhead * kPage), 0, 2);
  }
}

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

// Spans [index, end) of one width, added to sums[R]: a tile of columns row by row.
template <class I, int bits, int R, bool residual>
__attribute__((noinline)) void add_spans(const Scales<I>& scales, const Span* spans, int64_t index, int64_t end,
                                         const InputSpan* input, int64_t stride, Cursor& cursor, float* sums) {
  using F = typename I::F;
  constexpr int blocks = kBlocks<I>, lanes = kLanes<I>;
  constexpr int64_t unit_bytes = residual ? 2 * kUnit : kUnit;
  // As many sums as hide the latency of a product, or as there are scales of codes.
  constexpr int sets = R * (residual ? 2 : 1);
  constexpr bool scaled = bits <= 4 && sets <= I::scaled_sets;
  constexpr int chains = scaled || sets <= 2 ? 2 : 1;
  // With much to do for every line the processor looks too few lines ahead; with little its own guess is better.
  constexpr bool ahead = sets >= 6;
  using S = typename I::template Sum<bits, chains, scaled>;
  Cursor at = cursor;
  F total[R][blocks];
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    EXL_UNROLL for (int b = 0; b < blocks; ++b) total[r][b] = I::load_floats(sums + r * kTileColumns + b * lanes);
  }
  for (; index < end; ++index) {
    const Span span = spans[index];
    const uint8_t* in = reinterpret_cast<const uint8_t*>(input + index);
    if (span.scales != 0) {
      at.scales = at.codes;
      at.codes += span.scales;
    }
    const uint8_t* const stop = at.codes + span.units * bits * kLine;
    for (int b = 0; b < blocks; ++b) {
      S main[R], rest[residual ? R : 1];
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        const int32_t* minus = &reinterpret_cast<const InputSpan*>(in + r * stride)->minus;
        const typename I::V centre = scales.template centre<bits>(at.scales, span.group, b, minus);
        if constexpr (residual) {
          main[r].begin(I::spread(0));
          rest[r].begin(centre);
        } else {
          main[r].begin(centre);
        }
      }
      const uint8_t* x = at.x;
      for (const uint8_t* codes = at.codes; codes != stop; codes += bits * kLine, x += unit_bytes) {
        if (!ahead && b == 0) fetch_page(codes, bits * kLine);
        if (ahead && b == 0) {
          EXL_UNROLL for (int i = 0; i < bits * kLine / 64; ++i) __builtin_prefetch(codes + kAhead + i * 64);
        }
        add_quads<I, bits, R, residual, scaled, 0>(codes + b * lanes * 4, x, stride, main, rest);
      }
      const F scale = scales.of(at.scales, span.group, b);
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        typename I::V sum = main[r].total();
        if constexpr (residual) sum = I::plus(I::template left<8>(sum), rest[r].total());
        const F factor = I::mul(scale, I::all(&reinterpret_cast<const InputSpan*>(in + r * stride)->scale));
        total[r][b] = I::fma(I::to_float(sum), factor, total[r][b]);
      }
    }
    at.codes = stop;
    at.x += span.units * unit_bytes;
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    EXL_UNROLL for (int b = 0; b < blocks; ++b) I::store(sums + r * kTileColumns + b * lanes, total[r][b]);
  }
  cursor = at;
}

// Rows [row, row + R) of one tile of a panel; y is their first.
template <class I, int R, bool residual>
void multiply_tile(const Packed& w, int64_t panel, int64_t tile, const QuantizedRows& x, int64_t row, float* y) {
  const PackedHeader& h = *w.header;
  const Panel& p = w.panel(panel);
  const Span* spans = w.spans();
  const uint8_t* first = x.data + row * x.stride;
  const InputSpan* input = reinterpret_cast<const InputSpan*>(first + x.spans_at);
  const Scales<I> scales{w.tables(), h.kind, int32_t(h.zero_base)};
  Cursor at{w.at(p.at + tile * p.tile_bytes), nullptr, first + p.unit * (residual ? 2 * kUnit : kUnit)};
  const int64_t left = h.outputs - tile * kTileColumns;
  const size_t live = size_t(left < kTileColumns ? left : kTileColumns) * sizeof(float);
  y += tile * kTileColumns;
  alignas(64) float edge[R * kTileColumns];
  float* const sums = R == 1 && live == sizeof(edge) ? y : edge;
  if (sums != y || panel == 0) std::memset(sums, 0, sizeof(edge));
  for (int r = 0; r < R && sums != y && panel > 0; ++r) std::memcpy(sums + r * kTileColumns, y + r * h.outputs, live);
  for (int64_t begin = p.span, end = begin, stop = begin + p.spans; begin < stop; begin = end) {
    const int32_t bits = spans[begin].bits;
    while (end < stop && spans[end].bits == bits) ++end;
    switch (bits) {
      case 2: add_spans<I, 2, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
      case 3: add_spans<I, 3, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
      case 4: add_spans<I, 4, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
      case 5: add_spans<I, 5, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
      case 6: add_spans<I, 6, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
      case 8: add_spans<I, 8, R, residual>(scales, spans, begin, end, input, x.stride, at, sums); break;
    }
  }
  for (int r = 0; r < R && sums != y; ++r) std::memcpy(y + r * h.outputs, sums + r * kTileColumns, live);
}

using MultiplyTile = void (*)(const Packed&, int64_t, int64_t, const QuantizedRows&, int64_t, float*);

template <class I, bool residual>
MultiplyTile tile_of(int64_t rows) {
  constexpr int most = residual ? I::residual_rows : I::plain_rows;
  switch (rows) {
#define EXL_ROWS(R) \
  case R:           \
    if constexpr (R <= most) return &multiply_tile<typename I::template For<R>, R, residual>;
    EXL_ROWS(4)
    EXL_ROWS(3)
    EXL_ROWS(2)
    EXL_ROWS(1)
#undef EXL_ROWS
    default: break;
  }
  return &multiply_tile<typename I::template For<most>, most, residual>;
}

template <class I, bool residual>
void multiply_tiles(const Packed& w, int64_t panel, int64_t begin, int64_t end, const QuantizedRows& x, int64_t rows,
                    float* y) {
  constexpr int most = residual ? I::residual_rows : I::plain_rows;
  // Few rows: every tile comes from memory once and meets all of them. Many: a pass of rows stays in the first-level
  // cache while all tiles meet it, out of the second-level cache.
  const int64_t together = rows <= kFewRows ? 1 : end - begin;
  for (int64_t first = begin; first < end; first += together) {
    for (int64_t row = 0, here; row < rows; row += here) {
      const int64_t left = rows - row, passes = (left + most - 1) / most;
      here = most <= 4 ? (left + passes - 1) / passes : left >= most ? most : left > 4 ? 4 : left;
      const MultiplyTile multiply = tile_of<I, residual>(here);
      for (int64_t t = first; t < first + together; ++t) multiply(w, panel, t, x, row, y + row * w.header->outputs);
    }
  }
}

template <class I>
void multiply(const Packed& w, int64_t panel, int64_t begin, int64_t end, const QuantizedRows& x, int64_t rows,
              float* y) {
  if (x.residual) return multiply_tiles<I, true>(w, panel, begin, end, x, rows, y);
  return multiply_tiles<I, false>(w, panel, begin, end, x, rows, y);
}

template <class I>
constexpr PackedIsa packed_isa() {
  return {&quantize_row, &multiply<I>};
}

}  // namespace
}  // namespace exl
