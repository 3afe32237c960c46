// y = x @ W for one or several matrices (tile.h) with the same input, 1 to 256 rows of x. Weights are the A operand of
// the tensor cores and stream through shared memory once; accumulators are fp32.
//
//   up to 32 rows    codes go into the multiplication unscaled (exact); a group's sum is scaled in fp32. Weights are not
//                    rounded as the formats do; the error is that of summing in fp32. A row's result is the same bits in
//                    any batch of up to 32 rows.
//   33 to 256 rows   weights are the formats' own, rounded to half; rows go in blocks of 64. A row's result does not
//                    depend on the others, but differs in rounding from that of up to 32 rows.
//
// The work is cut beforehand (plan): the units of all tile columns of all matrices in one row, cut into pieces of equal
// bytes, one for each block of threads. A piece is a list of segments, each within one group of `columns` tile columns.
// Where several segments share a column group, each leaves its sums in `partials`; the last to arrive adds them in
// order. The order is fixed by the plan, so results are reproducible to the bit.
//
// With a gate, two matrices with the same inputs and outputs become one result, activation(x @ W0) * (x @ W1): half of
// the warps of a block work on columns of the one, half on the same columns of the other.
//
//   silu  x / (1 + e^-x)      gelu       x * Phi(x) (the exact one, with the error function)
//   relu  max(x, 0)           gelu_tanh  0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
//
//   staged, factors   skinny_stage.h, of m rows
//   segments, first   block b of threads works on segments first[b] .. first[b + 1] - 1. With a gate they are those of
//                     matrix 0, each of half as many tile columns
//   partials          float [row blocks][slots][64 or 128 columns][kSkinnyRows or kGemmRows]
//   tickets           int32 [row blocks][slots], zero; zero again afterwards
//
// reference: float64 matmul with dequantize        test: tests/cuda/test_skinny.py, tests/cuda/test_gemm.py
#pragma once

#include "../common/half.h"
#include "stream.h"
#include "tile.h"

namespace exl {

constexpr int kMostMatrices = 8;  // in one launch
constexpr int kSkinnyRows = 32, kSkinnyColumns = 2;  // rows at most; tile columns of a block of threads
constexpr int kGemmRows = 64, kGemmColumns = 4;      // rows of a row block
constexpr int kMostGemmRows = 256;

enum class Gate : int32_t { none, silu, gelu, gelu_tanh, relu };

struct Segment {
  int32_t matrix;
  int32_t column;      // the first tile column
  int32_t begin, end;  // units
  int32_t piece, pieces;
  int32_t slot;  // of piece 0 of this column group
  int32_t unused;
};

struct LinearOutput {
  void* y;           // dtype (m, outputs), unless `stream` is given
  const void* bias;  // half (outputs), or null
  float* stream;     // float (m, outputs), the result is added to it; or null
  Dtype dtype;
};

struct LinearWork {
  CudaMatrix matrix[kMostMatrices];
  LinearOutput output[kMostMatrices];
  const Segment* segments;
  const int32_t* first;
  const void* staged;
  const float* factors;
  float* partials;
  int32_t* tickets;
  int32_t blocks;  // of threads
  int32_t slots;
  int32_t m;
  int32_t slot_bytes;  // of the ring: the widest tile and a scale record
  Gate gate;           // the result goes to output[0], without bias and stream
};

void skinny_cuda(const LinearWork& work, cudaStream_t stream);  // m of 1 to 32, segments of kSkinnyColumns
void gemm_cuda(const LinearWork& work, cudaStream_t stream);    // m of 1 to 256, segments of kGemmColumns

}  // namespace exl
