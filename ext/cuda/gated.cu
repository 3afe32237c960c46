#include "gated.h"

#include <type_traits>

#include "activation.cuh"
#include "element.cuh"
#include "ptx.h"

namespace exl {
namespace {

constexpr int kThreads = 256;

template <GatedActivation A>
__device__ __forceinline__ float activate(float x) {
  if constexpr (A == GatedActivation::silu) return silu(x);
  if constexpr (A == GatedActivation::gelu) return gelu(x);
  if constexpr (A == GatedActivation::gelu_tanh) return gelu_tanh(x);
  return relu(x);
}

template <GatedActivation A, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    gated_rows(const T* gate, const T* up, Out* out, int64_t count, int64_t cols, int64_t gate_stride,
               int64_t up_stride) {
  ptx::grid_launch_dependents();  // as in norm.cu
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / cols, column = i - row * cols;
  const float value = activate<A>(read(gate + row * gate_stride + column)) * read(up + row * up_stride + column);
  write(out + i, value);
}

template <class F>
void with_activation(GatedActivation activation, F f) {
  using A = GatedActivation;
  switch (activation) {
    case A::silu: return f(std::integral_constant<A, A::silu>{});
    case A::gelu: return f(std::integral_constant<A, A::gelu>{});
    case A::gelu_tanh: return f(std::integral_constant<A, A::gelu_tanh>{});
    case A::relu: return f(std::integral_constant<A, A::relu>{});
  }
}

}  // namespace

void gated_cuda(const void* gate, const void* up, Dtype dtype, void* out, Dtype out_dtype, int64_t rows, int64_t cols,
                int64_t gate_stride, int64_t up_stride, GatedActivation activation, cudaStream_t stream) {
  const int64_t count = rows * cols;
  if (count == 0) return;
  const dim3 grid(unsigned((count + kThreads - 1) / kThreads)), block(kThreads);
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_activation(activation, [&](auto tag) {
      constexpr GatedActivation A = decltype(tag)::value;
      const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
      if (out_dtype == dtype) {
        EXL_LAUNCH((gated_rows<A, T, T>), grid, block, 0, stream, g, u, static_cast<T*>(out), count, cols, gate_stride,
                   up_stride);
      } else {
        EXL_LAUNCH((gated_rows<A, T, float>), grid, block, 0, stream, g, u, static_cast<float*>(out), count, cols,
                   gate_stride, up_stride);
      }
    });
  });
}

}  // namespace exl
