// Strings the operators together; see step.h. What is decided here (which matrices share a call, who is awake) changes
// no result.
#include "step.h"

#include <atomic>
#include <cstring>

#include "kv_append.h"
#include "rms_norm.h"
#include "rope.h"
#include "row_kernels.h"
#include "scratch.h"
#include "step_lora.h"
#include "step_moe.h"
#include "threads.h"

namespace exl {

const char* const kPhaseNames[] = {"embed", "norm", "project", "rope", "append", "attend", "out", "mlp", "gated",
                                   "route", "head", "draw"};

namespace {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for

// y[i] += x[i]
void add(float* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

void add_bias(const StepMatrix& w, float* y, int64_t rows) {
  if (w.bias == nullptr) return;
  parallel_for(
      rows,
      [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) add(y + r * w.outputs, w.bias, w.outputs);
      },
      1 + kGrain / w.outputs);
}

// y[i] = x @ w[i] + bias for matrices of one input. Packed ones share a call while they ask for the same residual.
void multiply_all(const StepMatrix* const* w, float* const* y, int count, const float* x, int64_t rows) {
  for (int i = 0; i < count;) {
    Product products[kMostTogether];
    int many = 0;
    const int64_t residual = w[i]->residual_rows;
    for (; i < count && many < kMostTogether && w[i]->packed.header != nullptr && w[i]->residual_rows == residual; ++i) {
      products[many++] = {w[i]->packed, y[i]};
    }
    if (many > 0) {
      linear_packed_cpu(products, many, x, rows, residual);
    } else {
      linear_dense_cpu(w[i]->dense, x, y[i], rows);
      ++i;
    }
  }
  for (int i = 0; i < count; ++i) add_bias(*w[i], y[i], rows);
}

// Working memory of a pass, cut from one piece.
struct Rooms {
  float *normed, *query, *key, *value, *mixed, *gate, *up;
};

class Pass {
 public:
  Pass(const StepModel& model, const StepBatch& batch, float* x, StepTimes* times)
      : m_(model), b_(batch), x_(x), watch_(times) {
    const int64_t wide = m_.heads * m_.head_dim, narrow = m_.kv_heads * m_.head_dim;
    int64_t inner = 0;
    for (const StepLayer& layer : m_.layers) inner = layer.gate.outputs > inner ? layer.gate.outputs : inner;
    const int64_t widths[] = {m_.hidden, wide, narrow, narrow, wide > m_.hidden ? wide : m_.hidden, inner, inner};
    float** const rooms[] = {&to_.normed, &to_.query, &to_.key, &to_.value, &to_.mixed, &to_.gate, &to_.up};
    static thread_local Scratch memory;
    int64_t total = 0;
    for (int64_t width : widths) total += (width * b_.rows + 15) / 16 * 16;
    float* at = memory.floats(total);
    for (int i = 0; i < 7; ++i) {
      *rooms[i] = at;
      at += (widths[i] * b_.rows + 15) / 16 * 16;
    }
    gather_angles();
  }

  void embed() {
    const int64_t row_bytes = m_.hidden * element_bytes(m_.table_dtype);
    const RowKernels& kernels = row_kernels();
    parallel_for(
        b_.rows,
        [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            float* row = x_ + t * m_.hidden;
            const char* from = static_cast<const char*>(m_.table) + b_.tokens[t] * row_bytes;
            kernels.convert(from, m_.table_dtype, row, Dtype::float32, m_.hidden);
            if (m_.embedding_scale == 1.0f) continue;
            for (int64_t i = 0; i < m_.hidden; ++i) row[i] *= m_.embedding_scale;
          }
        },
        1 + kGrain / m_.hidden);
    watch_.lap(Phase::embed);
  }

  // `next`: the layer that follows in this call, or null.
  void layer(int64_t index, const StepLayer* next) {
    const StepLayer& l = m_.layers[size_t(index)];
    if (!normed_) norm(x_, l.input_norm, to_.normed, b_.rows);
    const StepMatrix* const projections[] = {&l.query, &l.key, &l.value};
    float* const projected[] = {to_.query, to_.key, to_.value};
    multiply(projections, projected, 3, to_.normed, b_.rows);
    watch_.lap(Phase::project);
    attend(l, index);
    multiply(l.out, to_.normed, to_.mixed, b_.rows);
    watch_.lap(Phase::out);
    join(l.post_attention_norm, l.pre_mlp_norm);
    if (l.moe.visits > 0) {
      step_moe(l.moe, l.activation, to_.normed, to_.normed, b_.rows, watch_);
      return leave(l, next);
    }
    const StepMatrix* const halves[] = {&l.gate, &l.up};
    float* const opened[] = {to_.gate, to_.up};
    multiply(halves, opened, 2, to_.normed, b_.rows);
    watch_.lap(Phase::mlp);
    const int64_t inner = l.gate.outputs;
    gated(to_.gate, to_.up, to_.gate, Dtype::float32, b_.rows, inner, inner, inner, l.activation);
    watch_.lap(Phase::gated);
    multiply(l.down, to_.normed, to_.gate, b_.rows);
    watch_.lap(Phase::mlp);
    leave(l, next);
  }

