// The matrix kernels, written once over an instruction set I. Included by linear_portable.cpp, linear_avx2.cpp and
// linear_avx512.cpp only; internal linkage, see isa.h.
//
// I provides:  Part (lanes.h); few_rows (of few_grouped, at most 4), tile_rows (at most 6); nibbles(bytes), 16 unsigned
// 4-bit numbers as Lanes; and Decoder<bits> for one column:  zero_at(zero), scale_by(scale) per group, then next(step)
// -> 16 weights in lane order.
#pragma once

#include <cstring>

#include "../common/bitstream.h"
#include "lanes.h"
#include "linear_isa.h"

namespace exl {
namespace {

constexpr int kColumns = int(kTileColumns);
constexpr int kFewDenseTiles = 4;  // a block of four dense columns stays in the first-level cache for these row tiles

// A 32-bit constant per lane, in memory, as every instruction set loads it.
struct LaneConstants {
  alignas(64) int32_t lane[16];
};

template <class F>
constexpr LaneConstants each_lane(F f) {
  LaneConstants out{};
  for (int l = 0; l < 16; ++l) out.lane[l] = f(l);
  return out;
}

// How lane l finds its code (lane_code) in the 32 bits it is given, by shifting right. The lanes are given: for 2 bits
// the step's 4 bytes; for 4 bits its first 4 bytes (even lanes) or its last 4 (odd lanes); for 3 bits the same from one
// byte before the step, so that even lanes see codes 0..7 from bit 8 on and odd lanes codes 8..15 from bit 0 on.
constexpr LaneConstants kShift2 = each_lane([](int l) { return 2 * l; });
constexpr LaneConstants kShift3 = each_lane([](int l) { return (l % 2 ? 0 : 8) + 3 * (l / 2); });
constexpr LaneConstants kShift4 = each_lane([](int l) { return 4 * (l / 2); });

// For other widths the lane fetches the two bytes its code lies in (one byte twice if it fits one) by a byte shuffle,
// 0x80 giving zero, and then shifts.
template <int bits>
constexpr LaneConstants kBytes = each_lane([](int l) {
  return int32_t(0x80800000u | uint32_t((l * bits + bits - 1) / 8 << 8) | uint32_t(l * bits / 8));
});
template <int bits>
constexpr LaneConstants kShift = each_lane([](int l) { return l * bits % 8; });

// 16 codes to 16 weights by the definition; for widths too wide for a table.
template <class P>
EXL_INLINE Lanes<P> weights_of(const Lanes<P>& codes, const Lanes<P>& scale, const Lanes<P>& minus_zero) {
  // code * scale - zero * scale: at most 20 significant bits, so the only rounding is the one to half.
  return round_half(fma(codes, scale, minus_zero));
}

// Code minus zero-point for the codes first, first + 1, ... (modulo period): a weight table before its scale.
template <class P>
EXL_INLINE Lanes<P> differences(int first, int period, float zero) {
  alignas(64) float code[16];
  EXL_UNROLL for (int i = 0; i < 16; ++i) code[i] = float((first + i) % period);
  return Lanes<P>::load(code) - Lanes<P>::all(zero);
}

// Scales (and zero-points) of groups [begin, end) of one tile, as float32 [group - begin][4]. Writes up to 3 groups
// more.
template <class I>
void decode_scales(const GroupedWeights& w, int64_t tile, int64_t begin, int64_t end, float* scales, float* zeros) {
  using L = Lanes<typename I::Part>;
  for (int64_t g = begin; g < end; g += 4) {
    const int64_t groups = end - g < 4 ? end - g : 4;
    const int64_t at = tile * w.groups + g;
    float* to = scales + (g - begin) * kColumns;
    if (w.scale_codes != nullptr) {
      uint8_t codes[8] = {};
      std::memcpy(codes, w.scale_codes + at, groups < 4 ? size_t(groups) * 2 : 8);
      const L s = I::nibbles(codes) + L::all(1.0f);
      round_half(s * s * L::load(w.maxima + g * kColumns)).store(to);
      continue;
    }
    const int64_t count = groups * kColumns;
    L::load_part(reinterpret_cast<const Half*>(w.scales) + at * kColumns, count).store(to);
    if (w.zeros != nullptr) {
      L::load_part(reinterpret_cast<const Half*>(w.zeros) + at * kColumns, count).store(zeros + (g - begin) * kColumns);
    }
  }
}

// What is done with 4 x 16 decoded weights at a position: multiply into the sums of R rows ...
template <class P, int R>
struct MultiplyRows {
  const float* x;  // block row 0; rows are kBlock apart
  Lanes<P> sum[R][kColumns];

