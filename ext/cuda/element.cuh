// Reading and writing elements of any float dtype as float32, sums over a block in a fixed order, and the choice of a
// template by dtype. For kernels that work on rows.
#pragma once

#include "../common/half.h"
#include "exl_cuda.h"

namespace exl {
namespace {

__device__ __forceinline__ float read(const float* p) { return *p; }
__device__ __forceinline__ float read(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ float read(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ __forceinline__ void write(float* p, float value) { *p = value; }
__device__ __forceinline__ void write(__half* p, float value) { *p = __float2half(value); }
__device__ __forceinline__ void write(__nv_bfloat16* p, float value) { *p = __float2bfloat16(value); }

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {  // NaN loses here: whoever cares looks for it
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// The same bits in every lane: each step combines two values that both partners see, and a + b is b + a.
template <class T, class Combine>
__device__ __forceinline__ T over_warp(T value, Combine combine) {
  for (int distance = 16; distance > 0; distance >>= 1) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Over the WARPS warps of a block, in `parts` (shared, WARPS elements); ends with everybody having read it.
template <int WARPS, class T, class Combine>
__device__ __forceinline__ T over_block(T value, T* parts, Combine combine) {
  value = over_warp(value, combine);
  if constexpr (WARPS > 1) {
    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
    __syncthreads();
    value = parts[0];
    for (int w = 1; w < WARPS; ++w) value = combine(value, parts[w]);
    __syncthreads();
  }
  return value;
}

// f(pointer of the element type); the pointer is null, only its type matters.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(nullptr));
    case Dtype::float16: return f(static_cast<__half*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace
}  // namespace exl
