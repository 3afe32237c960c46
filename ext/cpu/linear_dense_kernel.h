// The dense kernels, written once over an instruction set I. Included by linear_dense_<isa>.cpp only; internal linkage,
// see isa.h.
//
// I provides:  Part (lanes.h); tile_rows (at most 6); few_tiles: for so many register tiles of rows it is cheaper to
// widen the stored weights each time than to make a panel of wide ones.
#pragma once

#include "lanes.h"
#include "linear_dense_isa.h"
#include "linear_dense_short.h"

namespace exl {
namespace {

constexpr int kColumns = int(kDenseColumns);

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
void few_by_tiles(const DenseWeights& w, const DenseInput& x, float* y, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    float total[I::few_tiles * I::tile_rows][kColumns];
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

constexpr int kLinearBlocks = 32;  // the longest rows that it takes

// The sums of dot_tile, one column after another: the matrix is read from front to back, as memory likes it.
template <class I, class T, int R>
void few_in_line(const DenseWeights& w, const DenseInput& x, float* y, int64_t first, int64_t last) {
  using L = Lanes<typename I::Part>;
  L sums[kLinearBlocks][R][kColumns];
  for (int64_t tile = first; tile < last; ++tile) {
    const T* columns[kColumns];
    dense_columns(w, tile, 0, columns);
    const int64_t column = tile * kColumns;
    const int live = int(w.outputs - column < kColumns ? w.outputs - column : kColumns);
    for (int c = 0; c < kColumns; ++c) {
      const T* from = columns[c];
      int64_t left = w.inputs;
      for (int64_t block = 0; left > 0; ++block, left -= kBlock, from += kBlock) {
        const float* row = x.row(block, 0);
        const int64_t length = left < kBlock ? left : kBlock, whole = length / 16 * 16;
        L sum[R];
        EXL_UNROLL for (int r = 0; r < R; ++r) sum[r] = L::zero();
        for (int64_t k = 0; k < whole; k += 16) {
          const L weight = L::load(from + k);
          EXL_UNROLL for (int r = 0; r < R; ++r) sum[r] = fma(L::load(row + r * kBlock + k), weight, sum[r]);
        }
        if (whole < length) {
          const L weight = L::load_part(from + whole, length - whole);
          EXL_UNROLL for (int r = 0; r < R; ++r) sum[r] = fma(L::load(row + r * kBlock + whole), weight, sum[r]);
        }
        EXL_UNROLL for (int r = 0; r < R; ++r) sums[block][r][c] = sum[r];
      }
    }
    for (int r = 0; r < R; ++r) {
      float total[kColumns];
      for (int64_t block = 0; block * kBlock < w.inputs; ++block) {
        float four[kColumns];
        sums4(sums[block][r], four);
        for (int c = 0; c < kColumns; ++c) total[c] = block ? total[c] + four[c] : four[c];
      }
      for (int c = 0; c < live; ++c) y[r * w.outputs + column + c] = total[c];
    }
  }
}

template <class I, class T>
void few_type(const DenseWeights& w, const DenseInput& x, float* y, int64_t first, int64_t last) {
  if (w.inputs <= kShort && x.rows <= 3) {
    first = few_short<I, T>(w, x, y, first, last);
    if (first == last) return;
  }
  if (w.inputs <= kLinearBlocks * kBlock) {
    switch (x.rows) {
      case 1: return few_in_line<I, T, 1>(w, x, y, first, last);
      case 2: return few_in_line<I, T, 2>(w, x, y, first, last);
    }
  }
  few_by_tiles<I, T>(w, x, y, first, last);
}

template <class I>
void few(const DenseWeights& w, const DenseInput& x, float* y, int64_t first, int64_t last) {
  switch (w.dtype) {
    case Dtype::float32: return few_type<I, float>(w, x, y, first, last);
    case Dtype::float16: return few_type<I, Half>(w, x, y, first, last);
    case Dtype::bfloat16: return few_type<I, BFloat16>(w, x, y, first, last);
  }
}

template <class I, class T>
void fill_type(const DenseWeights& w, int64_t block, int64_t first, int64_t last, float* panel) {
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
void fill(const DenseWeights& w, int64_t block, int64_t first, int64_t last, float* panel) {
  switch (w.dtype) {
    case Dtype::float32: return fill_type<I, float>(w, block, first, last, panel);
    case Dtype::float16: return fill_type<I, Half>(w, block, first, last, panel);
    case Dtype::bfloat16: return fill_type<I, BFloat16>(w, block, first, last, panel);
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
void many(const DenseInput& x, int64_t begin, int64_t end, int64_t block, int64_t length, const float* panel, float* y,
          int64_t outputs, int64_t first, int64_t last) {
  each_row_tile<I>(begin, end, [&](int64_t r, auto rows) {
    many_rows<I, decltype(rows)::value>(x.row(block, r), block, length, panel, y + r * outputs, outputs, first, last);
  });
}

template <class I>
constexpr DenseIsa dense_isa() {
  return {I::few_tiles * I::tile_rows, I::tile_rows, &few<I>, &fill<I>, &many<I>};
}

}  // namespace
}  // namespace exl
