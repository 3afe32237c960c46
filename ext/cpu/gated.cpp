#include "gated.h"

#include "row_kernels.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kBlock = 1024;      // a long row is cut, too
constexpr int64_t kPerThread = 2048;  // elements, about 2 us, in the middle of a chain of regions with a team awake

}  // namespace

void gated(const void* gate, const void* up, void* out, Dtype dtype, int64_t rows, int64_t cols, int64_t gate_stride,
           int64_t up_stride, Activation activation) {
  const RowKernels& kernels = row_kernels();
  const int64_t size = element_bytes(dtype), blocks = (cols + kBlock - 1) / kBlock;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r = task / blocks, c = task % blocks * kBlock;
      const int64_t count = cols - c < kBlock ? cols - c : kBlock;
      kernels.gated(static_cast<const char*>(gate) + (r * gate_stride + c) * size,
                    static_cast<const char*>(up) + (r * up_stride + c) * size,
                    static_cast<char*>(out) + (r * cols + c) * size, dtype, count, activation);
    }
  };
  parallel_for(rows * blocks, body, kPerThread / (cols < kBlock ? cols + 1 : kBlock));
}

}  // namespace exl
