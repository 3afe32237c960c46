// Checked parts of a model of cpu/step.h, made from tensors. Names the operator `op` in its messages.
#pragma once

#include "../cpu/step.h"
#include "checks.h"
#include "shared.h"

namespace exl {

// float32 (size,), or null where an empty tensor says that there is none.
inline const float* step_vector(const char* op, const char* name, const Tensor& t, int64_t size, bool optional) {
  if (optional && t.numel() == 0) return nullptr;
  check_cpu(op, name, t, ScalarType::Float);
  check_shape(op, name, t, {size});
  return t.const_data_ptr<float>();
}

inline StepMatrix step_matrix(const char* op, const Tensor& weight, const Tensor& bias, int64_t residual_rows) {
  StepMatrix w{};
  if (weight.scalar_type() == ScalarType::Byte) {
    w.packed = check_packed(op, weight);
    w.residual_rows = residual_rows;
    w.inputs = w.packed.header->inputs, w.outputs = w.packed.header->outputs;
  } else {
    const Dtype dtype = check_cpu_float(op, "weight", weight);
    check_shape(op, "weight", weight, {-1, -1});
    w.inputs = weight.size(1), w.outputs = weight.size(0);
    w.dense = {weight.data_ptr(), dtype, w.inputs, w.outputs};
  }
  w.bias = step_vector(op, "bias", bias, w.outputs, true);
  return w;
}

inline void step_fits(const char* op, const char* name, const StepMatrix& w, int64_t inputs, int64_t outputs) {
  EXL_CHECK(w.inputs == inputs && w.outputs == outputs, "exl::", op, ": ", name, " must be ", inputs, " x ", outputs,
            ", got ", w.inputs, " x ", w.outputs);
}

inline void step_mlp_fits(const char* op, const StepMatrix& gate, const StepMatrix& up, const StepMatrix& down,
                          int64_t hidden, int64_t inner) {
  step_fits(op, "gate", gate, hidden, inner);
  step_fits(op, "up", up, hidden, inner);
  step_fits(op, "down", down, inner, hidden);
}

// matrices: of attention, the router, then gate, up and down of every expert.
inline StepMoe step_experts(const char* op, const std::vector<StepMatrix>& matrices, int64_t hidden, int64_t visits,
                            bool normalize) {
  StepMoe moe;
  moe.router = matrices[4];
  for (size_t i = 5; i < matrices.size(); i += 3) {
    const StepMatrix &gate = matrices[i], &up = matrices[i + 1], &down = matrices[i + 2];
    step_mlp_fits(op, gate, up, down, hidden, matrices[5].outputs);
    EXL_CHECK(gate.bias == nullptr && up.bias == nullptr && down.bias == nullptr, "exl::", op,
              ": experts have no biases");
    moe.gate.push_back(gate), moe.up.push_back(up), moe.down.push_back(down);
  }
  const int64_t experts = int64_t(moe.gate.size());
  step_fits(op, "router", moe.router, hidden, experts);
  EXL_CHECK(moe.router.bias == nullptr && visits <= experts, "exl::", op, ": a router without bias was wanted, for ",
            visits, " of ", experts, " experts");
  moe.visits = visits, moe.normalize = normalize;
  return moe;
}

}  // namespace exl
