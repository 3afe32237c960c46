// Decode kernels over quantized pages; a file of its own so that they compile side by side.
// registers: decode_kernel 255
#include "attention_decode_dims.cuh"

namespace exl {

void attention_decode_codes(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream) {
  decode_by_dim<true>(args, wide, grid, stream);
}

}  // namespace exl
