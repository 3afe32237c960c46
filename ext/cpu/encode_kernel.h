// The bodies behind encode_isa.h, as templates over an instruction set I:
//
//   I::Part          one register of columns (lanes.h); columns never meet, so no reductions
//   I::registers     of columns taken together, so that one broadcast of the matrix serves them all
//   I::block         rows whose sums are kept in registers at a time
//
// Row i is start[i] + matrix[0,i] * moves[0] + matrix[1,i] * moves[1] + ..., added in this order whatever the blocks.
// Include it from encode_<isa>.cpp only.
#pragma once

#include <limits>

#include "encode_isa.h"
#include "lanes.h"

namespace exl {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();

template <class P>
EXL_INLINE P finite_or_infinity(P x) {
  return below(x, P::all(kInfinite), x, P::all(kInfinite));
}

// What to divide by: the scale; infinity in place of zero, so that the code is 0.
template <class P>
EXL_INLINE P divisor_of(P scale) {
  return below(P::all(0.0f), scale, scale, P::all(kInfinite));
}

// The codes of one width.
template <class P>
struct CodeRange {
  P low, high;

  explicit EXL_INLINE CodeRange(int bits)
      : low(P::all(-float(1 << (bits - 1)))), high(P::all(float((1 << (bits - 1)) - 1))) {}

  // Clamping comes first, which gives the same because the limits are integers. What is left is so small that adding
  // 1.5 * 2^23 pushes the fraction out of the mantissa: the addition itself rounds to nearest, ties to even.
  EXL_INLINE P code(P w, P divisor) const {
    const P shift = P::all(12582912.0f), ratio = maximum(w / divisor, low);
    return (below(ratio, high, ratio, high) + shift) - shift;
  }
};

template <class P>
EXL_INLINE bool any_at_most(P x, P limit) {
  float a[P::width], b[P::width];
  x.store(a), limit.store(b);
  bool any = false;
  for (int i = 0; i < P::width; ++i) any |= a[i] <= b[i];
  return any;
}

// From the coarsest scale down: the best one comes early, and the ones below it clip so hard that they are given up
// after a few rows. Sums only grow, so one that is above the best so far in every column has lost.
template <class P>
void search_columns(const float* w, const float* row_weights, const float* scales, int64_t rows, int bits, float* codes,
                    float* loss) {
  constexpr int64_t kRowsBetweenLooks = 16;
  const CodeRange<P> range(bits);
  P best = P::all(kInfinite), best_code = P::all(1.0f);
  for (int s = 16; s >= 1; --s) {
    const P scale = P::all(scales[s - 1]), divisor = divisor_of(scale);
    P sum = P::all(0.0f);
    bool lost = false;
    for (int64_t first = 0; first < rows && !lost; first += kRowsBetweenLooks) {
      const int64_t end = first + kRowsBetweenLooks < rows ? first + kRowsBetweenLooks : rows;
      for (int64_t r = first; r < end; ++r) {
        const P x = P::load(w + r * kEncodeColumns);
        const P error = x - round_half(range.code(x, divisor) * scale);
        sum = fma(P::all(row_weights[r]) * error, error, sum);
      }
      lost = !any_at_most(sum, best);
    }
    if (lost) continue;
    sum = finite_or_infinity(sum);
    best_code = below(best, sum, best_code, P::all(float(s)));  // among equals the smaller one
    best = below(best, sum, best, sum);
  }
  below(best, P::all(kInfinite), best_code, P::all(1.0f)).store(codes);
  best.store(loss);
}

template <class I>
void search_tile(const float* w, const float* row_weights, const float* scales, int64_t rows, int bits, float* codes,
                 float* loss) {
  using P = typename I::Part;
  for (int64_t c = 0; c < kEncodeColumns; c += P::width) {
    search_columns<P>(w + c, row_weights, scales, rows, bits, codes + c, loss + c);
  }
}

// How a row becomes a code, for the registers of columns from `first` on. `row` also stores what the tile asks for.
template <class I, bool keep>
struct Feedback {
  using P = typename I::Part;
  const EncodeTile& tile;
  const int64_t first;
  const CodeRange<P> range;
  P scale[I::registers], divisor[I::registers], loss[I::registers];

