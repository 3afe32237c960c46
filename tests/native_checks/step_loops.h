// The passes of a small model (cpu/step.h) as plain loops in double.
#pragma once

#include "step_model.h"

namespace check {

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
    pass_ = &pass;
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
      if (w.step.place >= 0) add_adapters(w.step, row, r, y.data() + r * outputs);
    }
    return y;
  }

  void add_adapters(const StepMatrix& w, const double* x, int64_t r, double* y) {
    const int64_t token = w.place == m_.step.head.place ? pass_->logit_rows[size_t(r)] : r;
    for (size_t a = 0; a < m_.adapters.size(); ++a) {
      const double weight = c_.shares[a][size_t(pass_->sequence[size_t(token)])];
      for (const StepChange& c : m_.adapters[a].changes[size_t(w.place)]) {
        Doubles narrow;
        double size = 0;
        for (int64_t i = 0; i < c.down.outputs; ++i) {
          double sum = 0;
          for (int64_t k = 0; k < w.inputs; ++k) sum += x[k] * element(c.down.weight, c.down.dtype, i * w.inputs + k);
          narrow.push_back(sum * weight * double(c.scale));
          size += std::fabs(narrow.back());
        }
        const int64_t rank = c.down.outputs;
        for (int64_t n = 0; n < w.outputs; ++n) {
          double sum = 0;
          for (int64_t i = 0; i < rank; ++i) sum += narrow[size_t(i)] * element(c.up.weight, c.up.dtype, n * rank + i);
          y[n] += sum + shift((double(w.inputs) / 8 + 28) * 0x1p-24 * size);
        }
      }
    }
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
  const Pass* pass_ = nullptr;
  bool moved_;
  Random random_;
  std::vector<std::vector<Doubles>> keys_, values_;  // [layer][sequence]: (tokens, kv_heads * head_dim)
};

}  // namespace check
