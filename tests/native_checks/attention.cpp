// Attention over paged keys and values (cpu/attention.h), as floats and as codes, and writing the codes (kv_append.h).
#include "cpu/attention.h"

#include "check.h"
#include "common/kv_rows.h"
#include "cpu/kv_append.h"

using namespace exl;
using check::Buffer;
using check::Random;

namespace {

// The number that code j of a step of 16 stands for, read plane by plane as common/kv_rows.h draws them.
int code_at(const uint8_t* step, int bits, int j) {
  int code = 0, below = bits;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    below -= width;
    const int bit = width == 4 ? j / 2 * 4 + j % 2 * 32 : width * j;
    code |= (step[bit / 8] >> bit % 8 & ((1 << width) - 1)) << below;
    step += 2 * width;
  }
  return code;
}

// A head times the blocks of Hadamard matrices: 32s, then the powers of two of what is left, largest first.
std::vector<double> rotated(const std::vector<double>& x) {
  std::vector<double> y(x.size());
  size_t start = 0;
  for (size_t size = 32; start < x.size(); start += size) {
    while (size > x.size() - start) size /= 2;
    for (size_t i = 0; i < size; ++i) {
      for (size_t j = 0; j < size; ++j) {
        const double value = x[start + j] / std::sqrt(double(size));
        y[start + i] += __builtin_popcountll(i & j) % 2 == 1 ? -value : value;
      }
    }
  }
  return y;
}

std::vector<double> decoded(const uint8_t* row, int64_t head_dim, int bits) {
  std::vector<double> out;
  const uint8_t* steps = row + 2 * ((head_dim + 31) / 32);
  const double middle = double(1 << (bits - 1));
  for (int64_t d = 0; d < head_dim; ++d) {
    uint16_t half;
    std::memcpy(&half, row + d / 32 * 2, 2);
    out.push_back((code_at(steps + d / 16 * 2 * bits, bits, int(d % 16)) - (middle - 0.5)) * half_to_float(half) / middle);
  }
  return out;
}

struct Sequence {
  int64_t rows, keys;
};

struct Case {
  std::vector<Sequence> sequences;
  int64_t heads, kv_heads, head_dim, page_size;
  int64_t window = int64_t(1) << 40;
  float softcap = 0;
  Dtype dtype = Dtype::float32;
  int key_bits = 0, value_bits = 0;
};

// Pages of one kind in an order of their own; slots without a key hold NaN, or 0xff where they are codes.
struct Pages {
  Buffer<uint8_t> memory;
  std::vector<std::vector<double>> head;  // [slot * kv_heads + h], as they are stored: rotated if codes

  Pages(const Case& c, int bits, const std::vector<int64_t>& slots, int64_t slot_count, Random& random)
      : memory(slot_count * c.kv_heads * (bits ? kv_row_bytes(c.head_dim, bits) : c.head_dim * element_bytes(c.dtype))),
        head(size_t(slot_count * c.kv_heads)) {
    const int64_t tokens = int64_t(slots.size()), width = c.kv_heads * c.head_dim;
    Buffer<float> x(tokens * width);
    fill_normal(x, random);
    for (int64_t t = 0; t < tokens; t += 11) x[t * width] *= 20.0f;
    for (int64_t d = 0; d < c.head_dim && tokens > 3; ++d) x[3 * width + d] = 0.0f;
    const Buffer<int64_t> to = check::guarded(slots);
    if (bits == 0) {
      kv_append(x.data(), Dtype::float32, memory.data(), c.dtype, to.data(), tokens, width, width);
    } else {
      kv_append_codes(x.data(), Dtype::float32, memory.data(), bits, to.data(), tokens, c.kv_heads, c.head_dim, width);
    }
    for (int64_t n = 0; n < tokens * c.kv_heads; ++n) {
      const int64_t at = slots[size_t(n / c.kv_heads)] * c.kv_heads + n % c.kv_heads;
      std::vector<double>& values = head[size_t(at)];
      if (bits == 0) {
        for (int64_t d = 0; d < c.head_dim; ++d) {
          values.push_back(check::element(memory.data(), c.dtype, at * c.head_dim + d));
        }
        continue;
      }
      values = decoded(memory.data() + at * kv_row_bytes(c.head_dim, bits), c.head_dim, bits);
      const float* from = x.data() + n * c.head_dim;
      check_codes(rotated(std::vector<double>(from, from + c.head_dim)), values, bits);
    }
  }

