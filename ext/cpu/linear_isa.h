// What linear.cpp asks of an instruction set: a table of functions, one table per linear_<isa>.cpp. No threads here.
#pragma once

#include <cstdint>

#include "linear.h"

namespace exl {

// The input as the kernels read it: [block][row][kBlock], positions in order, zeros behind the last one.
struct PackedInput {
  const float* data;
  int64_t rows;
  const float* row(int64_t block, int64_t r) const { return data + (block * rows + r) * kBlock; }
};

struct LinearIsa {
  int few_grouped_rows;  // the most rows that few_grouped takes
  int few_dense_rows;
  int tile_rows;  // rows of a register tile of `many`

  // Few rows: weights go from their stored form straight into the sums. Tiles [first, last) of all rows of x.
  // scratch: (2 * groups + 8) * 4 floats.
  void (*few_grouped)(const GroupedWeights&, const PackedInput& x, float* y, int64_t first, int64_t last,
                      float* scratch);
  void (*few_dense)(const DenseWeights&, const PackedInput& x, float* y, int64_t first, int64_t last);

  // Many rows: float32 weights of `block` for tiles [first, last) into panel [tile][column][kBlock], then `many`
  // multiplies rows [begin, end) of x with the panel, writing (block 0) or adding to their columns of y.
  void (*fill_grouped)(const GroupedWeights&, int64_t block, int64_t first, int64_t last, float* panel, float* scratch);
  void (*fill_dense)(const DenseWeights&, int64_t block, int64_t first, int64_t last, float* panel);
  void (*many)(const PackedInput& x, int64_t begin, int64_t end, int64_t block, int64_t length, const float* panel,
               float* y, int64_t outputs, int64_t first, int64_t last);
};

const LinearIsa& linear_portable();
const LinearIsa& linear_avx2();
const LinearIsa& linear_avx512();

}  // namespace exl