  EXL_INLINE void take(int64_t position, const Lanes<P>* weight) {
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      const Lanes<P> a = Lanes<P>::load(x + r * kBlock + position);
      EXL_UNROLL for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(a, weight[c], sum[r][c]);
    }
  }
};

// ... or store them in a panel.
template <class P>
struct StorePanel {
  float* panel;  // [column][kBlock]

  EXL_INLINE void take(int64_t position, const Lanes<P>* weight) {
    EXL_UNROLL for (int c = 0; c < kColumns; ++c) weight[c].store(panel + c * kBlock + position);
  }
};

// Spans of one width, from stream `codes` and block position `position` on. first_group: the group of scales[0].
template <class I, int bits, class Sink>
void decode_spans(const uint8_t* codes, int64_t position, const Span* span, const Span* end, const float* scales,
                  const float* zeros, int64_t first_group, Sink& sink_state) {
  using P = typename I::Part;
  Sink sink = sink_state;  // a copy of our own lives in registers
  typename I::template Decoder<bits> column[kColumns];
  EXL_UNROLL for (int c = 0; c < kColumns; ++c) column[c].zero_at(float(1 << (bits - 1)));
  for (; span != end; ++span) {
    const int64_t at = (span->group - first_group) * kColumns;
    EXL_UNROLL for (int c = 0; c < kColumns; ++c) {
      if (zeros != nullptr) column[c].zero_at(zeros[at + c]);
      column[c].scale_by(scales[at + c]);
    }
    for (int32_t step = 0; step < span->steps; ++step) {
      Lanes<P> weight[kColumns];
      EXL_UNROLL for (int c = 0; c < kColumns; ++c) weight[c] = column[c].next(codes + c * step_bytes(bits));
      sink.take(position, weight);
      codes += kColumns * step_bytes(bits);
      position += kStepCodes;
    }
  }
  sink_state = sink;
}

template <class I, class Sink>
EXL_INLINE void decode_width(int bits, const uint8_t* codes, int64_t position, const Span* span, const Span* end,
                             const float* scales, const float* zeros, int64_t first_group, Sink& sink) {
  switch (bits) {
    case 2: return decode_spans<I, 2>(codes, position, span, end, scales, zeros, first_group, sink);
    case 3: return decode_spans<I, 3>(codes, position, span, end, scales, zeros, first_group, sink);
    case 4: return decode_spans<I, 4>(codes, position, span, end, scales, zeros, first_group, sink);
    case 5: return decode_spans<I, 5>(codes, position, span, end, scales, zeros, first_group, sink);
    case 6: return decode_spans<I, 6>(codes, position, span, end, scales, zeros, first_group, sink);
    case 8: return decode_spans<I, 8>(codes, position, span, end, scales, zeros, first_group, sink);
  }
}

// One block of one tile. `span` and `codes` are left at the next block. first_group: the group of scales[0].
template <class I, class Sink>
EXL_INLINE void decode_block(const Span*& span, const Span* last, const uint8_t*& codes, const float* scales,
                             const float* zeros, int64_t first_group, Sink& sink) {
  int64_t position = 0;
  while (span != last && position < kBlock) {
    const Span* begin = span;
    const int bits = begin->bits;
    int64_t steps = 0;
    do {
      steps += span->steps;
      ++span;
    } while (span != last && span->bits == bits && position + steps * kStepCodes < kBlock);
    decode_width<I>(bits, codes, position, begin, span, scales, zeros, first_group, sink);
    codes += steps * kColumns * step_bytes(bits);
    position += steps * kStepCodes;
  }
}

template <class I, int R>
void few_grouped_rows(const GroupedWeights& w, const PackedInput& x, float* y, int64_t first, int64_t last,
                      float* scratch) {
  using P = typename I::Part;
  float* scales = scratch;
  float* zeros = w.zeros != nullptr ? scratch + (w.groups + 4) * kColumns : nullptr;
  for (int64_t tile = first; tile < last; ++tile) {
    decode_scales<I>(w, tile, 0, w.groups, scales, zeros);
    float total[R][kColumns] = {};
    const Span* span = w.spans;
    const uint8_t* codes = w.codes + tile * w.tile_bytes;
    for (int64_t block = 0; block * kBlock < w.positions; ++block) {
      MultiplyRows<P, R> rows;
      rows.x = x.row(block, 0);
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        EXL_UNROLL for (int c = 0; c < kColumns; ++c) rows.sum[r][c] = Lanes<P>::zero();
      }
      decode_block<I>(span, w.spans + w.span_count, codes, scales, zeros, 0, rows);
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        float sums[kColumns];
        sums4(rows.sum[r], sums);
        EXL_UNROLL for (int c = 0; c < kColumns; ++c) total[r][c] = block ? total[r][c] + sums[c] : sums[c];
      }
    }
    const int64_t column = tile * kColumns;
    const int64_t live = w.outputs - column < kColumns ? w.outputs - column : kColumns;
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < live; ++c) y[r * w.outputs + column + c] = total[r][c];
    }
  }
}

