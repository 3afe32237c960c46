// y = x @ W with dense weights as a checkpoint stores them, widened in registers. No torch here.
//
//   x, y   float32, row-major, (rows, inputs) and (rows, outputs)
//   W      (outputs, inputs), row-major: each weight is its stored value. Products and sums are float32.
//
// Order of summation: inputs in blocks of kBlock. Inside a block lane l of 16 adds the products of inputs l, l + 16,
// ... one after another (fused multiply-add where the CPU has it); the 16 sums are added by the tree of lanes.h; block
// sums are added in order. This order depends on nothing else, so a row's result is the same bits alone, in any batch,
// on any number of threads, on AVX2 and on AVX-512.
//
// reference: a float32 matmul      test: tests/ops/test_linear_dense.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

struct DenseWeights {
  const void* weight;
  Dtype dtype;
  int64_t inputs;
  int64_t outputs;
};

void linear_dense_cpu(const DenseWeights& w, const float* x, float* y, int64_t rows);

}  // namespace exl
