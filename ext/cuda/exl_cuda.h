// The only platform header of the kernels. nvcc: thin macros over CUDA. Any other compiler: the kernel runs on the CPU,
// one fiber per CUDA thread (../emulation), for tests.
//
//   EXL_LAUNCH((kernel<8>), grid, block, smem_bytes, stream, args...)     kernel in brackets when it has commas
//   EXL_LAUNCH_PDL(...)          the same; the kernel may start before its predecessor ends (compute capability >= 9.0)
//                                and must call ptx::grid_wait() before it touches anything the predecessor writes
//   EXL_SHARED(T, name, [A][B])  static shared memory        EXL_DYN_SMEM(T, name)  dynamic, aligned to 128 bytes
//   EXL_CUDA_CHECK(call)         throws std::runtime_error with file, line and CUDA's own words
//
// Rules that both compilers hold kernels to: no raw __shared__; no asm outside ptx.h; no waiting for another block
// (the last one to arrive does the work); __threadfence() before and after a ticket; tickets put back with atomicExch;
// no atomicAdd on floating point; fmaf and __hfma written out where bits matter (the host build does not contract).
#pragma once

#include "stream.h"

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EXL_SHARED(T, name, dims) __shared__ T name dims
#define EXL_DYN_SMEM(T, name)                                        \
  extern __shared__ __align__(128) unsigned char exl_dyn_smem_[];    \
  T* name = reinterpret_cast<T*>(exl_dyn_smem_)
#define EXL_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::exl::launch(__FILE__, __LINE__, false, kernel, grid, block, smem, stream, __VA_ARGS__)
#define EXL_LAUNCH_PDL(kernel, grid, block, smem, stream, ...) \
  ::exl::launch(__FILE__, __LINE__, true, kernel, grid, block, smem, stream, __VA_ARGS__)
#define EXL_HERE   // where the call stands in the source: for the emulation's messages only
#define EXL_HERE_  // the same, after other parameters

#else

#include "../emulation/cuda_host.h"

#endif

#define EXL_CUDA_CHECK(call) ::exl::cuda_check((call), __FILE__, __LINE__)

namespace exl {

inline void cuda_check(cudaError_t status, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": CUDA: " + cudaGetErrorString(status));
}

#if defined(__CUDACC__)

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // a kernel that wants more has to say so first

// Whether launches on the current device may overlap their predecessor.
inline bool device_overlaps() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <class... Params, class... Args>
void launch(const char* file, int line, bool overlap, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem,
            cudaStream_t stream, Args&&... args) {
  if (smem > kDefaultSharedBytes) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem)), file, line);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap && device_overlaps() ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), file, line);
}

#endif

}  // namespace exl
