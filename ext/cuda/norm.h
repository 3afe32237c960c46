// RMSNorm, alone and behind a residual addition.
//
//   rms_norm_cuda       y[r, c] = x[r, o] / sqrt(mean(x[r, :]^2) + eps) * (weight[o] + offset),  o = order[c], or c
//   add_rms_norm_cuda   x[r, :] += delta[r, :] first, then the same
//
//   x        x_dtype (rows, cols) row-major; float32 where it is added to, written in place
//   delta    delta_dtype (rows, cols) row-major
//   weight   float32 (cols)
//   order    int32 (cols), each within 0 to cols - 1, or null: the columns as they are
//   y        y_dtype (rows, cols) row-major; may be x where nothing is added, dtypes agree and order is null
//   eps      added to the mean square, before the root;   offset  0, or 1 for checkpoints that store weight - 1
//
// The sum of squares is taken in float32, in an order that depends on cols alone, and once more in float64 where it
// leaves the range of float32 at either end. A row's result does not depend on the other rows. cols up to 2^30.
// Reference: exl_runtime/ops/norm.py. Test: tests/cuda/test_rows.py
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "stream.h"

namespace exl {

void rms_norm_cuda(const void* x, Dtype x_dtype, const float* weight, const int32_t* order, void* y, Dtype y_dtype,
                   int64_t rows, int64_t cols, float eps, float offset, cudaStream_t stream);

void add_rms_norm_cuda(float* x, const void* delta, Dtype delta_dtype, const float* weight, const int32_t* order, void* y,
                       Dtype y_dtype, int64_t rows, int64_t cols, float eps, float offset, cudaStream_t stream);

}  // namespace exl
