// A small model at random, for the passes of cpu/step.h.
#pragma once

#include <limits>

#include "check.h"
#include "cpu/step_lora.h"
#include "packed_matrix.h"

namespace check {

using Doubles = std::vector<double>;
constexpr int64_t kPositions = 64;

struct Weight {
  StepMatrix step{};
  Matrix packed;
  Buffer<uint8_t> dense{0};
  Buffer<float> bias{0};
  Doubles value;     // (inputs, outputs)
  double error = 0;  // of a product, relative to the sum of its terms' sizes

  double at(int64_t k, int64_t n) const { return value[size_t(k * step.outputs + n)]; }
};

// What a case consists of. Sequence s sends steps[i][s] tokens in pass i.
struct Case {
  bool packed = false;
  Dtype dtype = Dtype::float32;  // of dense matrices, the embeddings and pages of elements
  int key_bits = 0, value_bits = 0;
  int64_t hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, inner = 96, vocabulary = 50, page_size = 4;
  std::vector<int64_t> windows{std::numeric_limits<int64_t>::max(), 5};  // of each layer
  bool head_norms = true, post_norms = true, bias = false;
  int64_t experts = 0, visits = 0;  // of every second layer, from the first on; no biases then
  Activation activation = Activation::silu;
  std::vector<std::vector<double>> shares;  // of each adapter, its weight for every sequence
  std::vector<std::vector<int64_t>> steps;
};

class Model {
 public:
  Model(const Case& c, Random& random)
      : c_(c), random_(random), table_(c.vocabulary * c.hidden * element_bytes(c.dtype)) {
    for (int64_t i = 0; i < c.vocabulary * c.hidden; ++i) {
      put_element(table_.data(), c.dtype, i, random.normal());
    }
    step.table = table_.data(), step.table_dtype = c.dtype, step.embedding_scale = 1.5f;
    step.vocabulary = c.vocabulary, step.hidden = c.hidden;
    step.heads = c.heads, step.kv_heads = c.kv_heads, step.head_dim = c.head_dim;
    step.eps = 1e-5f, step.norm_offset = c.post_norms ? 1.0f : 0.0f;
    step.attention_scale = 1.0f / std::sqrt(float(c.head_dim)), step.attention_softcap = c.post_norms ? 20.0f : 0.0f;
    step.final_norm = norm(c.hidden);
    const int64_t wide = c.heads * c.head_dim, narrow = c.kv_heads * c.head_dim;
    for (size_t i = 0; i < c.windows.size(); ++i) {
      StepLayer l{};
      first_.push_back(weights_.size());
      l.input_norm = norm(c.hidden), l.pre_mlp_norm = norm(c.hidden);
      if (c.post_norms) l.post_attention_norm = norm(c.hidden), l.post_mlp_norm = norm(c.hidden);
      if (c.head_norms) l.query_norm = norm(c.head_dim), l.key_norm = norm(c.head_dim);
      l.query = matrix(c.hidden, wide), l.key = matrix(c.hidden, narrow), l.value = matrix(c.hidden, narrow);
      l.out = matrix(wide, c.hidden);
      if (c.experts > 0 && i % 2 == 0) {
        l.moe.router = matrix(c.hidden, c.experts);
        l.moe.visits = c.visits, l.moe.normalize = c.post_norms;
        rough_ = i + 1 == c.windows.size();
        for (int64_t e = 0; e < c.experts; ++e) {
          l.moe.gate.push_back(matrix(c.hidden, c.inner)), l.moe.up.push_back(matrix(c.hidden, c.inner));
          l.moe.down.push_back(matrix(c.inner, c.hidden));
        }
      } else {
        l.gate = matrix(c.hidden, c.inner), l.up = matrix(c.hidden, c.inner), l.down = matrix(c.inner, c.hidden);
      }
      l.activation = c.activation, l.window = c.windows[i], l.rope = int64_t(i % 2);
      const std::vector<StepMatrix*> own{&l.query, &l.key, &l.value, &l.out, &l.gate, &l.up, &l.down};
      for (size_t w = 0; w < (l.moe.visits > 0 ? 4 : 7); ++w) place(*own[w], first_.back() + w, int64_t(7 * i + w));
      step.layers.push_back(l);
    }
    step.head = matrix(c.hidden, c.vocabulary), step.logit_scale = 0.5f;
    place(step.head, weights_.size() - 1, int64_t(7 * c.windows.size()));
    adapters.resize(c.shares.size());
    for (StepAdapter& adapter : adapters) adapter.changes.resize(7 * c.windows.size() + 1);
    for (const Weight& w : weights_) adapt(w.step);
  }

