// Prefill kernels over half and bfloat16 pages; a file of its own so that they compile side by side.
// registers: prefill_kernel 224
#include "attention_prefill_kernel.cuh"

namespace exl {

void attention_prefill_floats(const CudaAttention& args, dim3 grid, cudaStream_t stream) {
  prefill_by_dim<false>(args, grid, stream);
}

}  // namespace exl
