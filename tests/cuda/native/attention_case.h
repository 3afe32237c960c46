// One batch for the attention kernels, and what they should make of it in double. For the drivers in this folder, which
// run the kernels under sanitizers: every buffer is a heap block of its exact size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../../ext/common/half.h"
#include "../../../ext/common/kv_rows.h"
#include "../../../ext/cuda/attention.h"
#include "check.h"

struct Sequence {
  int rows, length;
};

struct Case {
  const char* name;
  std::vector<Sequence> sequences;
  int heads, kv_heads, head_dim;
  exl::PageKind kind;
  int key_bits, value_bits;
  int page_size, window;
  float softcap;
};

using check::Buffer;

class Batch {
 public:
  explicit Batch(const Case& c) : c_(c), random_(unsigned(c.head_dim + 7 * c.key_bits)) {
    for (const Sequence& s : c.sequences) tokens_ += s.rows, most_keys_ = std::max(most_keys_, s.length);
    width_ = (most_keys_ + c.page_size - 1) / c.page_size;
    starts_.push_back(0);
    std::vector<int> order;
    int pages = 1;  // page 0 belongs to nobody
    for (const Sequence& s : c.sequences) {
      starts_.push_back(starts_.back() + s.rows);
      lengths_.push_back(s.length);
      for (int p = 0; p * c.page_size < s.length; ++p) order.push_back(pages++);
    }
    std::shuffle(order.begin(), order.end(), random_);
    for (size_t s = 0, next = 0; s < c.sequences.size(); ++s) {
      for (int p = 0; p < width_; ++p) {
        // Pages that no row sees are not to be looked up.
        const int oldest = std::max(0, lengths_[s] - c.sequences[s].rows - c.window + 1);
        const bool own = p * c.page_size < lengths_[s];
        table_.push_back(own && (p + 1) * c.page_size > oldest ? order[next] : -1000000);
        next += own;
      }
    }
    std::normal_distribution<float> normal;
    for (int i = 0; i < tokens_ * c.heads * c.head_dim; ++i) q_.push_back(exl::float_to_half(2 * normal(random_)));
    for (int which = 0; which < 2; ++which) fill_pages(which, pages);
  }

  // What `run` makes of the batch, after a look at every value. Throws when one is wrong.
  template <class Run>
  std::string check(const Run& run) {
    exl::CudaAttention a{};
    Buffer<uint16_t> q(q_), result(q_.size());
    Buffer<uint8_t> keys(pages_[0]), values(pages_[1]);
    Buffer<int32_t> starts(starts_), lengths(lengths_), table(table_);
    a.q = q.data(), a.k_pages = keys.data(), a.v_pages = values.data(), a.kind = c_.kind;
    a.key_bits = c_.key_bits, a.value_bits = c_.value_bits;
    a.q_starts = starts.data(), a.kv_lengths = lengths.data(), a.page_table = table.data();
    a.tokens = tokens_, a.sequences = int(c_.sequences.size()), a.table_width = width_;
    a.heads = c_.heads, a.kv_heads = c_.kv_heads, a.head_dim = c_.head_dim, a.page_size = c_.page_size;
    a.window = c_.window, a.scale = scale(), a.softcap = c_.softcap, a.out = result.data();
    const exl::DecodeWorkspace space = exl::decode_workspace(a);
    Buffer<float> partial{size_t(space.floats)};
    Buffer<int32_t> tickets(std::vector<int32_t>(size_t(space.tickets), 0));
    a.partial = partial.data(), a.tickets = tickets.data();
    for (int repeat = 0; repeat < 2; ++repeat) {  // twice: tickets must have been put back
      std::memset(result.data(), 0xff, result.size() * 2);
      run(a);
    }
    compare(result);
    std::string bytes;
    result.append_to(bytes);
    return bytes;
  }

 private:
  float scale() const { return 1.0f / std::sqrt(float(c_.head_dim)); }
  bool codes() const { return c_.kind == exl::PageKind::codes; }

  void fill_pages(int which, int pages) {
    const int bits = which == 0 ? c_.key_bits : c_.value_bits, dim = c_.head_dim;
    const size_t row = codes() ? size_t(exl::kv_row_bytes(dim, bits)) : size_t(2 * dim);
    const size_t rows = size_t(pages) * size_t(c_.page_size * c_.kv_heads);
    pages_[which].assign(rows * row, 0xff);  // unseen memory is NaN
    wide_[which].assign(rows * size_t(dim), 0.0f);
    std::normal_distribution<float> normal;
    for (size_t s = 0; s < c_.sequences.size(); ++s) {
      for (int j = 0; j < lengths_[s]; ++j) {
        const int page = table_[s * size_t(width_) + size_t(j / c_.page_size)];
        if (page < 0) continue;
        for (int h = 0; h < c_.kv_heads; ++h) {
          const size_t n = size_t(page * c_.page_size + j % c_.page_size) * size_t(c_.kv_heads) + size_t(h);
          uint8_t* to = &pages_[which][n * row];
          float* wide = &wide_[which][n * size_t(dim)];
          if (!codes()) {
            for (int d = 0; d < dim; ++d) {
              const float v = normal(random_);
              const bool half = c_.kind == exl::PageKind::float16;
              const uint16_t narrow = half ? exl::float_to_half(v) : exl::float_to_bfloat16(v);
              std::memcpy(to + 2 * d, &narrow, 2);
              wide[d] = half ? exl::half_to_float(narrow) : exl::bfloat16_to_float(narrow);
            }
            continue;
          }
          std::memset(to, 0, row);
          const float middle = exl::kv_middle(bits);
          for (int d = 0; d < dim; ++d) {
            if (d % 32 == 0) {
              const uint16_t half = exl::float_to_half(0.5f + std::fabs(normal(random_)));
              std::memcpy(to + d / 32 * 2, &half, 2);
            }
            uint16_t half;
            std::memcpy(&half, to + d / 32 * 2, 2);
            const int code = int(random_() % (1u << bits));
            put_code(to + 2 * exl::kv_groups(dim) + d / 16 * 2 * bits, bits, d % 16, code);
            wide[d] = (float(code) - (middle - 0.5f)) * exl::half_to_float(half) / middle;
          }
        }
      }
    }
  }