template <class I>
void few_grouped(const GroupedWeights& w, const PackedInput& x, float* y, int64_t first, int64_t last, float* scratch) {
  switch (x.rows) {
    case 1: return few_grouped_rows<I, 1>(w, x, y, first, last, scratch);
    case 2: return few_grouped_rows<I, I::few_rows < 2 ? 1 : 2>(w, x, y, first, last, scratch);
    case 3: return few_grouped_rows<I, I::few_rows < 3 ? 1 : 3>(w, x, y, first, last, scratch);
    case 4: return few_grouped_rows<I, I::few_rows < 4 ? 1 : 4>(w, x, y, first, last, scratch);
  }
}

template <class I>
void fill_grouped(const GroupedWeights& w, int64_t block, int64_t first, int64_t last, float* panel, float* scratch) {
  const Span* begin = w.spans;
  int64_t offset = 0, position = 0;
  for (; position < block * kBlock; ++begin) {
    position += int64_t(begin->steps) * kStepCodes;
    offset += int64_t(begin->steps) * kColumns * step_bytes(begin->bits);
  }
  int64_t low = w.groups, high = 0;  // groups of this block
  position = 0;
  for (const Span* s = begin; s != w.spans + w.span_count && position < kBlock; ++s) {
    low = s->group < low ? s->group : low;
    high = s->group >= high ? s->group + 1 : high;
    position += int64_t(s->steps) * kStepCodes;
  }
  float* zeros = w.zeros != nullptr ? scratch + (w.groups + 4) * kColumns : nullptr;
  for (int64_t tile = first; tile < last; ++tile) {
    decode_scales<I>(w, tile, low, high, scratch, zeros);
    StorePanel<typename I::Part> store{panel + (tile - first) * kColumns * kBlock};
    const Span* span = begin;
    const uint8_t* codes = w.codes + tile * w.tile_bytes + offset;
    decode_block<I>(span, w.spans + w.span_count, codes, scratch, zeros, low, store);
  }
}

// The columns of a tile of a dense matrix from input k on; past the last one the last is repeated.
template <class T>
EXL_INLINE void dense_columns(const DenseWeights& w, int64_t tile, int64_t k, const T** columns) {
  for (int64_t c = 0; c < kColumns; ++c) {
    const int64_t column = tile * kColumns + c < w.outputs ? tile * kColumns + c : w.outputs - 1;
    columns[c] = static_cast<const T*>(w.weight) + column * w.inputs + k;
  }
}

// Calls f(first row, Constant<rows>) for register tiles that cover rows [begin, end), as even as they can be: 8 rows
// are 4 + 4, not 6 + 2.
template <class I, class F>
EXL_INLINE void each_row_tile(int64_t begin, int64_t end, const F& f) {
  constexpr int most = I::tile_rows;
  while (begin < end) {
    const int64_t left = end - begin, tiles = (left + most - 1) / most, take = (left + tiles - 1) / tiles;
    switch (take) {
      case 1: f(begin, Constant<1>()); break;
      case 2: f(begin, Constant<2>()); break;
      case 3: f(begin, Constant<(most < 3 ? 1 : 3)>()); break;
      case 4: f(begin, Constant<(most < 4 ? 1 : 4)>()); break;
      case 5: f(begin, Constant<(most < 5 ? 1 : 5)>()); break;
      case 6: f(begin, Constant<(most < 6 ? 1 : 6)>()); break;
    }
    begin += take;
  }
}

