// One decode kernel out of many, by the size of heads.
#pragma once

#include "attention_decode_kernel.cuh"
#include "attention_dims.h"

namespace exl {

// wide: the kernel with the larger number of columns.
void attention_decode_floats(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream);
void attention_decode_codes(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream);

// Tiles of 8 columns of the wide kernel: as many as the registers hold the sums of.
constexpr int wide_tiles(int head_dim) { return head_dim < 128 ? 4 : 2; }

namespace {

template <bool kCodes, int kDim>
void decode_by_width(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream) {
  if (wide) {
    launch_decode<kDim, kCodes, wide_tiles(kDim)>(args, grid, stream);
  } else {
    launch_decode<kDim, kCodes, 1>(args, grid, stream);
  }
}

template <bool kCodes>
void decode_by_dim(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream) {
#define EXL_DIM(dim) \
  case dim: return decode_by_width<kCodes, dim>(args, wide, grid, stream);
  switch (args.head_dim) {
    EXL_ATTENTION_DIMS(EXL_DIM)
    default: throw std::runtime_error("attention: no kernel for heads of " + std::to_string(args.head_dim) + " values");
  }
#undef EXL_DIM
}

}  // namespace
}  // namespace exl
