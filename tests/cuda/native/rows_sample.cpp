// Sampling: every kind of row in one batch, over a vocabulary of several blocks; and the step to the next token.
// kernels: sample.cu sample_select.cu
#include <algorithm>

#include "../../../ext/cuda/sample.h"
#include "check.h"

using check::Buffer;
using namespace exl;

namespace {

constexpr int64_t kVocab = 2500, kRows = 4, kSlots = 6;
enum Kind : int { greedy, plain, top_k, top_p };

// A uniform number does not matter here: whichever token is drawn must be one that may be.
std::vector<bool> allowed(const float* logits, Kind kind) {
  std::vector<std::pair<float, int64_t>> order;
  double total = 0;
  const float best = *std::max_element(logits, logits + kVocab);
  for (int64_t i = 0; i < kVocab; ++i) {
    order.push_back({-logits[i], i});
    total += std::exp(double(logits[i]) - best);
  }
  std::sort(order.begin(), order.end());
  std::vector<bool> may(size_t(kVocab), false);
  double sum = 0;
  for (int64_t place = 0; place < kVocab; ++place) {
    const double weight = std::exp(double(-order[size_t(place)].first) - best);
    const bool kept = kind == greedy   ? place == 0
                      : kind == plain  ? weight >= 0.05
                      : kind == top_k  ? place < 5
                                       : sum < 0.6 * total * (1 + 1e-9);
    if (kept) may[size_t(order[size_t(place)].second)] = true;
    sum += weight;
  }
  return may;
}

}  // namespace

int main(int argc, char** argv) {
  return check::every_order(argc, argv, [] {
    std::mt19937 generator(3);
    std::normal_distribution<float> normal(0, 3);
    Buffer<float> logits(size_t(kRows * kVocab));
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = normal(generator);
    Buffer<int32_t> slots(std::vector<int32_t>{5, 0, 2, 3});
    Buffer<double> reals(std::vector<double>(size_t(kSlots) * kSampleReals, 1.0));
    Buffer<int64_t> wholes(std::vector<int64_t>(size_t(kSlots) * kSampleWholes, 0));
    Buffer<float> bias{size_t(kVocab)};
    Buffer<int32_t> counts(std::vector<int32_t>(size_t(kVocab), 0)), history(std::vector<int32_t>(kSlots * 4, -1));
    std::fill(bias.data(), bias.data() + kVocab, 0.0f);
    for (int64_t row = 0; row < kRows; ++row) {
      int64_t* w = wholes.data() + slots[size_t(row)] * kSampleWholes;
      double* r = reals.data() + slots[size_t(row)] * kSampleReals;
      w[kSeed] = 1000 + row;
      w[kBias] = w[kEarlyBias] = w[kCounts] = -1;
      w[kFlags] = row == greedy ? kGreedy : row == plain ? kPlain : 0;
      r[kMinP] = row == plain ? 0.05 : 0;
      if (row == top_k) {
        w[kTopK] = 5;
        w[kCuts] = 1;
        w[kBias] = w[kEarlyBias] = 0;
        w[kCounts] = 0;
        w[kRange] = 2;
        r[kFrequency] = r[kPresence] = 0;
      }
      if (row == top_p) {
        r[kTopP] = 0.6;
        w[kCuts] = 2;
      }
    }
    Buffer<float> x(size_t(kRows * kVocab));
    Buffer<uint64_t> weights(size_t(kRows * kVocab));
    Buffer<uint64_t> work(std::vector<uint64_t>(size_t(kRows * sample_work(kVocab)), 0));
    Buffer<int64_t> out{size_t(kRows)};
    const SampleState state{reals.data(), wholes.data(), bias.data(), counts.data(), history.data(), 4};
    std::string bytes;
    for (int step = 0; step < 3; ++step) {  // again: what a launch leaves behind must serve the next
      sample_cuda(logits.data(), slots.data(), state, x.data(), weights.data(), work.data(), out.data(), kRows, kVocab,
                  true, true, nullptr);
      for (int64_t row = 0; row < kRows; ++row) {
        const std::vector<bool> may = allowed(logits.data() + row * kVocab, Kind(row));
        const int64_t token = out[size_t(row)];
        if (token < 0 || token >= kVocab || !may[size_t(token)]) check::wrong("row " + std::to_string(row));
        if (wholes[size_t(slots[size_t(row)] * kSampleWholes + kIndex)] != step + 1) check::wrong("the index");
      }
      out.append_to(bytes);
    }
    int held = 0;
    for (int64_t i = 0; i < kVocab; ++i) held += counts[size_t(i)];
    if (held != 2) check::wrong("the history holds " + std::to_string(held) + " tokens, wanted 2");

    Buffer<int64_t> tokens(std::vector<int64_t>{1, 2, 3, 4}), positions(std::vector<int64_t>{3, 7, 0, 4});
    Buffer<int64_t> places(std::vector<int64_t>(4, 0));
    Buffer<int32_t> lengths(std::vector<int32_t>{4, 8, 1, 5}), pages(std::vector<int32_t>{5, 1, 2, 3, 9, 8, 7, 6});
    advance_cuda(out.data(), tokens.data(), positions.data(), places.data(), lengths.data(), pages.data(), 4, 2, 4,
                 nullptr);
    const int64_t wanted[] = {1 * 4, 3 * 4, 9 * 4 + 1, 6 * 4 + 1};
    for (size_t row = 0; row < 4; ++row) {
      if (places[row] != wanted[row] || tokens[row] != out[row]) check::wrong("advance");
    }
    return bytes;
  });
}
