// y[r, c] = x[r, c] / sqrt(mean_c(x[r, :]^2) + eps) * (weight[c] + offset)
//
//   x, y     dtype, (rows, cols) row-major; may be the same memory
//   weight   float32 (cols)
//   eps      added to the mean square, before the root
//   offset   0, or 1 for models whose checkpoints store weight - 1
//
// The mean is taken in double, the rest in float32, rounded once to dtype. A row's result does not depend on the other
// rows, the number of threads or the instruction set.
// Reference: exl_runtime/ops/norm.py. Test: tests/ops/test_native_small.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

void rms_norm(const void* x, const float* weight, void* y, Dtype dtype, int64_t rows, int64_t cols, float eps,
              float offset);

// x += more, then y = x normed, both float32; y may be the memory of more. The same bits as an addition and rms_norm.
void add_rms_norm(float* x, const float* more, const float* weight, float* y, int64_t rows, int64_t cols, float eps,
                  float offset);

}  // namespace exl
