// The inner loops of the EXL2 quantizer. Contracts: cpu/encode.h.
#include "../cpu/encode.h"

#include "../common/bitstream.h"
#include "checks.h"

namespace exl {
namespace {

// w (or q) float32 (rows, columns), and a legal width.
EncodeShape check_group(const char* op, const char* name, const Tensor& w, int64_t bits) {
  check_cpu(op, name, w, ScalarType::Float);
  check_shape(op, name, w, {-1, -1});
  EXL_CHECK(bits >= 2 && bits <= 8 && legal_width(int(bits)), "exl::", op, ": no codes have ", bits, " bits");
  return {w.size(0), w.size(1), int(bits)};
}

const float* check_floats(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  check_cpu(op, name, t, ScalarType::Float);
  check_shape(op, name, t, shape);
  return t.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> op_scale_search(const Tensor& w, const Tensor& row_weights, const Tensor& group_scales,
                                           int64_t bits) {
  const char* op = "scale_search";
  const EncodeShape shape = check_group(op, "w", w, bits);
  const float* weights = check_floats(op, "row_weights", row_weights, {shape.rows});
  for (int64_t r = 0; r < shape.rows; ++r) {
    EXL_CHECK(weights[r] >= 0.0f, "exl::scale_search: row_weights must not be negative, row ", r, " has ", weights[r]);
  }
  const float* maxima = check_floats(op, "group_scales", group_scales, {-1});
  const int64_t candidates = group_scales.size(0);
  Tensor codes = empty_cpu({candidates, shape.columns}, ScalarType::Byte);
  Tensor loss = empty_cpu({candidates, shape.columns}, ScalarType::Float);
  scale_search_cpu(shape, w.const_data_ptr<float>(), weights, maxima, candidates,
                   static_cast<uint8_t*>(codes.mutable_data_ptr()), loss.mutable_data_ptr<float>());
  return {codes, loss};
}

Tensor op_feedback_loss(const Tensor& w, const Tensor& u, const Tensor& scales, int64_t bits) {
  const char* op = "feedback_loss";
  const EncodeShape shape = check_group(op, "w", w, bits);
  const float* factor = check_floats(op, "u", u, {shape.rows, shape.rows});
  const float* candidates = check_floats(op, "scales", scales, {-1, shape.columns});
  Tensor loss = empty_like_cpu(scales);
  feedback_loss_cpu(shape, w.const_data_ptr<float>(), factor, candidates, scales.size(0),
                    loss.mutable_data_ptr<float>());
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> op_feedback_encode(const Tensor& w, const Tensor& u, const Tensor& scales,
                                                      int64_t bits) {
  const char* op = "feedback_encode";
  const EncodeShape shape = check_group(op, "w", w, bits);
  const float* factor = check_floats(op, "u", u, {shape.rows, shape.rows});
  const float* scale = check_floats(op, "scales", scales, {shape.columns});
  Tensor codes = empty_cpu({shape.rows, shape.columns}, ScalarType::Char);
  Tensor q = empty_like_cpu(w), errors = empty_like_cpu(w);
  feedback_encode_cpu(shape, w.const_data_ptr<float>(), factor, scale, static_cast<int8_t*>(codes.mutable_data_ptr()),
                      q.mutable_data_ptr<float>(), errors.mutable_data_ptr<float>());
  return {codes, q, errors};
}

std::tuple<Tensor, Tensor, Tensor> op_descend(const Tensor& q, const Tensor& gradient, const Tensor& h,
                                              const Tensor& scales, int64_t bits) {
  const char* op = "descend";
  const EncodeShape shape = check_group(op, "q", q, bits);
  const float* slope = check_floats(op, "gradient", gradient, {shape.rows, shape.columns});
  const float* curvature = check_floats(op, "h", h, {shape.rows, shape.rows});
  const float* scale = check_floats(op, "scales", scales, {shape.columns});
  Tensor codes = empty_cpu({shape.rows, shape.columns}, ScalarType::Char);
  Tensor new_q = empty_like_cpu(q), delta = empty_like_cpu(q);
  descend_cpu(shape, q.const_data_ptr<float>(), slope, curvature, scale,
              static_cast<int8_t*>(codes.mutable_data_ptr()), new_q.mutable_data_ptr<float>(),
              delta.mutable_data_ptr<float>());
  return {codes, new_q, delta};
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("scale_search(Tensor w, Tensor row_weights, Tensor group_scales, int bits) -> (Tensor, Tensor)");
  m.def("feedback_loss(Tensor w, Tensor u, Tensor scales, int bits) -> Tensor");
  m.def("feedback_encode(Tensor w, Tensor u, Tensor scales, int bits) -> (Tensor, Tensor, Tensor)");
  m.def("descend(Tensor q, Tensor gradient, Tensor h, Tensor scales, int bits) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("scale_search", TORCH_BOX(&exl::op_scale_search));
  m.impl("feedback_loss", TORCH_BOX(&exl::op_feedback_loss));
  m.impl("feedback_encode", TORCH_BOX(&exl::op_feedback_encode));
  m.impl("descend", TORCH_BOX(&exl::op_descend));
}
