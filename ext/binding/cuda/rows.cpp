// Row operations on CUDA: see ../../cuda/norm.h, gated.h, embed.h. Results go into tensors the caller made, so that
// memory comes from torch's allocator, which knows streams and graphs.
#include <climits>

#include "../../cuda/embed.h"
#include "../../cuda/gated.h"
#include "../../cuda/norm.h"
#include "library.h"

namespace exl {
namespace {

bool rows_beside(const Tensor& t, const Tensor& like) {
  return is_on_card(t) && t.get_device_index() == like.get_device_index();
}

Dtype rows_dtype(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  const ScalarType dtype = t.scalar_type();
  EXL_CHECK(is_float_dtype(dtype) && rows_beside(t, like) && t.is_contiguous(), "exl_cuda::", op, ": ", name,
            " must be a contiguous Float, Half or BFloat16 tensor on the device of the others, got ", describe(t));
  return dtype == ScalarType::Float ? Dtype::float32 : dtype == ScalarType::Half ? Dtype::float16 : Dtype::bfloat16;
}

const int32_t* rows_order(const char* op, const std::optional<Tensor>& order, const Tensor& x, int64_t cols) {
  if (!order.has_value()) return nullptr;
  EXL_CHECK(order->scalar_type() == ScalarType::Int && rows_beside(*order, x) && order->is_contiguous() &&
                order->dim() == 1 && order->size(0) == cols,
            "exl_cuda::", op, ": order must be Int (", cols, ") on the device of x, got ", describe(*order));
  return order->const_data_ptr<int32_t>();
}

// cols, after checking that x and y are (..., cols) of one shape and weight is float32 (cols)
int64_t rows_norm_shape(const char* op, const Tensor& x, const Tensor& weight, const Tensor& y) {
  bool same = x.dim() == y.dim() && x.dim() >= 1;
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == y.size(d);
  EXL_CHECK(same, "exl_cuda::", op, ": x and y must have the same shape, got ", describe(x), " and ", describe(y));
  const int64_t cols = x.size(x.dim() - 1);
  EXL_CHECK(cols <= (1 << 30), "exl_cuda::", op, ": rows of up to 2^30 elements, got ", cols);
  EXL_CHECK(cols == 0 || x.numel() / cols <= INT_MAX, "exl_cuda::", op, ": up to 2^31 - 1 rows, got ", describe(x));
  EXL_CHECK(weight.scalar_type() == ScalarType::Float && rows_beside(weight, x) && weight.is_contiguous() &&
                weight.dim() == 1 && weight.size(0) == cols,
            "exl_cuda::", op, ": weight must be Float (", cols, ") on the device of x, got ", describe(weight));
  return cols;
}

void op_cuda_rms_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& order, const Tensor& y,
                      double eps, double offset) {
  const Dtype from = rows_dtype("rms_norm", "x", x, x), to = rows_dtype("rms_norm", "y", y, x);
  const int64_t cols = rows_norm_shape("rms_norm", x, weight, y);
  const int32_t* columns = rows_order("rms_norm", order, x, cols);
  EXL_CHECK(x.numel() == 0 || columns == nullptr || x.const_data_ptr() != y.const_data_ptr(),
            "exl_cuda::rms_norm: y must not be x where columns change places");
  const OnDevice on(x);
  rms_norm_cuda(x.const_data_ptr(), from, weight.const_data_ptr<float>(), columns, y.mutable_data_ptr(), to,
                cols == 0 ? 0 : x.numel() / cols, cols, float(eps), float(offset), on.stream());
}

void op_cuda_add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& weight,
                          const std::optional<Tensor>& order, const Tensor& y, double eps, double offset) {
  const char* op = "add_rms_norm";
  EXL_CHECK(rows_dtype(op, "x", x, x) == Dtype::float32, "exl_cuda::add_rms_norm: x must be Float, got ", describe(x));
  const Dtype more = rows_dtype(op, "delta", delta, x), to = rows_dtype(op, "y", y, x);
  const int64_t cols = rows_norm_shape(op, x, weight, y);
  rows_norm_shape(op, delta, weight, y);
  EXL_CHECK(x.numel() == 0 || x.const_data_ptr() != y.const_data_ptr(), "exl_cuda::add_rms_norm: y must not be x");
  const OnDevice on(x);
  add_rms_norm_cuda(x.mutable_data_ptr<float>(), delta.const_data_ptr(), more, weight.const_data_ptr<float>(),
                    rows_order(op, order, x, cols), y.mutable_data_ptr(), to, cols == 0 ? 0 : x.numel() / cols, cols,
                    float(eps), float(offset), on.stream());
}

