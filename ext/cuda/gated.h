// out[r, c] = activation(gate[r, c]) * up[r, c]
//
//   gate, up  dtype, (rows, cols); each row contiguous, rows gate_stride and up_stride elements apart
//   out       out_dtype, which is dtype or float32, (rows, cols) row-major; may be the memory of gate or up where dtypes
//             agree and their rows are `cols` apart. float32 holds what float16 cannot: products of models made for
//             bfloat16 grow beyond its range, and the matrix behind scales such rows by itself
//
//   silu  x / (1 + e^-x)      gelu       x * Phi(x) (the exact one, with the error function)
//   relu  max(x, 0)           gelu_tanh  0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
//
// In float32, rounded once to out_dtype; no expression overflows where its result does not. NaN stays NaN.
// Reference: exl_runtime/ops/activation.py. Test: tests/cuda/test_rows.py
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "stream.h"

namespace exl {

enum class GatedActivation : int { silu, gelu, gelu_tanh, relu };

void gated_cuda(const void* gate, const void* up, Dtype dtype, void* out, Dtype out_dtype, int64_t rows, int64_t cols,
                int64_t gate_stride, int64_t up_stride, GatedActivation activation, cudaStream_t stream);

}  // namespace exl