  void head(float* logits) {
    const bool all = b_.logits == b_.rows;  // rows are given in order, each at most once
    for (int64_t i = 0; i < b_.logits; ++i) {
      const float* row = x_ + (all ? i : b_.logit_rows[i]) * m_.hidden;
      std::memcpy(to_.mixed + i * m_.hidden, row, size_t(m_.hidden) * sizeof(float));
    }
    norm(to_.mixed, m_.final_norm, to_.normed, b_.logits);
    multiply(m_.head, logits, to_.normed, b_.logits, b_.logit_rows);
    if (m_.logit_scale != 1.0f) {
      const int64_t width = m_.head.outputs;
      parallel_for(
          b_.logits,
          [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * width; i < end * width; ++i) logits[i] *= m_.logit_scale;
          },
          1 + kGrain / width);
    }
    watch_.lap(Phase::head);
  }

 private:
  // `tokens`: which of the pass each row of x is, null: they are all. With what the adapters of these add.
  void multiply(const StepMatrix* const* w, float* const* y, int count, const float* x, int64_t rows,
                const int64_t* tokens = nullptr) {
    multiply_all(w, y, count, x, rows);
    for (int i = 0; i < count && b_.share_count > 0; ++i) step_lora(b_, *w[i], x, rows, tokens, y[i]);
  }

  void multiply(const StepMatrix& w, float* y, const float* x, int64_t rows, const int64_t* tokens = nullptr) {
    const StepMatrix* one = &w;
    multiply(&one, &y, 1, x, rows, tokens);
  }

  // Row t of each rope's angles is token t's.
  void gather_angles() {
    static thread_local Scratch memory;
    int64_t size = 0;
    for (int64_t i = 0; i < b_.rope_count; ++i) size += 2 * b_.rows * b_.ropes[i].half;
    float* at = memory.floats(size);
    const auto rows_of = [&](const float* from, int64_t half) {
      const float* first = at;
      for (int64_t t = 0; t < b_.rows; ++t, at += half) {
        std::memcpy(at, from + b_.places[t] * half, size_t(half) * sizeof(float));
      }
      return first;
    };
    for (int64_t i = 0; i < b_.rope_count; ++i) {
      const StepRope& r = b_.ropes[i];
      const float *cos = rows_of(r.cos, r.half), *sin = rows_of(r.sin, r.half);
      ropes_.push_back({cos, sin, r.half});
    }
  }

  void norm(const float* x, const float* weight, float* y, int64_t rows) {
    rms_norm(x, weight, y, Dtype::float32, rows, m_.hidden, m_.eps, m_.norm_offset);
    watch_.lap(Phase::norm);
  }

  // From to_.query, to_.key, to_.value to to_.mixed.
  void attend(const StepLayer& l, int64_t index) {
    if (l.query_norm != nullptr) {
      rms_norm(to_.query, l.query_norm, to_.query, Dtype::float32, b_.rows * m_.heads, m_.head_dim, m_.eps,
               m_.norm_offset);
      rms_norm(to_.key, l.key_norm, to_.key, Dtype::float32, b_.rows * m_.kv_heads, m_.head_dim, m_.eps,
               m_.norm_offset);
      watch_.lap(Phase::norm);
    }
    const StepRope& r = ropes_[size_t(l.rope)];
    const int64_t dim = m_.head_dim;
    rope(to_.query, Dtype::float32, b_.rows, m_.heads, dim, m_.heads * dim, 2 * r.half, r.cos, r.sin);
    rope(to_.key, Dtype::float32, b_.rows, m_.kv_heads, dim, m_.kv_heads * dim, 2 * r.half, r.cos, r.sin);
    watch_.lap(Phase::rope);
    const StepHome& home = b_.homes[index];
    const StepGroup& group = b_.groups[home.group];
    append(to_.key, group.keys, home.place, group.slots);
    append(to_.value, group.values, home.place, group.slots);
    watch_.lap(Phase::append);
    AttentionArgs a{};
    a.q = to_.query;
    a.k_pages = place(group.keys, home.place);
    a.v_pages = place(group.values, home.place);
    a.dtype = b_.page_dtype;
    a.key_bits = group.keys.bits, a.value_bits = group.values.bits;
    a.q_starts = b_.q_starts, a.kv_lengths = b_.kv_lengths, a.page_table = group.page_table;
    a.sequences = b_.sequences, a.table_width = b_.table_width;
    a.heads = m_.heads, a.kv_heads = m_.kv_heads, a.head_dim = dim;
    a.page_size = b_.page_size;
    a.window = l.window;
    a.scale = m_.attention_scale, a.softcap = m_.attention_softcap;
    a.out = to_.mixed;
    paged_attention_cpu(a);
    watch_.lap(Phase::attend);
  }

