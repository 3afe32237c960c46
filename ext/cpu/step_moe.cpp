#include "step_moe.h"

#include <cstring>

#include "linear_groups.h"
#include "route.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kVisitsAtOnce = 1024;  // a visit is a row at an expert; bounds the memory of a long prompt
constexpr int64_t kGrain = 16384;        // elements worth waking a thread for

// Who visits whom. Visits are numbered by expert, then by row.
struct Visits {
  std::vector<int64_t> starts;   // (experts + 1) where an expert's visits begin
  std::vector<int32_t> rows;     // of each visit
  std::vector<int64_t> numbers;  // (rows, visits of a row) in ascending order of experts
  std::vector<float> weights;    // of these

  void sort(const int32_t* kinds, const float* shares, int64_t row_count, int64_t experts, int64_t each) {
    starts.assign(size_t(experts + 1), 0);
    for (int64_t i = 0; i < row_count * each; ++i) ++starts[size_t(kinds[i]) + 1];
    for (int64_t e = 0; e < experts; ++e) starts[size_t(e) + 1] += starts[size_t(e)];
    rows.resize(size_t(row_count * each)), numbers.resize(rows.size()), weights.resize(rows.size());
    next_.assign(starts.begin(), starts.end());
    order_.resize(size_t(each));
    for (int64_t r = 0; r < row_count; ++r) {
      const int32_t* own = kinds + r * each;
      for (int64_t i = 0; i < each; ++i) {
        int64_t at = i;
        for (; at > 0 && own[order_[size_t(at - 1)]] > own[i]; --at) order_[size_t(at)] = order_[size_t(at - 1)];
        order_[size_t(at)] = i;
      }
      for (int64_t i = 0; i < each; ++i) {
        const int64_t from = order_[size_t(i)], number = next_[size_t(own[from])]++;
        rows[size_t(number)] = int32_t(r);
        numbers[size_t(r * each + i)] = number, weights[size_t(r * each + i)] = shares[r * each + from];
      }
    }
  }

 private:
  std::vector<int64_t> next_, order_;
};

// Some rows of an input times one matrix, and whether these are few enough for the residual is said by `batch`.
struct RowsProduct {
  const StepMatrix* w;
  const float* x;
  const int32_t* rows;  // linear_groups.h
  int64_t count, batch;
  float* y;
};

// Dense matrices want their rows side by side.
void multiply_dense(const RowsProduct& p) {
  static thread_local Scratch memory;
  const float* x = p.x;
  if (p.rows != nullptr) {
    float* gathered = memory.floats(p.count * p.w->inputs);
    for (int64_t i = 0; i < p.count; ++i) {
      std::memcpy(gathered + i * p.w->inputs, p.x + p.rows[i] * p.w->inputs, size_t(p.w->inputs) * sizeof(float));
    }
    x = gathered;
  }
  linear_dense_cpu(p.w->dense, x, p.y, p.count);
}

void multiply(const std::vector<RowsProduct>& products) {
  static thread_local std::vector<GroupProduct> packed;
  packed.clear();
  for (const RowsProduct& p : products) {
    if (p.w->packed.header == nullptr) {
      multiply_dense(p);
    } else {
      packed.push_back({p.w->packed, p.x, p.rows, p.count, p.batch <= p.w->residual_rows, p.y});
    }
  }
  linear_packed_groups(packed.data(), int64_t(packed.size()));
}

// to[i] += the visits' weighted outputs, one after another; said[0] is the output of visit `first`. In pieces that stay
// in registers.
void add_visits(const int64_t* numbers, const float* weights, int64_t count, const float* said, int64_t first,
                int64_t hidden, float* to) {
  constexpr int64_t piece = 32;
  for (int64_t begin = 0; begin < hidden; begin += piece) {
    const int64_t length = hidden - begin < piece ? hidden - begin : piece;
    if (length < piece) {
      for (int64_t v = 0; v < count; ++v) {
        const float* from = said + (numbers[v] - first) * hidden + begin;
        for (int64_t i = 0; i < length; ++i) to[begin + i] += weights[v] * from[i];
      }
      continue;
    }
    float sum[piece];
    std::memcpy(sum, to + begin, sizeof sum);
    for (int64_t v = 0; v < count; ++v) {
      const float* from = said + (numbers[v] - first) * hidden + begin;
      for (int64_t i = 0; i < piece; ++i) sum[i] += weights[v] * from[i];
    }
    std::memcpy(to + begin, sum, sizeof sum);
  }
}

}  // namespace

void step_moe(const StepMoe& m, Activation activation, const float* x, float* y, int64_t rows, Stopwatch& watch) {
  const int64_t hidden = m.router.inputs, experts = m.router.outputs, inner = m.gate[0].outputs, each = m.visits;
  const int64_t visits = rows * each, most = visits < kVisitsAtOnce ? visits : kVisitsAtOnce;
  static thread_local Scratch memory;
  static thread_local Visits own;
  static thread_local std::vector<int32_t> kinds;
  static thread_local std::vector<RowsProduct> opened, closed;
  Visits& sorted = own;  // a body on another thread would name its own
  float* const logits = memory.floats(rows * (experts + each + hidden) + most * (2 * inner + hidden));
  float* const shares = logits + rows * experts;
  float* const sum = shares + rows * each;
  float* const gate = sum + rows * hidden;
  float* const up = gate + most * inner;
  float* const said = up + most * inner;

  opened.assign(1, RowsProduct{&m.router, x, nullptr, rows, rows, logits});
  multiply(opened);
  watch.lap(Phase::mlp);
  kinds.resize(size_t(visits));
  route(logits, rows, experts, each, m.normalize, shares, kinds.data());
  sorted.sort(kinds.data(), shares, rows, experts, each);
  std::memset(sum, 0, size_t(rows * hidden) * sizeof(float));
  watch.lap(Phase::route);

  for (int64_t first = 0; first < visits; first += kVisitsAtOnce) {
    const int64_t last = first + most < visits ? first + most : visits;
    opened.clear(), closed.clear();
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t start = sorted.starts[size_t(e)], stop = sorted.starts[size_t(e) + 1], batch = stop - start;
      const int64_t begin = start < first ? first : start, end = stop < last ? stop : last, at = begin - first;
      if (begin >= end) continue;
      const int32_t* here = sorted.rows.data() + begin;
      opened.push_back({&m.gate[size_t(e)], x, here, end - begin, batch, gate + at * inner});
      opened.push_back({&m.up[size_t(e)], x, here, end - begin, batch, up + at * inner});
      closed.push_back({&m.down[size_t(e)], gate + at * inner, nullptr, end - begin, batch, said + at * hidden});
    }
    multiply(opened);
    watch.lap(Phase::mlp);
    gated(gate, up, gate, Dtype::float32, last - first, inner, inner, inner, activation);
    watch.lap(Phase::gated);
    multiply(closed);
    watch.lap(Phase::mlp);
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        // Of a row's ascending visits, those that are here.
        const int64_t* numbers = sorted.numbers.data() + r * each;
        int64_t from = 0, to = each;
        while (from < each && numbers[from] < first) ++from;
        while (to > from && numbers[to - 1] >= last) --to;
        add_visits(numbers + from, sorted.weights.data() + r * each + from, to - from, said, first, hidden,
                   sum + r * hidden);
      }
    };
    parallel_for(rows, add, 1 + kGrain / (hidden * each));
    watch.lap(Phase::route);
  }
  std::memcpy(y, sum, size_t(rows * hidden) * sizeof(float));
  watch.lap(Phase::route);
}

}  // namespace exl
