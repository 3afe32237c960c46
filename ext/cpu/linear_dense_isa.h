// What linear_dense.cpp asks of an instruction set: one table per linear_dense_<isa>.cpp. No threads here.
#pragma once

#include <cstdint>

#include "linear_dense.h"

namespace exl {

constexpr int64_t kBlock = 512;       // inputs summed before the tree
constexpr int64_t kDenseColumns = 4;  // a tile: columns that are multiplied together

// The input as the kernels read it: [block][row][kBlock], zeros behind the last one up to a multiple of 16.
struct DenseInput {
  const float* data;
  int64_t rows;
  const float* row(int64_t block, int64_t r) const { return data + (block * rows + r) * kBlock; }
};

struct DenseIsa {
  int few_rows;   // the most rows that `few` takes
  int tile_rows;  // rows of a register tile of `many`

  // Few rows: weights go from their stored form straight into the sums. Tiles [first, last) of all rows of x.
  void (*few)(const DenseWeights&, const DenseInput& x, float* y, int64_t first, int64_t last);

  // Many rows: float32 weights of `block` for tiles [first, last) into panel [tile][column][kBlock], then `many`
  // multiplies rows [begin, end) of x with the panel, writing (block 0) or adding to their columns of y.
  void (*fill)(const DenseWeights&, int64_t block, int64_t first, int64_t last, float* panel);
  void (*many)(const DenseInput& x, int64_t begin, int64_t end, int64_t block, int64_t length, const float* panel,
               float* y, int64_t outputs, int64_t first, int64_t last);
};

const DenseIsa& linear_dense_portable();
const DenseIsa& linear_dense_avx2();
const DenseIsa& linear_dense_avx512();

}  // namespace exl