  EXL_INLINE Feedback(const EncodeTile& t, int64_t column) : tile(t), first(column), range(t.bits) {
    EXL_UNROLL for (int i = 0; i < I::registers; ++i) {
      scale[i] = P::load(tile.scales + first + i * P::width);
      divisor[i] = divisor_of(scale[i]);
      loss[i] = P::all(0.0f);
    }
  }
  EXL_INLINE P row(int64_t r, int i, P x) {
    const P code = range.code(x, divisor[i]), value = round_half(code * scale[i]);
    const P move = (value - x) / P::all(tile.matrix[r * tile.rows + r]);
    if (keep) {
      const int64_t at = r * kEncodeColumns + first + i * P::width;
      code.store(tile.codes + at), value.store(tile.values + at);
    } else {
      loss[i] = fma(move, move, loss[i]);
    }
    return move;
  }
  EXL_INLINE void finish() const {
    if (keep) return;
    EXL_UNROLL for (int i = 0; i < I::registers; ++i) {
      finite_or_infinity(loss[i]).store(tile.loss + first + i * P::width);
    }
  }
};

template <class I>
struct Descent {
  using P = typename I::Part;
  const EncodeTile& tile;
  const int64_t first;
  const CodeRange<P> range;
  P scale[I::registers], divisor[I::registers];

  EXL_INLINE Descent(const EncodeTile& t, int64_t column) : tile(t), first(column), range(t.bits) {
    EXL_UNROLL for (int i = 0; i < I::registers; ++i) {
      scale[i] = P::load(tile.scales + first + i * P::width);
      divisor[i] = divisor_of(scale[i]);
    }
  }
  EXL_INLINE P row(int64_t r, int i, P gradient) {
    const int64_t at = r * kEncodeColumns + first + i * P::width;
    const float curvature = tile.matrix[r * tile.rows + r];
    const P before = P::load(tile.q + at);
    P code, value;
    if (curvature > 0.0f) {
      code = range.code(before + gradient / P::all(curvature), divisor[i]);
      value = round_half(code * scale[i]);
    } else {
      code = range.code(before, divisor[i]);
      value = before;
    }
    code.store(tile.codes + at), value.store(tile.values + at);
    return before - value;
  }
  EXL_INLINE void finish() const {}
};

// Rows r .. r + B - 1, all rows before them being done.
template <class I, int B, class Rule>
EXL_INLINE void sweep_block(const EncodeTile& tile, int64_t first, int64_t r, Rule& rule) {
  using P = typename I::Part;
  constexpr int T = I::registers;
  P x[B][T];
  const float* start = tile.start + r * kEncodeColumns + first;
  EXL_UNROLL for (int b = 0; b < B; ++b) {
    EXL_UNROLL for (int i = 0; i < T; ++i) x[b][i] = P::load(start + b * kEncodeColumns + i * P::width);
  }
  const float* moves = tile.moves + first;
  const float* coefficients = tile.matrix + r;
  for (int64_t k = 0; k < r; ++k, moves += kEncodeColumns, coefficients += tile.rows) {
    P move[T];
    EXL_UNROLL for (int i = 0; i < T; ++i) move[i] = P::load(moves + i * P::width);
    EXL_UNROLL for (int b = 0; b < B; ++b) {
      const P coefficient = P::all(coefficients[b]);
      EXL_UNROLL for (int i = 0; i < T; ++i) x[b][i] = fma(coefficient, move[i], x[b][i]);
    }
  }
  float* out = tile.moves + r * kEncodeColumns + first;
  EXL_UNROLL for (int b = 0; b < B; ++b) {
    EXL_UNROLL for (int i = 0; i < T; ++i) {
      const P move = rule.row(r + b, i, x[b][i]);
      move.store(out + b * kEncodeColumns + i * P::width);
      EXL_UNROLL for (int later = b + 1; later < B; ++later) {
        x[later][i] = fma(P::all(coefficients[b * tile.rows + later]), move, x[later][i]);
      }
    }
  }
}

template <class I, class Rule>
EXL_INLINE void sweep(const EncodeTile& tile) {
  constexpr int64_t step = I::registers * I::Part::width;
  static_assert(kEncodeColumns % step == 0, "registers must divide a tile");
  for (int64_t first = 0; first < kEncodeColumns; first += step) {
    Rule rule(tile, first);
    int64_t r = 0;
    for (; r + I::block <= tile.rows; r += I::block) sweep_block<I, I::block>(tile, first, r, rule);
    for (; r < tile.rows; ++r) sweep_block<I, 1>(tile, first, r, rule);
    rule.finish();
  }
}

template <class I>
void feedback_tile(const EncodeTile& tile) {
  if (tile.codes == nullptr) {
    sweep<I, Feedback<I, false>>(tile);
  } else {
    sweep<I, Feedback<I, true>>(tile);
  }
}

template <class I>
void descend_tile(const EncodeTile& tile) {
  sweep<I, Descent<I>>(tile);
}

template <class I>
constexpr EncodeIsa encode_isa() {
  return {&search_tile<I>, &feedback_tile<I>, &descend_tile<I>};
}

}  // namespace
}  // namespace exl
