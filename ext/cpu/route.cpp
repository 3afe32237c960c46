#include "route.h"

#include <cmath>
#include <limits>

#include "row_kernels.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kPerThread = 1024;  // exponentials, about 10 us

void route_row(const float* logits, int64_t experts, int64_t chosen, bool normalize, float* weights, int32_t* kinds) {
  const float most = row_kernels().max(logits, experts);
  if (!std::isfinite(most)) {
    for (int64_t i = 0; i < chosen; ++i) weights[i] = std::numeric_limits<float>::quiet_NaN(), kinds[i] = int32_t(i);
    return;
  }
  double total = 0.0;
  for (int64_t e = 0; e < experts; ++e) total += std::exp(double(logits[e]) - double(most));
  int64_t kept = 0;
  for (int64_t e = 0; e < experts; ++e) {
    // What is no better by its logit than the last one kept is no better by its share.
    if (kept == chosen && logits[e] <= logits[kinds[chosen - 1]]) continue;
    const float share = float(std::exp(double(logits[e]) - double(most)) / total);
    if (kept == chosen && share <= weights[chosen - 1]) continue;
    int64_t place = kept < chosen ? kept++ : chosen - 1;
    for (; place > 0 && weights[place - 1] < share; --place) {
      weights[place] = weights[place - 1], kinds[place] = kinds[place - 1];
    }
    weights[place] = share, kinds[place] = int32_t(e);
  }
  if (!normalize) return;
  double sum = 0.0;
  for (int64_t i = 0; i < chosen; ++i) sum += double(weights[i]);
  for (int64_t i = 0; i < chosen; ++i) weights[i] = float(double(weights[i]) / sum);
}

}  // namespace

void route(const float* logits, int64_t rows, int64_t experts, int64_t chosen, bool normalize, float* weights,
           int32_t* kinds) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      route_row(logits + r * experts, experts, chosen, normalize, weights + r * chosen, kinds + r * chosen);
    }
  };
  parallel_for(rows, body, 1 + kPerThread / experts);
}

}  // namespace exl
