#include "embed.h"

#include <type_traits>

#include "element.cuh"

namespace exl {
namespace {

constexpr int kThreads = 256;

// grid (columns / kThreads, tokens)
template <class T>
__global__ void __launch_bounds__(kThreads)
    embed_rows(const int64_t* __restrict__ tokens, const T* __restrict__ table, float* __restrict__ out, int64_t vocab,
               int64_t cols, float scale) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= cols) return;
  const int64_t token = tokens[blockIdx.y];
  const bool known = token >= 0 && token < vocab;
  out[blockIdx.y * cols + column] = known ? read(table + token * cols + column) * scale : __int_as_float(0x7fc00000);
}

}  // namespace

void embed_cuda(const int64_t* tokens, const void* table, Dtype dtype, float* out, int64_t count, int64_t vocab,
                int64_t cols, float scale, cudaStream_t stream) {
  constexpr int64_t kMost = 65535;  // of the second grid dimension
  if (cols == 0) return;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t begin = 0; begin < count; begin += kMost) {
      const int64_t part = count - begin < kMost ? count - begin : kMost;
      EXL_LAUNCH((embed_rows<T>), dim3(unsigned((cols + kThreads - 1) / kThreads), unsigned(part)), dim3(kThreads), 0,
                 stream, tokens + begin, static_cast<const T*>(table), out + begin * cols, vocab, cols, scale);
    }
  });
}

}  // namespace exl
