// out[r, c] = activation(gate[r, c]) * up[r, c]
//
//   gate, up  dtype, (rows, cols); each row contiguous, rows gate_stride and up_stride elements apart, so that the two
//             halves of one fused projection can be passed as they lie
//   out       dtype, (rows, cols) row-major; may be the memory of gate or up if their rows are `cols` apart
//
//   silu  x / (1 + e^-x)      gelu       x * Phi(x) (the exact one, with the error function)
//   relu  max(x, 0)           gelu_tanh  0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
//
// In float32 (activations within 5e-7 relative, more where they are vanishingly small), rounded once to dtype. An
// element's result does not depend on its place, the number of threads or the instruction set. NaN stays NaN.
// Reference: exl_runtime/ops/activation.py. Test: tests/ops/test_native_small.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

enum class Activation : int { silu, gelu, gelu_tanh, relu };

void gated(const void* gate, const void* up, void* out, Dtype dtype, int64_t rows, int64_t cols, int64_t gate_stride,
           int64_t up_stride, Activation activation);

}  // namespace exl
