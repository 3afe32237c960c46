#include "rope.h"

#include "row_kernels.h"
#include "threads.h"

namespace exl {

void rope(void* x, Dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim, int64_t token_stride,
          int64_t rotary_dim, const float* cos, const float* sin) {
  if (heads == 0 || rotary_dim == 0) return;
  const RowKernels& kernels = row_kernels();
  const int64_t stride_bytes = token_stride * element_bytes(dtype), half = rotary_dim / 2;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.rope(static_cast<char*>(x) + t * stride_bytes, dtype, heads, head_dim, rotary_dim, cos + t * half,
                   sin + t * half);
    }
  };
  parallel_for(tokens, body, 1 + 32768 / (heads * rotary_dim));
}

}  // namespace exl
