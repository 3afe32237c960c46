#include "rms_norm.h"

#include "row_kernels.h"
#include "threads.h"

namespace exl {

void rms_norm(const void* x, const float* weight, void* y, Dtype dtype, int64_t rows, int64_t cols, float eps,
              float offset) {
  if (cols == 0) return;
  const RowKernels& kernels = row_kernels();
  const int64_t row_bytes = cols * element_bytes(dtype);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels.rms_norm(static_cast<const char*>(x) + r * row_bytes, weight, static_cast<char*>(y) + r * row_bytes,
                       dtype, cols, eps, offset);
    }
  };
  parallel_for(rows, body, 1 + 32768 / cols);
}

void add_rms_norm(float* x, const float* more, const float* weight, float* y, int64_t rows, int64_t cols, float eps,
                  float offset) {
  if (cols == 0) return;
  const RowKernels& kernels = row_kernels();
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels.add_norm(x + r * cols, more + r * cols, weight, y + r * cols, cols, eps, offset);
    }
  };
  parallel_for(rows, body, 1 + 32768 / cols);
}

}  // namespace exl
