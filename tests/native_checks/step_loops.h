// A small model at random, and its passes (cpu/step.h) as plain loops in double.
#pragma once

#include <limits>

#include "check.h"
#include "cpu/step.h"
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
      step.layers.push_back(l);
    }
    step.head = matrix(c.hidden, c.vocabulary), step.logit_scale = 0.5f;
  }

  StepModel step;
  // query, key, value, out, gate, up, down; of a mixture query, key, value, out, router, then gate, up, down by expert.
  const Weight& weight(int64_t layer, int64_t which) const { return weights_[first_[size_t(layer)] + size_t(which)]; }
  const Weight& head() const { return weights_.back(); }
  double embedding(int64_t token, int64_t i) const {
    return element(table_.data(), c_.dtype, token * c_.hidden + i) * double(step.embedding_scale);
  }

 private:
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

// One pass: what step_cpu is given, and what the loops need to know.
struct Pass {
  std::vector<int64_t> sequence, position, logit_rows;  // of each row; rows with logits
  Buffer<int64_t> tokens{0};
};

// The loops. `moved`: every result is moved by up to its bound.
class Loops {
 public:
  Loops(const Case& c, const Model& model, const Angles& angles, bool moved, uint64_t seed)
      : c_(c), m_(model), angles_(angles), moved_(moved), random_(seed),
        keys_(c.windows.size(), std::vector<Doubles>(c.steps[0].size())), values_(keys_) {}