  StepModel step;
  std::vector<StepAdapter> adapters;
  // query, key, value, out, gate, up, down; of a mixture query, key, value, out, router, then gate, up, down by expert.
  const Weight& weight(int64_t layer, int64_t which) const { return weights_[first_[size_t(layer)] + size_t(which)]; }
  const Weight& head() const { return weights_.back(); }
  double embedding(int64_t token, int64_t i) const {
    return element(table_.data(), c_.dtype, token * c_.hidden + i) * double(step.embedding_scale);
  }

 private:
  void place(StepMatrix& w, size_t number, int64_t place) { w.place = weights_[number].step.place = place; }

  // Every second place of the first adapter is left out, and the others have two changes.
  void adapt(const StepMatrix& w) {
    if (w.place < 0) return;
    for (size_t a = 0; a < adapters.size(); ++a) {
      for (int64_t i = 0; a > 0 ? i < 2 : i < w.place % 2; ++i) {
        const int64_t rank = 3 + 14 * i;
        adapters[a].changes[size_t(w.place)].push_back(
            {thin(w.inputs, rank), thin(rank, w.outputs), 0.25f + 0.25f * float(i)});
      }
    }
  }

  DenseWeights thin(int64_t inputs, int64_t outputs) {
    thin_.emplace_back(inputs * outputs * element_bytes(c_.dtype));
    for (int64_t i = 0; i < inputs * outputs; ++i) {
      put_element(thin_.back().data(), c_.dtype, i, random_.normal() / std::sqrt(float(inputs)));
    }
    return {thin_.back().data(), c_.dtype, inputs, outputs};
  }

  const float* norm(int64_t count) {
    norms_.emplace_back(count);
    for (float& w : norms_.back()) w = 0.3f * random_.normal() + (c_.post_norms ? 0.0f : 1.0f);
    return norms_.back().data();
  }

  StepMatrix matrix(int64_t inputs, int64_t outputs) {
    weights_.emplace_back();
    Weight& w = weights_.back();
    w.step.inputs = inputs, w.step.outputs = outputs;
    w.value.assign(size_t(inputs * outputs), 0);
    if (c_.packed) {
      w.packed = exl2({{5, 32}, {4, inputs - 32}}, outputs, true, false, random_);
      w.step.packed = w.packed.view();
      // Neighbours that cannot share a call. Not where it could change which experts are visited.
      w.step.residual_rows = weights_.size() % 3 == 0 && (c_.experts == 0 || rough_) ? 0 : int64_t(1) << 62;
      for (int64_t p = 0; p < w.packed.positions; ++p) {
        for (int64_t n = 0; n < outputs; ++n) {
          w.value[size_t(w.packed.input[size_t(p)] * outputs + n)] = w.packed.weight(p, n);
        }
      }
    } else {
      w.dense = Buffer<uint8_t>(inputs * outputs * element_bytes(c_.dtype));
      for (int64_t i = 0; i < inputs * outputs; ++i) {
        put_element(w.dense.data(), c_.dtype, i, random_.normal() / std::sqrt(float(inputs)));
        w.value[size_t(i % inputs * outputs + i / inputs)] = element(w.dense.data(), c_.dtype, i);
      }
      w.step.dense = {w.dense.data(), c_.dtype, inputs, outputs};
    }
    w.error = (double(inputs) / 8 + 14) * 0x1p-24;
    if (c_.bias) {
      w.bias = Buffer<float>(outputs);
      fill_normal(w.bias, random_, 0.5f);
      w.step.bias = w.bias.data();
    }
    return w.step;
  }

  const Case& c_;
  Random& random_;
  Buffer<uint8_t> table_;
  std::vector<Buffer<float>> norms_;
  std::vector<Buffer<uint8_t>> thin_;
  std::vector<Weight> weights_;
  std::vector<size_t> first_;  // of each layer
  bool rough_ = false;
};

// Angles of both ropes: the second turns half of a head. Row `place[p]` belongs to position p.
struct Angles {
  std::vector<int64_t> place;
  std::vector<Buffer<float>> memory;
  std::vector<StepRope> ropes;

  Angles(int64_t head_dim, Random& random) {
    for (int64_t p = 0; p < kPositions; ++p) place.push_back(p);
    random.shuffle(place);
    for (const int64_t half : {head_dim / 2, head_dim / 4}) {
      Buffer<float> cos(kPositions * half), sin(kPositions * half);
      for (int64_t i = 0; i < kPositions * half; ++i) {
        const double angle = 6.3 * random.uniform();
        cos[i] = float(std::cos(angle)), sin[i] = float(std::sin(angle));
      }
      ropes.push_back({cos.data(), sin.data(), half});
      memory.push_back(static_cast<Buffer<float>&&>(cos)), memory.push_back(static_cast<Buffer<float>&&>(sin));
    }
  }
};

}  // namespace check
