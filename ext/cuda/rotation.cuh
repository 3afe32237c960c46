// The rotation of quantized heads, one warp to a group of 32 values. The definition: exl_runtime/ops/kv_quant.py.
#pragma once

#include "exl_cuda.h"

namespace exl {
namespace {

// 1 / sqrt(size) for the sizes of blocks of the rotation.
__device__ inline float rotation_norm(int size) {
  return size == 32   ? 0.17677669529663687f
         : size == 16 ? 0.25f
         : size == 8  ? 0.35355339059327373f
         : size == 4  ? 0.5f
         : size == 2  ? 0.70710678118654757f
                      : 1.0f;
}

// The rotation of ../common/kv_rows.h over a group of `count` <= 32 values, one to a lane; the other lanes bring zero.
// The same order of sums as exl_runtime/ops/kv_quant.py, hence the same bits.
__device__ inline float rotate_group(float v, int count, int lane) {
  int size = 32, start = 0;  // of this lane's block: blocks of a power of two, largest first
  while (size > 1 && ((count & size) == 0 || lane >= start + size)) {
    if ((count & size) != 0) start += size;
    size /= 2;
  }
  for (int span = 1; span < 32; span *= 2) {
    const float other = __shfl_xor_sync(~0u, v, span);
    if (span < size) v = (lane & span) != 0 ? other - v : v + other;
  }
  return v * rotation_norm(size);
}

}  // namespace
}  // namespace exl
