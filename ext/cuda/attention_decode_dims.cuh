// The sizes of heads the decode kernels are built for.
#pragma once

#include "attention_decode_kernel.cuh"

namespace exl {

// wide: the kernel with the larger number of columns.
void attention_decode_floats(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream);
void attention_decode_codes(const CudaAttention& args, bool wide, dim3 grid, cudaStream_t stream);

// Tiles of 8 columns of the wide kernel: as many as the registers hold the sums of.
constexpr int wide_tiles(int head_dim) { return head_dim <= 128 ? 4 : 2; }

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
  switch (args.head_dim) {
    case 16: return decode_by_width<kCodes, 16>(args, wide, grid, stream);
    case 32: return decode_by_width<kCodes, 32>(args, wide, grid, stream);
    case 64: return decode_by_width<kCodes, 64>(args, wide, grid, stream);
    case 80: return decode_by_width<kCodes, 80>(args, wide, grid, stream);
    case 96: return decode_by_width<kCodes, 96>(args, wide, grid, stream);
    case 128: return decode_by_width<kCodes, 128>(args, wide, grid, stream);
    case 256: return decode_by_width<kCodes, 256>(args, wide, grid, stream);
    default: throw std::runtime_error("attention: no kernel for heads of " + std::to_string(args.head_dim) + " values");
  }
}

}  // namespace
}  // namespace exl
