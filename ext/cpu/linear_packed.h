// y = x @ W for quantized matrices (tiles.h), with the input in 8-bit integers. No torch here.
//
// Every row of x is quantized once, in the order of positions, span by span (at most 128 positions):
//
//   scale = max |x| / 127,  main = round(x / scale)                                  x ~ scale * main
//   with the residual:      rest = round((x / scale - main) * 256), at most 127      x ~ scale * (main + rest / 256)
//
// The error is at most max |x| / 254 of a span, and max |x| / 32512 with the residual (half of that but for one number
// in 256). A span in which every |x| is below 1e-30 counts as zeros; one with NaN or infinity makes its whole row NaN.
// Spans are summed exactly in integers; then, span by span in order, per column:
//
//   sum = fma(float(integer sum), scale of W * scale of x, sum)
//
// On every instruction set, so a row's result is the same bits alone, in any batch, on any number of threads and on any
// x86 processor. Only `residual` changes it.
//
// reference: QuantFormat.dequantize and a matmul in float64      test: tests/ops/test_linear_packed.py
#pragma once

#include <cstdint>

#include "tiles.h"

namespace exl {

constexpr int kMostTogether = 8;

// A product of one input with one of several matrices.
struct Product {
  Packed w;
  float* y;  // (rows, outputs)
};

// x float32 (rows, inputs). At most kMostTogether products; those with the same signature share the quantized input,
// and all share one parallel region. residual_rows: batches of at most so many rows are computed with the residual.
void linear_packed_cpu(const Product* products, int count, const float* x, int64_t rows, int64_t residual_rows);

}  // namespace exl