template <class I, class T>
void few_dense_type(const DenseWeights& w, const PackedInput& x, float* y, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    float total[kFewDenseTiles * I::tile_rows][kColumns];
    for (int64_t block = 0; block * kBlock < w.inputs; ++block) {
      const T* columns[kColumns];
      dense_columns(w, tile, block * kBlock, columns);
      const int64_t left = w.inputs - block * kBlock, length = left < kBlock ? left : kBlock;
      each_row_tile<I>(0, x.rows, [&](int64_t r, auto rows) {
        dot_tile<typename I::Part, decltype(rows)::value>(x.row(block, r), kBlock, columns, length, total[r], kColumns,
                                                          block != 0);
      });
    }
    const int64_t column = tile * kColumns;
    const int64_t live = w.outputs - column < kColumns ? w.outputs - column : kColumns;
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t c = 0; c < live; ++c) y[r * w.outputs + column + c] = total[r][c];
    }
  }
}

template <class I>
void few_dense(const DenseWeights& w, const PackedInput& x, float* y, int64_t first, int64_t last) {
  switch (w.dtype) {
    case Dtype::float32: return few_dense_type<I, float>(w, x, y, first, last);
    case Dtype::float16: return few_dense_type<I, Half>(w, x, y, first, last);
    case Dtype::bfloat16: return few_dense_type<I, BFloat16>(w, x, y, first, last);
  }
}

template <class I, class T>
void fill_dense_type(const DenseWeights& w, int64_t block, int64_t first, int64_t last, float* panel) {
  using L = Lanes<typename I::Part>;
  const int64_t left = w.inputs - block * kBlock, length = left < kBlock ? left : kBlock;
  for (int64_t tile = first; tile < last; ++tile) {
    const T* columns[kColumns];
    dense_columns(w, tile, block * kBlock, columns);
    for (int64_t c = 0; c < kColumns; ++c, panel += kBlock) {
      for (int64_t k = 0; k < length; k += 16) L::load_part(columns[c] + k, length - k).store(panel + k);
    }
  }
}

template <class I>
void fill_dense(const DenseWeights& w, int64_t block, int64_t first, int64_t last, float* panel) {
  switch (w.dtype) {
    case Dtype::float32: return fill_dense_type<I, float>(w, block, first, last, panel);
    case Dtype::float16: return fill_dense_type<I, Half>(w, block, first, last, panel);
    case Dtype::bfloat16: return fill_dense_type<I, BFloat16>(w, block, first, last, panel);
  }
}

// R rows against all tiles of a panel: the rows stay in the first-level cache while the panel passes by.
template <class I, int R>
void many_rows(const float* x, int64_t block, int64_t length, const float* panel, float* y, int64_t outputs,
               int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile, panel += kColumns * kBlock) {
    const float* columns[kColumns] = {panel, panel + kBlock, panel + 2 * kBlock, panel + 3 * kBlock};
    float* to = y + tile * kColumns;
    const int64_t live = outputs - tile * kColumns;
    if (live >= kColumns) {
      dot_tile<typename I::Part, R>(x, kBlock, columns, length, to, outputs, block != 0);
      continue;
    }
    float sums[R][kColumns];
    dot_tile<typename I::Part, R>(x, kBlock, columns, length, sums[0], kColumns, false);
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < live; ++c) to[r * outputs + c] = block ? to[r * outputs + c] + sums[r][c] : sums[r][c];
    }
  }
}

template <class I>
void many(const PackedInput& x, int64_t begin, int64_t end, int64_t block, int64_t length, const float* panel, float* y,
          int64_t outputs, int64_t first, int64_t last) {
  each_row_tile<I>(begin, end, [&](int64_t r, auto rows) {
    many_rows<I, decltype(rows)::value>(x.row(block, r), block, length, panel, y + r * outputs, outputs, first, last);
  });
}

template <class I>
constexpr LinearIsa linear_isa() {
  return {I::few_rows,     kFewDenseTiles * I::tile_rows, I::tile_rows, &few_grouped<I>, &few_dense<I>,
          &fill_grouped<I>, &fill_dense<I>,                &many<I>};
}

}  // namespace
}  // namespace exl