  // Half a step, the rounding of the scale to a half and of the rotation to float32 apart from what went in.
  static void check_codes(const std::vector<double>& wanted, const std::vector<double>& got, int bits) {
    for (size_t start = 0; start < wanted.size(); start += 32) {
      const size_t stop = start + 32 < wanted.size() ? start + 32 : wanted.size();
      double most = 0;
      for (size_t d = start; d < stop; ++d) most = std::fmax(most, std::fabs(wanted[d]));
      const double bound = most * (std::pow(0.5, bits) + 0x1p-11 + 1e-5) + 2e-8;
      for (size_t d = start; d < stop; ++d) check::expect_near(got[d], wanted[d], bound, "code", 0, int64_t(d));
    }
  }
};

void check_case(const check::Ways& ways, const std::string& name, const Case& c, Random& random) {
  check::begin(name);
  const int64_t sequences = int64_t(c.sequences.size());
  int64_t pages = 1, table_width = 1;  // one page is nobody's
  for (const Sequence& s : c.sequences) {
    const int64_t own = (s.keys + c.page_size - 1) / c.page_size;
    pages += own;
    table_width = own > table_width ? own : table_width;
  }
  std::vector<int32_t> order, table(size_t(sequences * table_width), -1), starts{0}, lengths;
  for (int64_t p = 0; p < pages; ++p) order.push_back(int32_t(p));
  random.shuffle(order);
  std::vector<int64_t> slots;
  std::vector<std::vector<int64_t>> slot_of;
  for (int64_t s = 0, next = 0; s < sequences; ++s) {
    slot_of.emplace_back();
    for (int64_t j = 0; j < c.sequences[size_t(s)].keys; ++j) {
      if (j % c.page_size == 0) table[size_t(s * table_width + j / c.page_size)] = order[size_t(next++)];
      slots.push_back(table[size_t(s * table_width + j / c.page_size)] * c.page_size + j % c.page_size);
      slot_of.back().push_back(slots.back());
    }
    starts.push_back(starts.back() + int32_t(c.sequences[size_t(s)].rows));
    lengths.push_back(int32_t(c.sequences[size_t(s)].keys));
  }
  set_threads(4);
  const Pages k(c, c.key_bits, slots, pages * c.page_size, random), v(c, c.value_bits, slots, pages * c.page_size, random);
  const int64_t tokens = starts.back(), group = c.heads / c.kv_heads, count = tokens * c.heads * c.head_dim;
  Buffer<float> q(count);
  fill_normal(q, random);
  const auto page_table = check::guarded(table), q_starts = check::guarded(starts), kv = check::guarded(lengths);
  const float scale = 1.0f / std::sqrt(float(c.head_dim));

  std::vector<double> value, bound;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t r = 0; r < c.sequences[size_t(s)].rows; ++r) {
      const int64_t index = c.sequences[size_t(s)].keys - c.sequences[size_t(s)].rows + r;
      const int64_t oldest = index - c.window + 1 > 0 ? index - c.window + 1 : 0;
      for (int64_t h = 0; h < c.heads; ++h) {
        const float* from = q.data() + ((starts[size_t(s)] + r) * c.heads + h) * c.head_dim;
        std::vector<double> query(from, from + c.head_dim), score, mixed(size_t(c.head_dim));
        if (c.key_bits != 0) query = rotated(query);
        double most = -INFINITY, query_size = 0, key_size = 0, total = 0, value_size = 0;
        for (double x : query) query_size += x * x;
        const auto head = [&](const Pages& p, int64_t j) -> const std::vector<double>& {
          return p.head[size_t(slot_of[size_t(s)][size_t(j)] * c.kv_heads + h / group)];
        };
        for (int64_t j = oldest; j <= index; ++j) {
          double sum = 0, size = 0;
          for (size_t d = 0; d < query.size(); ++d) sum += query[d] * head(k, j)[d], size += head(k, j)[d] * head(k, j)[d];
          sum *= scale;
          if (c.softcap > 0) sum = c.softcap * std::tanh(sum / c.softcap);
          score.push_back(sum);
          most = std::fmax(most, sum), key_size = std::fmax(key_size, size);
        }
        for (int64_t j = oldest; j <= index; ++j) {
          double& weight = score[size_t(j - oldest)];
          weight = std::exp(weight - most), total += weight;
          double size = 0;
          for (size_t d = 0; d < mixed.size(); ++d) {
            mixed[d] += weight * head(v, j)[d], size += head(v, j)[d] * head(v, j)[d];
          }
          value_size += weight * std::sqrt(size);
        }
        for (double& x : mixed) x /= total;
        if (c.value_bits != 0) mixed = rotated(mixed);
        value.insert(value.end(), mixed.begin(), mixed.end());
        // A score is a sum of head_dim products, off by so many roundings of at most |q| |k|; e to the power of it and
        // the sums of its weights and values over a chunk of 256 are off by as much relatively, a few ulps more.
        const double roundings = double(c.head_dim) / 8 + 16;
        const double score_error = roundings * 0x1p-24 * double(scale) * std::sqrt(query_size * key_size);
        const double relative = 2 * score_error + (300 + double(index) / 128) * 0x1p-24 + 2e-6;
        bound.insert(bound.end(), size_t(c.head_dim), relative * value_size / total + 1e-30);
      }
    }
  }

  std::vector<float> wide;  // of the instruction sets with a fused multiply-add: equal bits
  ways.each([&](int) {
    Buffer<float> out(count);
    AttentionArgs a{};
    a.q = q.data(), a.k_pages = k.memory.data(), a.v_pages = v.memory.data();
    a.dtype = c.dtype, a.key_bits = c.key_bits, a.value_bits = c.value_bits;
    a.q_starts = q_starts.data(), a.kv_lengths = kv.data(), a.page_table = page_table.data();
    a.sequences = sequences, a.table_width = table_width;
    a.heads = c.heads, a.kv_heads = c.kv_heads, a.head_dim = c.head_dim;
    a.page_size = c.page_size, a.window = c.window, a.scale = scale, a.softcap = c.softcap;
    a.out = out.data();
    paged_attention_cpu(a);
    for (int64_t i = 0; i < count; ++i) {
      check::expect_near(out[i], value[size_t(i)], bound[size_t(i)], "out", i / c.head_dim, i % c.head_dim);
    }
    if (isa() == Isa::portable) return;
    if (wide.empty()) wide.assign(out.begin(), out.end());
    EXPECT(check::same_bits(wide.data(), out.data(), count));
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(4);
  // Large enough that every thread has a part: many rows, then few rows and long contexts, cut into chunks.
  check_case(ways, "prefill", {{{120, 300}, {7, 7}}, 4, 2, 64, 16}, random);
  check_case(ways, "decode", {{{1, 900}, {1, 5}}, 4, 2, 64, 256}, random);
  Case codes{{{60, 400}, {1, 600}}, 4, 1, 64, 16};
  codes.key_bits = 4, codes.value_bits = 6;
  check_case(ways, "codes", codes, random);
  if (ways.threads_only) return 0;

  for (const int64_t head_dim : {1, 8, 15, 16, 20, 33, 64, 80, 128, 160}) {
    const std::string d = "head_dim " + std::to_string(head_dim);
    for (const Dtype dtype : check::kDtypes) {
      Case c{{{3, 60}, {1, 9}}, 4, 2, head_dim, 7};
      c.dtype = dtype;
      check_case(ways, d + ", dtype " + std::to_string(int(dtype)), c, random);
      c.sequences = {{40, 45}};  // enough rows for panels
      check_case(ways, d + ", many rows, dtype " + std::to_string(int(dtype)), c, random);
    }
    for (int bits = 2; bits <= 8; ++bits) {
      Case c{{{2, 40}, {1, 9}}, 3, 1, head_dim, 16};
      c.key_bits = bits, c.value_bits = 10 - bits;
      check_case(ways, d + ", key bits " + std::to_string(bits), c, random);
      c.sequences = {{25, 30}};
      check_case(ways, d + ", many rows, key bits " + std::to_string(bits), c, random);
    }
  }
  for (const int64_t page_size : {1, 16, 256}) {
    for (const int bits : {0, 3}) {
      Case c{{{1, 255}, {1, 256}, {2, 257}, {0, 3}, {1, 1}}, 6, 2, 32, page_size};
      c.key_bits = c.value_bits = bits;
      const std::string p = "pages of " + std::to_string(page_size) + ", bits " + std::to_string(bits);
      check_case(ways, p, c, random);
      c.window = 30;
      check_case(ways, p + ", window", c, random);
      c.window = 1, c.softcap = 3.0f;
      check_case(ways, p + ", window of one, softcap", c, random);
      c.window = int64_t(1) << 40;
      c.sequences = {{33, 290}};
      check_case(ways, p + ", prefill, softcap", c, random);
    }
  }
  return 0;
}
