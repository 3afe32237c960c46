// y = x @ W with the weights as a checkpoint stores them, dequantized in registers. No torch here.
//
//   x, y   float32, row-major, (rows, inputs) and (rows, outputs)
//   W      every weight is the half that the format defines, W = round_half((code - zero) * scale), bit for bit;
//          dense weights are their stored values. Products and sums are float32.
//
// Order of summation. The inputs are taken in the order they are stored in ("positions"), in blocks of kBlock. Inside a
// block lane l of 16 adds the products of positions l, l + 16, ... one after another (fused multiply-add where the CPU
// has it); the 16 sums are added by the tree of lanes.h; block sums are added in order. This order depends on nothing
// else, so a row's result is the same bits alone, in any batch, on any number of threads, on AVX2 and on AVX-512.
//
// reference: QuantFormat.dequantize and a float32 matmul      test: tests/ops/test_linear_cpu.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

constexpr int64_t kBlock = 512;    // positions summed before the tree
constexpr int64_t kTileColumns = 4;  // columns whose codes lie side by side
constexpr int64_t kCodePadding = 16;  // readable bytes before and after the codes

// A run of positions with one width and one group. Spans never cross a multiple of kBlock.
struct Span {
  int32_t bits;
  int32_t group;
  int32_t steps;  // of 16 positions
};

// A quantized matrix, repacked once at load (exl_runtime/ops/linear/tiles.py):
//
//   codes   [tile of 4 columns][step of 16 positions][column in tile][2 * bits bytes]: the column's own bit stream, cut
//           into steps; one tile is read from front to back
//   scales  [tile][group][column in tile]; two kinds, exactly one is set:
//             EXL2  scale_codes: 4-bit s - 1, column 0 lowest, one uint16 per tile and group;
//                   scale = round_half(s * s * maxima[4 * group])
//             GPTQ  scales: halves; zeros: halves (null: 2^(bits - 1) everywhere)
struct GroupedWeights {
  const uint8_t* codes;  // tile 0; kCodePadding more bytes are readable at both ends
  int64_t tile_bytes;
  const Span* spans;
  int64_t span_count;
  const int32_t* rows;  // which input stands at a position; -1: none, its product is 0
  int64_t positions;    // multiple of 16
  int64_t groups;
  int64_t inputs;
  int64_t outputs;
  const uint16_t* scale_codes;
  const float* maxima;  // 4 equal values per group, then 12 readable ones
  const uint16_t* scales;
  const uint16_t* zeros;
};

// A dense matrix as checkpoints store it: (outputs, inputs), row-major, one of three types.
struct DenseWeights {
  const void* weight;
  Dtype dtype;
  int64_t inputs;
  int64_t outputs;
};

void linear_grouped_cpu(const GroupedWeights& w, const float* x, float* y, int64_t rows);
void linear_dense_cpu(const DenseWeights& w, const float* x, float* y, int64_t rows);

}  // namespace exl
