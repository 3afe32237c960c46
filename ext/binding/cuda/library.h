// What the bindings of CUDA kernels share. Every file here is built twice: into exl_cuda.so, where the operators live
// in the namespace exl_cuda and take CUDA tensors, and (for tests, no GPU needed) into exl_cuda_emulated.so, where they
// live in exl_cuda_emulated and take CPU tensors, which the same kernels then work on by way of ../../emulation.
//
//   #include "../../cuda/rms_norm.h"
//   #include "library.h"
//   Tensor cuda_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
//     check_cuda("rms_norm", "weight", weight, ScalarType::Float);
//     const OnDevice on(x);                       // makes x's device the current one for this scope
//     Tensor y = empty_cuda({rows, cols}, x.scalar_type(), x);
//     rms_norm_cuda(..., on.stream());
//     return y;
//   }
//   EXL_CUDA_FRAGMENT(m) { m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }
//   EXL_CUDA_IMPL(m) { m.impl("rms_norm", TORCH_BOX(&cuda_rms_norm)); }
//
// All binding files are one translation unit: names have to differ between them.
#pragma once

#include "../../cuda/stream.h"
#include "../checks.h"

#if defined(EXL_EMULATED)
#define EXL_CUDA_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(exl_cuda_emulated, m)
#define EXL_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(exl_cuda_emulated, CPU, m)
#else
#include <torch/csrc/stable/accelerator.h>
#define EXL_CUDA_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(exl_cuda, m)
#define EXL_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(exl_cuda, CUDA, m)
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace exl {

// Whether a tensor lies where these kernels work: on a CUDA device, or on the CPU in the emulation.
inline bool is_on_card(const Tensor& t) {
#if defined(EXL_EMULATED)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// The stream that torch uses now on the tensor's device.
inline cudaStream_t stream_of(const Tensor& t) {
#if defined(EXL_EMULATED)
  (void)t;
  return nullptr;
#else
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// For its lifetime the tensor's device is the current one; a launch on another device's stream would fail.
class OnDevice {
 public:
#if defined(EXL_EMULATED)
  explicit OnDevice(const Tensor& t) : stream_(stream_of(t)) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()), stream_(stream_of(t)) {}
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#if !defined(EXL_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_;
};

// On the card, contiguous, of this dtype.
inline void check_cuda(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  EXL_CHECK(t.scalar_type() == dtype && is_on_card(t) && t.is_contiguous(), "exl_cuda::", op, ": ", name,
            " must be a contiguous CUDA tensor of dtype ", torch::headeronly::toString(dtype), ", got ", describe(t));
}

// On the card, contiguous, float32, float16 or bfloat16: returns which.
inline Dtype check_cuda_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  EXL_CHECK(is_float_dtype(dtype) && is_on_card(t) && t.is_contiguous(), "exl_cuda::", op, ": ", name,
            " must be a contiguous CUDA tensor of dtype Float, Half or BFloat16, got ", describe(t));
  return dtype == ScalarType::Float ? Dtype::float32 : dtype == ScalarType::Half ? Dtype::float16 : Dtype::bfloat16;
}

// On the same device as another tensor: a kernel launched for one card cannot reach another's memory.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  EXL_CHECK(is_on_card(t) && t.get_device_index() == like.get_device_index(), "exl_cuda::", op, ": ", name,
            " must be on device ", like.get_device_index(), ", got ", describe(t), ", device ", t.get_device_index());
}

// The address must be a multiple of `bytes`: views into larger tensors may start anywhere.
inline void check_aligned(const char* op, const char* name, const Tensor& t, uintptr_t bytes) {
  EXL_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0, "exl_cuda::", op, ": ", name,
            " must start at a multiple of ", bytes, " bytes; clone the view");
}

// A new uninitialised contiguous tensor beside `like`.
inline Tensor empty_cuda(const int64_t* sizes, int64_t dims, ScalarType dtype, const Tensor& like) {
#if defined(EXL_EMULATED)
  (void)like;
  return empty_cpu(sizes, dims, dtype);
#else
  int64_t strides[16];
  EXL_CHECK(dims >= 0 && dims <= 16, "exl_cuda: tensors have at most 16 dimensions, got ", dims);
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cuda(),
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
#endif
}

inline Tensor empty_cuda(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty_cuda(sizes.begin(), int64_t(sizes.size()), dtype, like);
}

inline Tensor empty_like_cuda(const Tensor& t) { return empty_cuda(t.sizes().data(), t.dim(), t.scalar_type(), t); }

}  // namespace exl
