#include "sample.h"

#include <cmath>
#include <limits>
#include <vector>

#include "row_kernels.h"

namespace exl {
namespace {

constexpr int64_t kBlock = 64;
constexpr double kFloor = 1e-18;  // see ops/sample.py: less likely than this times the best is never drawn

bool drawable(float best) { return std::isfinite(best); }  // NaN: one among them; -inf: none allowed

}  // namespace

int64_t argmax(const float* logits, int64_t count) {
  constexpr int64_t kRun = 1024;  // of which one is searched a second time
  const RowKernels& kernels = row_kernels();
  float best = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (int64_t start = 0; start < count; start += kRun) {
    const float most = kernels.max(logits + start, count - start < kRun ? count - start : kRun);
    if (most != most) return -1;
    if (most > best) best = most, i = start;
  }
  if (!drawable(best)) return -1;
  while (logits[i] != best) ++i;
  return i;
}

int64_t sample_min_p(const float* logits, int64_t count, double temperature, double min_p, double u) {
  const RowKernels& kernels = row_kernels();
  const float best = kernels.max(logits, count);
  if (!drawable(best)) return -1;
  const double least = min_p > kFloor ? min_p : kFloor;
  // A cheap test that lets through all that may be kept, and hardly more; the weight decides.
  const double bound = double(best) + temperature * std::log(least);
  const float gate = float(bound - 1e-6 * (std::fabs(bound) + std::fabs(double(best)) + temperature));

  struct Kept {
    int64_t token;
    double running;
  };
  static thread_local std::vector<Kept> kept;
  kept.clear();
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t stop = start + kBlock < count ? start + kBlock : count;
    if (kernels.max(logits + start, stop - start) < gate) continue;
    for (int64_t i = start; i < stop; ++i) {
      if (logits[i] < gate) continue;
      const double weight = std::exp((double(logits[i]) - double(best)) / temperature);
      if (weight < least) continue;
      total += weight;
      kept.push_back({i, total});
    }
  }
  const double target = u * total;
  for (const Kept& k : kept) {
    if (k.running > target) return k.token;
  }
  return kept.back().token;  // the best token is always kept; u * total rounded up to total
}

}  // namespace exl
