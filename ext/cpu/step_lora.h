// What low-rank adapters add to the products of a pass (step.h), as exl_runtime/model/lora.py computes it, to the same
// bits. For every share of the pass in turn, on the rows that it takes part in:
//
//   y = y + ((x @ down) * (weight * scale)) @ up
//
// In float32 (linear_dense.h). A row's result depends on no other row.
// test: tests/model/test_step_lora.py
#pragma once

#include "step.h"

namespace exl {

// What one matrix gets added: inputs -> rank -> outputs.
struct StepChange {
  DenseWeights down, up;
  float scale;
};

// Changes by StepMatrix::place, added in their order. A matrix of layer l has the place 7 l + its number (query, key,
// value, out, gate, up, down), the head the one behind all; the matrices of a mixture have none.
struct StepAdapter {
  std::vector<std::vector<StepChange>> changes;
};

// An adapter in one pass.
struct StepShare {
  const StepAdapter* adapter;
  const float* weights;  // (rows of the pass); 0: not there
};

// Behind y = x @ w + bias; x float32 (rows, inputs), y float32 (rows, outputs). tokens: which of the pass each row is,
// null: they are all.
void step_lora(const StepBatch& batch, const StepMatrix& w, const float* x, int64_t rows, const int64_t* tokens,
               float* y);

}  // namespace exl
