// out[r, c] = activation(gate[r, c]) * up[r, c]
//
//   gate, up  dtype, (rows, cols); each row contiguous, rows gate_stride and up_stride elements apart
//   out       dtype, (rows, cols) row-major; may be the memory of gate or up if their rows are `cols` apart
//   scale     float32 (rows), written; see below
//
//   silu  x / (1 + e^-x)      gelu       x * Phi(x) (the exact one, with the error function)
//   relu  max(x, 0)           gelu_tanh  0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
//
// In float32, rounded once to dtype; no expression overflows where its result does not. NaN stays NaN.
// `gated_scaled_cuda` divides a row by scale[r] = 2^k, the least power of two from 1 up for which nothing in it exceeds
// 32768: products that models made for bfloat16 let grow beyond the range of float16 survive. Elsewhere scale is 1 and
// out is the same bits; a row with NaN or infinity has scale 1.
// Reference: exl_runtime/ops/activation.py. Test: tests/cuda/test_rows.py
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "stream.h"

namespace exl {

enum class GatedActivation : int { silu, gelu, gelu_tanh, relu };

void gated_cuda(const void* gate, const void* up, void* out, Dtype dtype, int64_t rows, int64_t cols,
                int64_t gate_stride, int64_t up_stride, GatedActivation activation, cudaStream_t stream);

void gated_scaled_cuda(const void* gate, const void* up, void* out, float* scale, Dtype dtype, int64_t rows,
                       int64_t cols, int64_t gate_stride, int64_t up_stride, GatedActivation activation,
                       cudaStream_t stream);

}  // namespace exl
