#include "step_lora.h"

#include <cstring>

#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for

// One change on `count` rows of x, which are rows `to` of y.
void add(const StepChange& c, const float* x, const float* weights, const int64_t* to, int64_t count, float* y) {
  static thread_local Scratch memory;
  const int64_t rank = c.down.outputs, outputs = c.up.outputs;
  float* const narrow = memory.floats(count * (rank + outputs));
  float* const more = narrow + count * rank;
  linear_dense_cpu(c.down, x, narrow, count);
  for (int64_t r = 0; r < count; ++r) {
    const float factor = weights[r] * c.scale;
    for (int64_t i = 0; i < rank; ++i) narrow[r * rank + i] *= factor;
  }
  linear_dense_cpu(c.up, narrow, more, count);
  parallel_for(
      count,
      [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          float* row = y + to[r] * outputs;
          for (int64_t i = 0; i < outputs; ++i) row[i] += more[r * outputs + i];
        }
      },
      1 + kGrain / outputs);
}

}  // namespace

void step_lora(const StepBatch& batch, const StepMatrix& w, const float* x, int64_t rows, const int64_t* tokens,
               float* y) {
  static thread_local Scratch memory;
  static thread_local std::vector<int64_t> taking;
  static thread_local std::vector<float> weights;
  if (w.place < 0) return;
  for (int64_t s = 0; s < batch.share_count; ++s) {
    const StepShare& share = batch.shares[s];
    const std::vector<StepChange>& changes = share.adapter->changes[size_t(w.place)];
    if (changes.empty()) continue;
    taking.clear(), weights.clear();
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = share.weights[tokens == nullptr ? r : tokens[r]];
      if (weight != 0.0f) taking.push_back(r), weights.push_back(weight);
    }
    const int64_t count = int64_t(taking.size());
    if (count == 0) continue;
    const float* own = x;
    if (count < rows) {
      float* gathered = memory.floats(count * w.inputs);
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(gathered + i * w.inputs, x + taking[size_t(i)] * w.inputs, size_t(w.inputs) * sizeof(float));
      }
      own = gathered;
    }
    for (const StepChange& c : changes) add(c, own, weights.data(), taking.data(), count, y);
  }
}

}  // namespace exl