  static void put_code(uint8_t* step, int bits, int j, int code) {
    int below = bits;
    for (int width = 8; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      below -= width;
      for (int bit = 0; bit < width; ++bit) {
        const int at = exl::kv_code_bit(width, j) + bit;
        step[at / 8] = uint8_t(step[at / 8] | (code >> (below + bit) & 1) << at % 8);
      }
      step += 2 * width;
    }
  }

  // In place: blocks of 32, then of what powers of two are left.
  static void rotate(std::vector<double>& x) {
    for (size_t start = 0, size = 32; start < x.size();) {
      while (size > x.size() - start) size /= 2;
      for (size_t span = 1; span < size; span *= 2) {
        for (size_t i = 0; i < size; ++i) {
          if ((i & span) != 0) continue;
          const double low = x[start + i], high = x[start + i + span];
          x[start + i] = low + high, x[start + i + span] = low - high;
        }
      }
      for (size_t i = 0; i < size; ++i) x[start + i] /= std::sqrt(double(size));
      start += size;
    }
  }

  void compare(Buffer<uint16_t>& got) const {
    const int dim = c_.head_dim, group = c_.heads / c_.kv_heads;
    for (size_t s = 0; s < c_.sequences.size(); ++s) {
      for (int r = 0; r < c_.sequences[s].rows; ++r) {
        const int index = lengths_[s] - c_.sequences[s].rows + r, oldest = std::max(0, index - c_.window + 1);
        for (int h = 0; h < c_.heads; ++h) {
          const size_t at = (size_t(starts_[s] + r) * size_t(c_.heads) + size_t(h)) * size_t(dim);
          std::vector<double> q, out(size_t(dim), 0.0), scores;
          for (int d = 0; d < dim; ++d) q.push_back(exl::half_to_float(q_[at + size_t(d)]));
          if (codes()) {  // the kernels round once more here
            rotate(q);
            for (double& v : q) v = exl::half_to_float(exl::float_to_half(float(v)));
          }
          double most = -INFINITY, slack = 0, sum = 0, largest = 0;
          for (int j = oldest; j <= index; ++j) {
            const float* k = row(0, s, j, h / group);
            double score = 0, absolute = 0;
            for (int d = 0; d < dim; ++d) score += q[size_t(d)] * k[d], absolute += std::fabs(q[size_t(d)] * k[d]);
            score *= scale(), absolute *= scale();
            if (c_.softcap > 0) score = c_.softcap * std::tanh(score / c_.softcap);
            // float32 sums; in prefill the widened keys are halves
            const bool rounded = codes() && c_.sequences[s].rows > exl::kDecodeRows;
            const double each = dim / 8388608.0 + (rounded ? 1.0 / 2048 : 0.0);
            slack = std::max(slack, absolute * each + std::fabs(score) / 1048576);
            scores.push_back(score), most = std::max(most, score);
          }
          for (int j = oldest; j <= index; ++j) {
            const double weight = std::exp(scores[size_t(j - oldest)] - most);
            const float* v = row(1, s, j, h / group);
            sum += weight;
            for (int d = 0; d < dim; ++d) {
              out[size_t(d)] += weight * v[d];
              largest = std::max(largest, std::fabs(double(v[d])));
            }
          }
          for (double& v : out) v /= sum;
          if (codes()) rotate(out), largest *= std::sqrt(32.0);
          // weights, values and the result are halves: one rounding each
          const double bound = largest * (2 * (std::exp(slack) - 1) + 3.0 / 2048) + 1e-6;
          for (int d = 0; d < dim; ++d) {
            check::near(exl::half_to_float(got[at + size_t(d)]), out[size_t(d)], bound, c_.name, int64_t(at) + d);
          }
        }
      }
    }
  }

  const float* row(int which, size_t s, int j, int head) const {
    const int page = table_[s * size_t(width_) + size_t(j / c_.page_size)];
    const size_t n = size_t(page * c_.page_size + j % c_.page_size) * size_t(c_.kv_heads) + size_t(head);
    return &wide_[which][n * size_t(c_.head_dim)];
  }

  const Case c_;
  std::mt19937 random_;
  int tokens_ = 0, most_keys_ = 0, width_ = 0;
  std::vector<int32_t> starts_, lengths_, table_;
  std::vector<uint16_t> q_;
  std::vector<uint8_t> pages_[2];
  std::vector<float> wide_[2];
};
