// registers: gated_rows 48, gated_scaled_rows 48
#include "gated.h"

#include <type_traits>

#include "element.cuh"

namespace exl {
namespace {

constexpr int kThreads = 256;
constexpr float kHalfRoom = 32768.0f;  // a power of two below the largest float16, with room for rounding

template <GatedActivation A>
__device__ __forceinline__ float activate(float x) {
  if constexpr (A == GatedActivation::silu) return x / (1.0f + expf(-x));  // e^88 and beyond: x / inf is 0, as wanted
  if constexpr (A == GatedActivation::gelu) return 0.5f * x * erfcf(-0.707106781f * x);  // erfc: no cancellation
  if constexpr (A == GatedActivation::gelu_tanh) {
    // 0.5 (1 + tanh y) is 1 / (1 + e^-2y): no cancellation where the result is small.
    const float y = 0.797884561f * fmaf(0.044715f * x * x, x, x);
    return x / (1.0f + expf(-2.0f * y));
  }
  return x < 0.0f ? 0.0f : x;  // NaN stays
}

template <GatedActivation A, class T>
__global__ void __launch_bounds__(kThreads)
    gated_rows(const T* gate, const T* up, T* out, int64_t count, int64_t cols, int64_t gate_stride,
               int64_t up_stride) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / cols, column = i - row * cols;
  const float value = activate<A>(read(gate + row * gate_stride + column)) * read(up + row * up_stride + column);
  write(out + i, value);
}

// A block for each row. The values are computed twice: that costs less than keeping a row.
template <GatedActivation A, class T>
__global__ void __launch_bounds__(kThreads)
    gated_scaled_rows(const T* gate, const T* up, T* out, float* scale, int cols, int64_t gate_stride,
                      int64_t up_stride) {
  EXL_SHARED(float, parts, [kThreads / 32]);
  const int64_t row = blockIdx.x;
  const T* g = gate + row * gate_stride;
  const T* u = up + row * up_stride;
  float largest = 0.0f;
  for (int c = threadIdx.x; c < cols; c += kThreads) {
    const float size = fabsf(activate<A>(read(g + c)) * read(u + c));
    largest = size > largest ? size : largest;
  }
  largest = over_block<kThreads / 32>(largest, &parts[0], Largest{});
  int power = 0;
  if (largest > kHalfRoom && largest <= 3.4028235e38f) {
    (void)frexpf(largest / kHalfRoom, &power);  // largest / room = m * 2^power with 0.5 <= m < 1
  }
  const float factor = ldexpf(1.0f, -power);
  for (int c = threadIdx.x; c < cols; c += kThreads) {
    write(out + row * cols + c, activate<A>(read(g + c)) * read(u + c) * factor);
  }
  if (threadIdx.x == 0) scale[row] = ldexpf(1.0f, power);
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

void gated_cuda(const void* gate, const void* up, void* out, Dtype dtype, int64_t rows, int64_t cols,
                int64_t gate_stride, int64_t up_stride, GatedActivation activation, cudaStream_t stream) {
  const int64_t count = rows * cols;
  if (count == 0) return;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_activation(activation, [&](auto tag) {
      constexpr GatedActivation A = decltype(tag)::value;
      EXL_LAUNCH((gated_rows<A, T>), dim3(unsigned((count + kThreads - 1) / kThreads)), dim3(kThreads), 0, stream,
                 static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), count, cols, gate_stride,
                 up_stride);
    });
  });
}

void gated_scaled_cuda(const void* gate, const void* up, void* out, float* scale, Dtype dtype, int64_t rows,
                       int64_t cols, int64_t gate_stride, int64_t up_stride, GatedActivation activation,
                       cudaStream_t stream) {
  if (rows == 0) return;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_activation(activation, [&](auto tag) {
      constexpr GatedActivation A = decltype(tag)::value;
      EXL_LAUNCH((gated_scaled_rows<A, T>), dim3(unsigned(rows)), dim3(kThreads), 0, stream,
                 static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(out), scale, int(cols),
                 gate_stride, up_stride);
    });
  });
}

}  // namespace exl
