#include "norm.h"

#include <type_traits>

#include "element.cuh"
#include "ptx.h"

namespace exl {
namespace {

constexpr int kWarps = 8;      // of a block
constexpr int kNarrow = 512;   // up to so many columns one warp takes a row of its own: the heads of q and k
constexpr float kLeast = 1e-30f, kMost = 1e37f;  // of a float32 sum of squares that lost nothing

// The rows of a block: one, or one for every warp. x is written only where there is a delta.
template <int WARPS_PER_ROW, bool ADD, class X, class D, class Y>
__global__ void __launch_bounds__(kWarps * 32, 4)
    row_norm(X* x, const D* __restrict__ delta, const float* __restrict__ weight,
             const int32_t* __restrict__ order, Y* y, int64_t rows, int cols, float eps, float offset) {
  EXL_SHARED(double, parts, [kWarps]);
  ptx::grid_launch_dependents();  // a product that follows fetches weights meanwhile, and waits for this one
  constexpr int step = WARPS_PER_ROW * 32;
  const int64_t row = WARPS_PER_ROW == 1 ? int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5) : int64_t(blockIdx.x);
  const int first = WARPS_PER_ROW == 1 ? int(threadIdx.x & 31) : int(threadIdx.x);
  if (row >= rows) return;  // a whole warp, and only where no barrier follows
  X* in = x + row * cols;
  Y* out = y + row * cols;

  float sum = 0.0f;
  if constexpr (ADD) {
    const D* more = delta + row * cols;
    for (int c = first; c < cols; c += step) {
      const float value = read(in + c) + read(more + c);
      write(in + c, value);
      sum = fmaf(value, value, sum);
    }
  } else {
    for (int c = first; c < cols; c += step) {
      const float value = read(in + c);
      sum = fmaf(value, value, sum);
    }
  }
  float* narrow_parts = reinterpret_cast<float*>(&parts[0]);
  sum = over_block<WARPS_PER_ROW>(sum, narrow_parts, Sum{});
  // A warp's lanes read what its other lanes wrote, when there is an order and no barrier of the block.
  if constexpr (ADD && WARPS_PER_ROW == 1) __syncwarp();

  float factor = 0.0f;
  if (sum >= kLeast && sum <= kMost) {
    factor = 1.0f / sqrtf(sum / float(cols) + eps);
  } else {  // the same branch for all: every thread has the same sum
    double wide = 0.0;
    for (int c = first; c < cols; c += step) {
      const double value = read(in + c);
      wide = fma(value, value, wide);
    }
    wide = over_block<WARPS_PER_ROW>(wide, &parts[0], Sum{});
    factor = float(1.0 / sqrt(wide / double(cols) + double(eps)));
  }
  for (int c = first; c < cols; c += step) {
    const int from = order == nullptr ? c : order[c];
    write(out + c, read(in + from) * factor * (weight[from] + offset));
  }
}

template <bool ADD, class X, class D, class Y>
void launch(X* x, const D* delta, const float* weight, const int32_t* order, Y* y, int64_t rows,
            int64_t cols, float eps, float offset, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return;
  if (cols <= kNarrow) {
    const unsigned blocks = unsigned((rows + kWarps - 1) / kWarps);
    EXL_LAUNCH((row_norm<1, ADD, X, D, Y>), dim3(blocks), dim3(kWarps * 32), 0, stream, x, delta, weight, order, y,
               rows, int(cols), eps, offset);
  } else {
    EXL_LAUNCH((row_norm<kWarps, ADD, X, D, Y>), dim3(unsigned(rows)), dim3(kWarps * 32), 0, stream, x, delta, weight,
               order, y, rows, int(cols), eps, offset);
  }
}

}  // namespace

void rms_norm_cuda(const void* x, Dtype x_dtype, const float* weight, const int32_t* order, void* y, Dtype y_dtype,
                   int64_t rows, int64_t cols, float eps, float offset, cudaStream_t stream) {
  with_dtype(x_dtype, [&](auto* x_type) {
    using X = std::remove_pointer_t<decltype(x_type)>;
    with_dtype(y_dtype, [&](auto* y_type) {
      using Y = std::remove_pointer_t<decltype(y_type)>;
      launch<false>(static_cast<X*>(const_cast<void*>(x)), static_cast<const float*>(nullptr), weight, order, static_cast<Y*>(y), rows, cols, eps, offset,
                    stream);
    });
  });
}

void add_rms_norm_cuda(float* x, const void* delta, Dtype delta_dtype, const float* weight, const int32_t* order, void* y,
                       Dtype y_dtype, int64_t rows, int64_t cols, float eps, float offset, cudaStream_t stream) {
  with_dtype(delta_dtype, [&](auto* delta_type) {
    using D = std::remove_pointer_t<decltype(delta_type)>;
    with_dtype(y_dtype, [&](auto* y_type) {
      using Y = std::remove_pointer_t<decltype(y_type)>;
      launch<true>(x, static_cast<const D*>(delta), weight, order, static_cast<Y*>(y), rows, cols, eps, offset,
                   stream);
    });
  });
}

}  // namespace exl
