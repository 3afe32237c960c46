// See device.h.
#include "device.h"

#include "exl_cuda.h"

namespace exl {

int multiprocessors_cuda() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  EXL_CUDA_CHECK(cudaGetDevice(&device));
  EXL_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
#else
  return 4;
#endif
}

}  // namespace exl
