#include "skinny_stage.h"

#include "exl_cuda.h"
#include "ptx.h"

namespace exl {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// The power of two 2^e with largest * 2^e in [2^14, 2^15), clamped so that it and its inverse are normal numbers.
__device__ __forceinline__ int exponent_for(float largest) {
  const int biased = int(__float_as_uint(largest) >> 23);  // 0 for zero and subnormals, 255 for infinity and NaN
  if (biased == 255 || largest == 0.0f) return 0;
  const int wanted = 14 - (biased - 127);
  return min(max(wanted, -120), 120);
}

__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(unsigned(e + 127) << 23); }

// grid (pieces of a row, m). Half input needs no factor, so a row may be cut in any number of pieces; otherwise one.
template <class T>
__global__ void __launch_bounds__(kThreads) stage(const T* x, const int32_t* rows, uint4* staged, float* factors,
                                                  int64_t m, int64_t inputs, int64_t units) {
  constexpr bool kCopy = sizeof(T) == 2 && !std::is_same<T, __nv_bfloat16>::value;
  EXL_SHARED(float, warp_most, [kThreads / 32]);
  ptx::grid_launch_dependents();  // the product fetches weights already while the kernel before this one ends
  ptx::grid_wait();
  const int64_t row = blockIdx.y;
  const T* from = x + row * inputs;
  float factor = 1.0f;
  if (!kCopy) {
    float most = 0.0f;
    bool bad = false;
    for (int64_t k = threadIdx.x; k < inputs; k += kThreads) {
      const float v = fabsf(to_float(from[k]));
      bad = bad || !(v <= 3.402823466e38f);
      most = fmaxf(most, v);
    }
    if (bad) most = __uint_as_float(0x7f800000u);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    if ((threadIdx.x & 31) == 0) warp_most[threadIdx.x >> 5] = most;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) most = fmaxf(most, warp_most[w]);
    const int e = exponent_for(most);
    factor = power_of_two(e);
    if (threadIdx.x == 0) factors[row] = power_of_two(-e);
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    factors[row] = 1.0f;
  }
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < units * 4; i += step) {
    const int64_t unit = i >> 2;
    const int t = int(i & 3);
    uint32_t packed[4];
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t position = unit * 32 + 8 * o + 2 * t + e;
        int64_t k = position;
        if (rows != nullptr) k = rows[position];
        __half v = __ushort_as_half(0);
        if (k >= 0 && k < inputs) v = __float2half_rn(to_float(from[k]) * factor);
        word |= uint32_t(__half_as_ushort(v)) << (16 * e);
      }
      packed[o] = word;
    }
    staged[(unit * m + row) * 4 + t] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

template <class T>
void launch_stage(const void* x, const int32_t* rows, void* staged, float* factors, int64_t m, int64_t inputs,
                  int64_t units, bool one_piece, cudaStream_t stream) {
  const int64_t pieces = one_piece ? 1 : (units * 4 + kThreads - 1) / kThreads;
  EXL_LAUNCH_PDL((stage<T>), dim3(unsigned(pieces), unsigned(m)), dim3(kThreads), 0, stream, static_cast<const T*>(x),
                 rows, static_cast<uint4*>(staged), factors, m, inputs, units);
}

}  // namespace

void skinny_stage_cuda(const void* x, Dtype dtype, const int32_t* rows, void* staged, float* factors, int64_t m,
                       int64_t inputs, int64_t units, cudaStream_t stream) {
  if (m == 0 || units == 0) return;
  switch (dtype) {
    case Dtype::float16:
      return launch_stage<__half>(x, rows, staged, factors, m, inputs, units, false, stream);
    case Dtype::bfloat16:
      return launch_stage<__nv_bfloat16>(x, rows, staged, factors, m, inputs, units, true, stream);
    case Dtype::float32:
      return launch_stage<float>(x, rows, staged, factors, m, inputs, units, true, stream);
  }
}

}  // namespace exl
