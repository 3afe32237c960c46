// What every binding does before it hands pointers to a kernel: check device, dtype, shape and contiguity, and say what
// came and what was wanted. Bindings are the only C++ here that sees torch, through its stable ABI.
//
// A binding file declares its own operators, so that no common list needs an edit:
//
//   Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) { ... }
//   STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) { m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }
//   STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }
//
// All binding files are compiled as one translation unit (torch's headers are slow to read), so names have to differ
// between them. Operators without a tensor argument are registered for CompositeExplicitAutograd instead of CPU. An argument that is
// written is spelled Tensor(a!) in the schema. Failed checks throw std::runtime_error, RuntimeError in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../common/half.h"

namespace exl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// EXL_CHECK(x.dim() == 2, "exl::foo: x must be (rows, cols), got ", describe(x));
#define EXL_CHECK(condition, ...)             \
  do {                                        \
    if (__builtin_expect(!(condition), 0)) {  \
      ::exl::fail(__VA_ARGS__);               \
    }                                         \
  } while (0)

// "Float (2, 3) on cpu", for messages.
inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " (";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ") on " << (t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another device");
  if (!t.is_contiguous()) text << ", not contiguous";
  return text.str();
}

// A wanted shape: numbers must match, -1 takes any size. Names the operator and the argument in the message.
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) {
  bool good = t.dim() == int64_t(wanted.size());
  int64_t d = 0;
  for (auto w = wanted.begin(); good && w != wanted.end(); ++w, ++d) good = *w < 0 || *w == t.size(d);
  if (good) return;
  std::ostringstream shape;
  const char* comma = "";
  for (int64_t w : wanted) {
    shape << comma;
    w < 0 ? shape << '*' : shape << w;
    comma = ", ";
  }
  fail("exl::", op, ": ", name, " must have shape (", shape.str(), "), got ", describe(t));
}

// On the CPU, contiguous, of this dtype.
inline void check_cpu(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  EXL_CHECK(t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), "exl::", op, ": ", name,
            " must be a contiguous CPU tensor of dtype ", torch::headeronly::toString(dtype), ", got ", describe(t));
}

inline bool is_float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// On the CPU, contiguous, float32, float16 or bfloat16: returns which.
inline Dtype check_cpu_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  EXL_CHECK(is_float_dtype(dtype) && t.is_cpu() && t.is_contiguous(), "exl::", op, ": ", name,
            " must be a contiguous CPU tensor of dtype Float, Half or BFloat16, got ", describe(t));
  return dtype == ScalarType::Float ? Dtype::float32 : dtype == ScalarType::Half ? Dtype::float16 : Dtype::bfloat16;
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like, const Tensor& other) {
  EXL_CHECK(t.scalar_type() == other.scalar_type(), "exl::", op, ": ", name, " must have the dtype of ", like, " (",
            describe(other), "), got ", describe(t));
}

// A new uninitialised contiguous CPU tensor. The direct shim call: the dispatcher route costs several times as much.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[16];
  EXL_CHECK(dims >= 0 && dims <= 16, "exl: tensors have at most 16 dimensions, got ", dims);
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), int64_t(sizes.size()), dtype);
}

inline Tensor empty_like_cpu(const Tensor& t) { return empty_cpu(t.sizes().data(), t.dim(), t.scalar_type()); }

}  // namespace exl