  Doubles logits(const Pass& pass) {
    const int64_t rows = int64_t(pass.position.size());
    Doubles x;
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t i = 0; i < c_.hidden; ++i) x.push_back(m_.embedding(pass.tokens[t], i));
    }
    for (size_t index = 0; index < c_.windows.size(); ++index) layer(pass, int64_t(index), x, rows);
    Doubles picked;
    for (int64_t row : pass.logit_rows) {
      picked.insert(picked.end(), x.data() + row * c_.hidden, x.data() + (row + 1) * c_.hidden);
    }
    const int64_t count = int64_t(pass.logit_rows.size());
    Doubles y = multiply(m_.head(), norm(picked, m_.step.final_norm, c_.hidden), count);
    for (double& value : y) value *= double(m_.step.logit_scale);
    return y;
  }

 private:
  double shift(double bound) { return moved_ ? bound * (2 * random_.uniform() - 1) : 0.0; }

  void layer(const Pass& pass, int64_t index, Doubles& x, int64_t rows) {
    const StepLayer& l = m_.step.layers[size_t(index)];
    Doubles h = norm(x, l.input_norm, c_.hidden);
    Doubles q = multiply(m_.weight(index, 0), h, rows), k = multiply(m_.weight(index, 1), h, rows);
    const Doubles v = multiply(m_.weight(index, 2), h, rows);
    if (c_.head_norms) q = norm(q, l.query_norm, c_.head_dim), k = norm(k, l.key_norm, c_.head_dim);
    rotate(q, c_.heads, pass, l.rope), rotate(k, c_.kv_heads, pass, l.rope);
    store(k, keys_[size_t(index)], pass, c_.key_bits), store(v, values_[size_t(index)], pass, c_.value_bits);
    Doubles a = multiply(m_.weight(index, 3), attention(q, index, l.window, pass), rows);
    if (c_.post_norms) a = norm(a, l.post_attention_norm, c_.hidden);
    for (size_t i = 0; i < x.size(); ++i) x[i] += a[i];
    h = norm(x, l.pre_mlp_norm, c_.hidden);
    Doubles m = l.moe.visits > 0 ? mixture(index, h, rows) : gated_mlp(index, 4, h, rows);
    if (c_.post_norms) m = norm(m, l.post_mlp_norm, c_.hidden);
    for (size_t i = 0; i < x.size(); ++i) x[i] += m[i];
  }

  // The three matrices from number `which` on.
  Doubles gated_mlp(int64_t index, int64_t which, const Doubles& h, int64_t rows) {
    Doubles gate = multiply(m_.weight(index, which), h, rows);
    const Doubles up = multiply(m_.weight(index, which + 1), h, rows);
    for (size_t i = 0; i < gate.size(); ++i) {
      gate[i] = activated(gate[i], m_.step.layers[size_t(index)].activation) * up[i];
      gate[i] += shift(6e-7 * std::fabs(gate[i]) + 1e-7 * std::fabs(up[i]));
    }
    return multiply(m_.weight(index, which + 2), gate, rows);
  }

  Doubles mixture(int64_t index, const Doubles& h, int64_t rows) {
    const StepMoe& moe = m_.step.layers[size_t(index)].moe;
    const Doubles logits = multiply(m_.weight(index, 4), h, rows);
    Doubles out;
    for (int64_t r = 0; r < rows; ++r) {
      const double* own = logits.data() + r * c_.experts;
      std::vector<bool> kept(size_t(c_.experts), false);
      double total = 0;
      for (int64_t v = 0; v < c_.visits; ++v) {
        int64_t best = -1;
        for (int64_t e = 0; e < c_.experts; ++e) {
          if (!kept[size_t(e)] && (best < 0 || own[e] > own[best])) best = e;
        }
        kept[size_t(best)] = true;
      }
      for (int64_t e = 0; e < c_.experts; ++e) total += kept[size_t(e)] || !moe.normalize ? std::exp(own[e]) : 0.0;
      const Doubles row(h.data() + r * c_.hidden, h.data() + (r + 1) * c_.hidden);
      Doubles sum(size_t(c_.hidden), 0.0);
      for (int64_t e = 0; e < c_.experts; ++e) {
        if (!kept[size_t(e)]) continue;
        const Doubles said = gated_mlp(index, 5 + 3 * e, row, 1);
        const double weight = std::exp(own[e]) / total;
        for (int64_t i = 0; i < c_.hidden; ++i) {
          sum[size_t(i)] += (weight + shift(0x1p-22 * weight)) * said[size_t(i)];
        }
      }
      out.insert(out.end(), sum.begin(), sum.end());
    }
    return out;
  }

  Doubles norm(const Doubles& x, const float* weight, int64_t cols) {
    Doubles y(x.size());
    for (size_t start = 0; start < x.size(); start += size_t(cols)) {
      double sum = 0;
      for (int64_t i = 0; i < cols; ++i) sum += x[start + size_t(i)] * x[start + size_t(i)];
      const double scale = 1.0 / std::sqrt(sum / double(cols) + double(m_.step.eps));
      for (int64_t i = 0; i < cols; ++i) {
        const double value = x[start + size_t(i)] * scale;
        y[start + size_t(i)] = value * (double(weight[i]) + double(m_.step.norm_offset));
        y[start + size_t(i)] += shift(0x1p-21 * std::fabs(value));
      }
    }
    return y;
  }

  Doubles multiply(const Weight& w, const Doubles& x, int64_t rows) {
    const int64_t inputs = w.step.inputs, outputs = w.step.outputs;
    Doubles y;
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = x.data() + r * inputs;
      Doubles sum(size_t(outputs), 0.0), size(sum), off(sum);
      double most = 0;
      for (int64_t k = 0; k < inputs; ++k) most = std::fmax(most, std::fabs(row[k]));
      const double error = c_.packed ? most / (w.step.residual_rows > 0 ? 32512.0 : 254.0) : 0.0;
      for (int64_t k = 0; k < inputs; ++k) {
        for (int64_t n = 0; n < outputs; ++n) {
          sum[size_t(n)] += row[k] * w.at(k, n), size[size_t(n)] += std::fabs(row[k] * w.at(k, n));
          off[size_t(n)] += moved_ ? shift(error) * w.at(k, n) : 0.0;
        }
      }
      for (int64_t n = 0; n < outputs; ++n) {
        y.push_back(sum[size_t(n)] + off[size_t(n)] + shift(w.error * size[size_t(n)]) + (c_.bias ? w.bias[n] : 0.0f));
      }
    }
    return y;
  }

  void rotate(Doubles& x, int64_t heads, const Pass& pass, int64_t which) const {
    const StepRope& rope = angles_.ropes[size_t(which)];
    for (size_t t = 0; t < pass.position.size(); ++t) {
      const int64_t row = angles_.place[size_t(pass.position[t])] * rope.half;
      for (int64_t h = 0; h < heads; ++h) {
        double* head = x.data() + (int64_t(t) * heads + h) * c_.head_dim;
        for (int64_t i = 0; i < rope.half; ++i) {
          const double c = rope.cos[row + i], s = rope.sin[row + i], a = head[i], b = head[i + rope.half];
          head[i] = a * c - b * s, head[i + rope.half] = b * c + a * s;
        }
      }
    }
  }

  // Behind the sequence's own. A code is off by half a step of its group's largest, turned or not; see kv_rows.h.
  void store(const Doubles& x, std::vector<Doubles>& to, const Pass& pass, int bits) {
    const int64_t width = c_.kv_heads * c_.head_dim;
    for (size_t t = 0; t < pass.sequence.size(); ++t) {
      Doubles& own = to[size_t(pass.sequence[t])];
      for (int64_t start = 0; start < width; start += c_.head_dim) {
        const double* head = x.data() + int64_t(t) * width + start;
        double size = 0;
        for (int64_t d = 0; d < c_.head_dim; ++d) size += head[d] * head[d];
        for (int64_t d = 0; d < c_.head_dim; ++d) {
          const double coded = std::sqrt(size) * (std::pow(0.5, bits) + 0x1p-11);
          own.push_back(head[d] + shift(bits ? coded : rounding(c_.dtype, head[d])));
        }
      }
    }
  }

  Doubles attention(const Doubles& q, int64_t index, int64_t window, const Pass& pass) const {
    Doubles out;
    const int64_t width = c_.kv_heads * c_.head_dim;
    for (size_t t = 0; t < pass.position.size(); ++t) {
      const Doubles& keys = keys_[size_t(index)][size_t(pass.sequence[t])];
      const Doubles& values = values_[size_t(index)][size_t(pass.sequence[t])];
      const int64_t last = pass.position[t], first = window > last ? 0 : last - window + 1;
      for (int64_t h = 0; h < c_.heads; ++h) {
        const int64_t lane = h / (c_.heads / c_.kv_heads) * c_.head_dim;
        const double* query = q.data() + (int64_t(t) * c_.heads + h) * c_.head_dim;
        Doubles mixed(size_t(c_.head_dim), 0.0);
        double total = 0;
        for (int64_t j = first; j <= last; ++j) {
          double score = 0;
          for (int64_t d = 0; d < c_.head_dim; ++d) score += query[d] * keys[size_t(j * width + lane + d)];
          score *= double(m_.step.attention_scale);
          const double cap = double(m_.step.attention_softcap);
          if (cap > 0) score = cap * std::tanh(score / cap);
          const double weight = std::exp(score);
          total += weight;
          for (int64_t d = 0; d < c_.head_dim; ++d) mixed[size_t(d)] += weight * values[size_t(j * width + lane + d)];
        }
        for (double value : mixed) out.push_back(value / total);
      }
    }
    return out;
  }

  const Case& c_;
  const Model& m_;
  const Angles& angles_;
  bool moved_;
  Random random_;
  std::vector<std::vector<Doubles>> keys_, values_;  // [layer][sequence]: (tokens, kv_heads * head_dim)
};

}  // namespace check