  static char* place(const StepPages& pages, int64_t layer) {
    return static_cast<char*>(pages.data) + layer * pages.stride;
  }

  void append(const float* from, const StepPages& to, int64_t layer, const int64_t* slots) {
    const int64_t width = m_.kv_heads * m_.head_dim;
    if (to.bits == 0) {
      kv_append(from, Dtype::float32, place(to, layer), b_.page_dtype, slots, b_.rows, width, width);
    } else {
      kv_append_codes(from, Dtype::float32, reinterpret_cast<uint8_t*>(place(to, layer)), to.bits, slots, b_.rows,
                      m_.kv_heads, m_.head_dim, width);
    }
  }

  // x += to_.normed, which a layer's half has left there, after a norm of its own if it has one. Then x normed by
  // `next` to to_.normed, unless that is null.
  void join(const float* post_norm, const float* next) {
    if (post_norm != nullptr) norm(to_.normed, post_norm, to_.normed, b_.rows);
    if (next != nullptr) {
      add_rms_norm(x_, to_.normed, next, to_.normed, b_.rows, m_.hidden, m_.eps, m_.norm_offset);
      return watch_.lap(Phase::norm);
    }
    parallel_for(
        b_.rows,
        [&](int64_t begin, int64_t end) {
          add(x_ + begin * m_.hidden, to_.normed + begin * m_.hidden, (end - begin) * m_.hidden);
        },
        1 + kGrain / m_.hidden);
    watch_.lap(Phase::norm);
  }

  // The end of a layer: its second half is in to_.normed.
  void leave(const StepLayer& l, const StepLayer* next) {
    join(l.post_mlp_norm, next == nullptr ? nullptr : next->input_norm);
    normed_ = next != nullptr;
  }

  const StepModel& m_;
  const StepBatch& b_;
  float* const x_;
  Rooms to_;
  std::vector<StepRope> ropes_;
  bool normed_ = false;  // to_.normed is the input of the next layer
  Stopwatch watch_;
};

}  // namespace

bool step_cpu(const StepModel& model, const StepBatch& batch, int64_t first, int64_t last, float* x, float* logits,
              StepTimes* times, const std::atomic<bool>* stop) {
  if (batch.rows <= 0) return true;
  const Awake awake;
  Pass pass(model, batch, x, times);
  if (first == 0) pass.embed();
  for (int64_t index = first; index < last; ++index) {
    if (stop != nullptr && stop->load(std::memory_order_relaxed)) return false;
    pass.layer(index, index + 1 < last ? &model.layers[size_t(index + 1)] : nullptr);
  }
  if (last == int64_t(model.layers.size())) pass.head(logits);
  return true;
}

bool all_finite(const float* x, int64_t count) {
  constexpr int64_t lanes = 16;
  std::atomic<bool> good{true};
  parallel_for(
      count,
      [&](int64_t begin, int64_t end) {
        float sum[lanes] = {};  // of zeros, and NaN where one is not finite
        int64_t i = begin;
        for (; i + lanes <= end; i += lanes) {
          for (int64_t l = 0; l < lanes; ++l) sum[l] += x[i + l] * 0.0f;
        }
        for (; i < end; ++i) sum[0] += x[i] * 0.0f;
        for (int64_t l = 1; l < lanes; ++l) sum[0] += sum[l];
        if (sum[0] != 0.0f) good.store(false, std::memory_order_relaxed);
      },
      1 << 16);
  return good.load();
}

}  // namespace exl
