// The adapters of a model of cpu/step.h, and those of its passes. See cpu/step_lora.h.
#pragma once

#include "../cpu/step_lora.h"

#include <map>
#include <memory>

#include "checks.h"

namespace exl {

struct StepAdapterHeld {
  StepAdapter adapter;
  std::vector<Tensor> kept;
};

struct StepLora {
  std::map<int64_t, std::shared_ptr<StepAdapterHeld>> adapters;
  int64_t last = 0;
  // Of the next pass: adapters, and (adapters, sequences) weights.
  std::vector<std::shared_ptr<StepAdapterHeld>> next;
  std::vector<float> next_weights;
  // Of the pass under way: adapters, (adapters, sequences) and (adapters, rows) weights, and what StepBatch points to.
  std::vector<std::shared_ptr<StepAdapterHeld>> own;
  std::vector<float> given, weights;
  std::vector<StepShare> shares;

  // The next pass begins, or is refused: no other one has its shares.
  void take() {
    own = std::move(next), given = std::move(next_weights);
    next.clear(), next_weights.clear();
  }

  // Every row of it gets the weights of its sequence. The tables in `b` have been checked.
  void spread(const char* op, StepBatch& b) {
    weights.clear(), shares.clear();
    b.shares = nullptr, b.share_count = 0;
    if (own.empty()) return;
    EXL_CHECK(int64_t(given.size()) == int64_t(own.size()) * b.sequences, "exl::", op, ": ", given.size(),
              " weights for ", own.size(), " adapters and ", b.sequences, " sequences");
    for (size_t a = 0; a < own.size(); ++a) {
      for (int64_t s = 0; s < b.sequences; ++s) {
        const float weight = given[a * size_t(b.sequences) + size_t(s)];
        weights.insert(weights.end(), size_t(b.q_starts[s + 1] - b.q_starts[s]), weight);
      }
    }
    for (size_t a = 0; a < own.size(); ++a) {
      shares.push_back({&own[a]->adapter, weights.data() + int64_t(a) * b.rows});
    }
    b.shares = shares.data(), b.share_count = int64_t(shares.size());
  }
};

}  // namespace exl
