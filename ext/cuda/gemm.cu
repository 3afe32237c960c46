// registers: multiply 168
#include "skinny.h"

#include "skinny.cuh"

namespace exl {

void gemm_cuda(const LinearWork& work, cudaStream_t stream) {
  if (work.m == 0 || work.blocks == 0) return;
  launch_multiply<kGemmRows, kGemmColumns, 1, true>(work, (work.m + kGemmRows - 1) / kGemmRows, stream);
}

}  // namespace exl