GatedActivation rows_activation(std::string_view name) {
  if (name == "silu") return GatedActivation::silu;
  if (name == "gelu_tanh") return GatedActivation::gelu_tanh;
  if (name == "gelu") return GatedActivation::gelu;
  if (name == "relu") return GatedActivation::relu;
  fail("exl_cuda::gated: unknown activation '", name, "'; silu, gelu, gelu_tanh or relu");
}

void op_cuda_gated(const Tensor& gate, const Tensor& up, const Tensor& out, const std::string& activation) {
  const Dtype to = rows_dtype("gated", "out", out, gate);
  const auto fits = [&](const Tensor& t) {
    return t.scalar_type() == gate.scalar_type() && rows_beside(t, out) && t.dim() == 2 && t.size(0) == out.size(0) &&
           t.size(1) == out.size(1) && (t.stride(1) == 1 || t.size(1) <= 1) && t.stride(0) >= 0;
  };
  EXL_CHECK(out.dim() == 2 && is_float_dtype(gate.scalar_type()) && fits(gate) && fits(up) &&
                (out.scalar_type() == gate.scalar_type() || to == Dtype::float32),
            "exl_cuda::gated: gate and up must be (rows, cols) of one shape, dtype and device, rows contiguous, and out ",
            "like them or Float, got ", describe(gate), ", ", describe(up), " and ", describe(out));
  const int64_t rows = out.size(0), cols = out.size(1);
  EXL_CHECK((out.numel() >> 8) < INT_MAX, "exl_cuda::gated: too large: ", describe(out));
  const Dtype dtype = gate.scalar_type() == ScalarType::Float  ? Dtype::float32
                      : gate.scalar_type() == ScalarType::Half ? Dtype::float16
                                                               : Dtype::bfloat16;
  const OnDevice on(out);
  gated_cuda(gate.const_data_ptr(), up.const_data_ptr(), dtype, out.mutable_data_ptr(), to, rows, cols, gate.stride(0),
             up.stride(0), rows_activation(activation), on.stream());
}

void op_cuda_embed(const Tensor& tokens, const Tensor& table, const Tensor& out, double scale) {
  const Dtype dtype = rows_dtype("embed", "table", table, out);
  EXL_CHECK(tokens.scalar_type() == ScalarType::Long && rows_beside(tokens, out) && tokens.is_contiguous() &&
                tokens.dim() == 1 && table.dim() == 2,
            "exl_cuda::embed: tokens must be Long (T), table (vocab, hidden), got ", describe(tokens), " and ",
            describe(table));
  EXL_CHECK(rows_dtype("embed", "out", out, out) == Dtype::float32 && out.dim() == 2 &&
                out.size(0) == tokens.size(0) && out.size(1) == table.size(1),
            "exl_cuda::embed: out must be Float (", tokens.size(0), ", ", table.size(1), "), got ", describe(out));
  const OnDevice on(out);
  embed_cuda(tokens.const_data_ptr<int64_t>(), table.const_data_ptr(), dtype, out.mutable_data_ptr<float>(),
             tokens.size(0), table.size(0), table.size(1), float(scale), on.stream());
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? order, Tensor(a!) y, float eps, float offset) -> ()");
  m.def(
      "add_rms_norm(Tensor(a!) x, Tensor delta, Tensor weight, Tensor? order, Tensor(b!) y, float eps, float offset) -> "
      "()");
  m.def("gated(Tensor gate, Tensor up, Tensor(a!) out, str activation) -> ()");
  m.def("embed(Tensor tokens, Tensor table, Tensor(a!) out, float scale) -> ()");
}

EXL_CUDA_IMPL(m) {
  m.impl("rms_norm", TORCH_BOX(&exl::op_cuda_rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&exl::op_cuda_add_rms_norm));
  m.impl("gated", TORCH_BOX(&exl::op_cuda_gated));
  m.impl("embed", TORCH_BOX(&exl::op_cuda_embed));
}
