#include "skinny.h"

#include "skinny.cuh"

namespace exl {

// Two tile columns and four parts of the units: the input is read once for 64 columns, and few sums have to meet.
void skinny_cuda(const LinearWork& work, cudaStream_t stream) {
  if (work.m == 0 || work.blocks == 0) return;
  if (work.m <= 8) return launch_multiply<8, kSkinnyColumns, 4, false>(work, 1, stream);
  if (work.m <= 16) return launch_multiply<16, kSkinnyColumns, 4, false>(work, 1, stream);
  launch_multiply<32, kSkinnyColumns, 4, false>(work, 1, stream);
}

}  // namespace exl
