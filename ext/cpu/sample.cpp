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

// f(begin, end) for the allowed runs of a row, of at most `most` tokens, in order, until it returns false. Whether it
// never did, and no banned logit is NaN or +infinity.
template <class F>
bool each_run(const float* logits, int64_t count, const Banned& banned, int64_t most, const F& f) {
  for (int64_t b = 0, begin = 0; b <= banned.count; ++b) {
    const int64_t end = b < banned.count ? banned.ids[b] : count;
    for (; begin < end; begin += most) {
      if (!f(begin, end - begin < most ? end : begin + most)) return false;
    }
    if (end < count && !(logits[end] < std::numeric_limits<float>::infinity())) return false;
    begin = end + 1;
  }
  return true;
}

}  // namespace

int64_t argmax(const float* logits, int64_t count, Banned banned) {
  constexpr int64_t kRun = 1024;  // of which one is searched a second time
  const RowKernels& kernels = row_kernels();
  float best = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  const bool good = each_run(logits, count, banned, kRun, [&](int64_t begin, int64_t end) {
    const float most = kernels.max(logits + begin, end - begin);
    if (most > best) best = most, i = begin;
    return most == most;
  });
  if (!good || !drawable(best)) return -1;
  while (logits[i] != best) ++i;
  return i;
}

int64_t draw(const float* logits, int64_t count, const Draw& how) {
  if (how.temperature == 0.0) return argmax(logits, count, how.banned);
  return sample_min_p(logits, count, how.temperature, how.min_p, how.u, how.banned);
}

int64_t sample_min_p(const float* logits, int64_t count, double temperature, double min_p, double u, Banned banned) {
  const RowKernels& kernels = row_kernels();
  float best = -std::numeric_limits<float>::infinity();
  const bool good = each_run(logits, count, banned, count, [&](int64_t begin, int64_t end) {
    const float most = kernels.max(logits + begin, end - begin);
    best = most > best ? most : best;
    return most == most;
  });
  if (!good || !drawable(best)) return -1;
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
  each_run(logits, count, banned, kBlock, [&](int64_t begin, int64_t end) {
    if (kernels.max(logits + begin, end - begin) < gate) return true;
    for (int64_t i = begin; i < end; ++i) {
      if (logits[i] < gate) continue;
      const double weight = std::exp((double(logits[i]) - double(best)) / temperature);
      if (weight < least) continue;
      total += weight;
      kept.push_back({i, total});
    }
    return true;
  });
  const double target = u * total;
  for (const Kept& k : kept) {
    if (k.running > target) return k.token;
  }
  return kept.back().token;  // the best token is always kept; u * total rounded up to total
}

}  // namespace exl
