// The activations of gated MLPs, float32. Both kernels that gate use these, so that they agree bit for bit.
// Reference: exl_runtime/ops/activation.py. Test: tests/cuda/test_rows.py, tests/cuda/test_skinny.py
#pragma once

#include "exl_cuda.h"

namespace exl {

__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + expf(-x));  // e^88 and beyond: x / inf is 0, as wanted
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * erfcf(-0.707106781f * x);  // erfc: no cancellation
}

__device__ __forceinline__ float gelu_tanh(float x) {
  // 0.5 (1 + tanh y) is 1 / (1 + e^-2y): no cancellation where the result is small.
  const float y = 0.797884561f * fmaf(0.044715f * x * x, x, x);
  return x / (1.0f + expf(-2.0f * y));
}

__device__ __forceinline__ float relu(float x) {
  return x < 0.0f ? 0.0f : x;  // NaN stays
}

}  // namespace exl
