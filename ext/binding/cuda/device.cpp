// torch.ops.exl_cuda.multiprocessors: see ../../cuda/device.h
#include "../../cuda/device.h"
#include "library.h"

namespace exl {
namespace {

int64_t cuda_multiprocessors(const Tensor& like) {
  const OnDevice on(like);
  return multiprocessors_cuda();
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) { m.def("multiprocessors(Tensor like) -> int"); }

EXL_CUDA_IMPL(m) { m.impl("multiprocessors", TORCH_BOX(&exl::cuda_multiprocessors)); }
