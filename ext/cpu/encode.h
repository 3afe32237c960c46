// The inner loops of the EXL2 quantizer: one group of rows that share a width and a row of scales.
//
//   rows     the group's rows, any number, in the order of quantization; tuned for up to 128
//   columns  independent of each other, any number
//   bits     2, 3, 4, 5, 6 or 8: codes c in -2^(bits-1) .. 2^(bits-1) - 1
//   scale    S >= 0, float32 holding a half
//
//   code of w at S   c = clamp(w / S rounded to the nearest integer, ties to even); 0 where S is 0
//   value of c at S  q = half(c * S): one rounding, subnormals kept, never -0
//
// Matrices are float32, row-major and contiguous; inputs must be finite; outputs do not overlap the inputs. Every
// column is computed by itself in one order, so neither the number of threads, nor the position of a column, nor AVX2
// against AVX-512 changes a bit. (The portable kernels round products before they add them, see lanes.h.)
//
// May throw std::bad_alloc. Reference: exl_runtime/ops/encode_reference.py. Test: tests/ops/test_encode.py.
#pragma once

#include <cstdint>

namespace exl {

struct EncodeShape {
  int64_t rows;
  int64_t columns;
  int bits;
};

// For each m of group_scales (candidates) and each column, the s in 1 .. 16 whose S = half(s * s * m) has the least
//   loss = sum_r row_weights[r] * (w[r] - q[r])^2, added in the order of r;
// the smallest such s. A loss that is not finite counts as infinity; where all are, s is 1.
//   w (rows, columns), row_weights (rows) >= 0  ->  codes, loss (candidates, columns)
void scale_search_cpu(const EncodeShape& shape, const float* w, const float* row_weights, const float* group_scales,
                      int64_t candidates, uint8_t* codes, float* loss);

// Error feedback (GPTQ): for r = 0, 1, ...: e[r] = (w[r] - q[r]) / u[r,r], then w[i] -= u[r,i] * e[r] for all i > r.
//   w (rows, columns), u (rows, rows) of which the upper triangle is read, scales (candidates, columns)
//   ->  loss (candidates, columns) = sum_r e[r]^2, infinity if not finite
void feedback_loss_cpu(const EncodeShape& shape, const float* w, const float* u, const float* scales,
                       int64_t candidates, float* loss);

// The same for one scale per column.  scales (columns)  ->  codes, q, errors = e, all (rows, columns)
void feedback_encode_cpu(const EncodeShape& shape, const float* w, const float* u, const float* scales, int8_t* codes,
                         float* q, float* errors);

// One sweep of coordinate descent: for r = 0, 1, ...: the code of q[r] + gradient[r] / h[r,r] gives new_q[r],
// delta[r] = q[r] - new_q[r], then gradient[i] += h[r,i] * delta[r] for all i > r.
// Rows with h[r,r] <= 0 keep their value; their code is that of q[r].
//   q, gradient (rows, columns), h (rows, rows) symmetric, of which the upper triangle is read, scales (columns)
//   ->  codes, new_q, delta (rows, columns)
void descend_cpu(const EncodeShape& shape, const float* q, const float* gradient, const float* h, const float* scales,
                 int8_t* codes, float* new_q, float* delta);

}  // namespace exl
