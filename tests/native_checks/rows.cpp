// The small operators: cpu/rms_norm.h, cpu/gated.h, cpu/rope.h, cpu/kv_append.h without codes, cpu/sample.h.
#include "check.h"
#include "cpu/gated.h"
#include "cpu/kv_append.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "cpu/sample.h"

using namespace exl;
using check::Buffer;
using check::Random;

namespace {

Buffer<uint8_t> numbers(int64_t count, Dtype dtype, Random& random) {
  Buffer<uint8_t> out(count * element_bytes(dtype));
  for (int64_t i = 0; i < count; ++i) {
    float value = random.normal() * (random.below(9) == 0 ? 30.0f : 1.0f);
    if (random.below(50) == 0) value = 0.0f;
    check::put_element(out.data(), dtype, i, value);
  }
  return out;
}

void check_norm(const check::Ways& ways, int64_t rows, int64_t cols, Dtype dtype, Random& random) {
  check::begin("rms_norm, " + std::to_string(rows) + " x " + std::to_string(cols));
  const Buffer<uint8_t> x = numbers(rows * cols, dtype, random);
  Buffer<float> weight(cols);
  fill_normal(weight, random);
  const float eps = 1e-5f, offset = random.below(2) == 1 ? 1.0f : 0.0f;
  ways.each([&](int) {
    Buffer<uint8_t> y(x.size()), same(x.size());
    std::memcpy(same.data(), x.data(), size_t(x.size()));
    rms_norm(x.data(), weight.data(), y.data(), dtype, rows, cols, eps, offset);
    rms_norm(same.data(), weight.data(), same.data(), dtype, rows, cols, eps, offset);
    EXPECT(check::same_bits(y.data(), same.data(), y.size()));
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double value = check::element(x.data(), dtype, r * cols + c);
        sum += value * value;
      }
      const double scale = 1.0 / std::sqrt(sum / double(cols) + double(eps));
      for (int64_t c = 0; c < cols; ++c) {
        const double factor = double(weight[c]) + double(offset);
        const double wanted = check::element(x.data(), dtype, r * cols + c) * scale * factor;
        // Scale, factor and two products rounded to float32: the factor loses up to 2^-24 of its terms.
        const double terms = std::fabs(wanted) * (std::fabs(weight[c]) + offset) / (std::fabs(factor) + 1e-30);
        const double bound = check::rounding(dtype, wanted) + 0x1p-22 * (std::fabs(wanted) + terms);
        check::expect_near(check::element(y.data(), dtype, r * cols + c), wanted, bound, "y", r, c);
      }
    }
  });
}

void check_gated(const check::Ways& ways, int64_t rows, int64_t cols, bool fused, Dtype dtype, Random& random) {
  for (const auto activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
    check::begin("gated " + std::to_string(int(activation)) + ", " + std::to_string(rows) + " x " +
                    std::to_string(cols) + ", dtype " + std::to_string(int(dtype)));
    const int64_t stride = fused ? 2 * cols : cols, bytes = element_bytes(dtype);
    const Buffer<uint8_t> both = numbers(2 * rows * cols, dtype, random);
    const uint8_t *gate = both.data(), *up = both.data() + (fused ? cols : rows * cols) * bytes;
    ways.each([&](int) {
      Buffer<uint8_t> out(rows * cols * bytes);
      gated(gate, up, out.data(), dtype, rows, cols, stride, stride, activation);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
          const double g = check::element(gate, dtype, r * stride + c), u = check::element(up, dtype, r * stride + c);
          const double wanted = check::activated(g, activation) * u;
          // gated.h: 5e-7 relative, more where the activation is vanishingly small.
          const double bound = check::rounding(dtype, wanted) + 6e-7 * std::fabs(wanted) + 1e-7 * std::fabs(u);
          check::expect_near(check::element(out.data(), dtype, r * cols + c), wanted, bound, "out", r, c);
        }
      }
    });
  }
}

void check_rope(const check::Ways& ways, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary, Dtype dtype,
                Random& random) {
  check::begin("rope, " + std::to_string(tokens) + " x " + std::to_string(heads) + " x " + std::to_string(head_dim) +
                  ", rotary " + std::to_string(rotary) + ", dtype " + std::to_string(int(dtype)));
  const int64_t half = rotary / 2, gap = 3, stride = heads * head_dim + gap;
  const int64_t count = tokens == 0 ? 0 : tokens * stride - gap;  // nothing behind the last token
  const Buffer<uint8_t> before = numbers(count, dtype, random);
  Buffer<float> cosine(tokens * half), sine(tokens * half);
  for (int64_t i = 0; i < tokens * half; ++i) {
    const double angle = 100 * random.uniform();
    cosine[i] = float(std::cos(angle)), sine[i] = float(std::sin(angle));
  }
  ways.each([&](int) {
    Buffer<uint8_t> x(before.size());
    std::memcpy(x.data(), before.data(), size_t(x.size()));
    rope(x.data(), dtype, tokens, heads, head_dim, stride, rotary, cosine.data(), sine.data());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = i / stride, d = i % stride % head_dim;
      const auto old = [&](int64_t at) { return check::element(before.data(), dtype, at); };
      const double got = check::element(x.data(), dtype, i);
      if (i % stride >= heads * head_dim || d >= rotary) {
        EXPECT(got == old(i));
        continue;
      }
      const double c = cosine[t * half + d % half], s = sine[t * half + d % half];
      const double a = old(i) * c, b = d < half ? -old(i + half) * s : old(i - half) * s;
      const double bound = check::rounding(dtype, a + b) + 0x1p-23 * (std::fabs(a) + std::fabs(b));
      check::expect_near(got, a + b, bound, "x", t, i % stride);
    }
  });
}

void check_append(const check::Ways& ways, int64_t tokens, int64_t width, Random& random) {
  for (const Dtype from : check::kDtypes) {
    for (const Dtype to : check::kDtypes) {
      check::begin("append " + std::to_string(tokens) + " x " + std::to_string(width));
      const int64_t gap = 5, stride = width + gap, slot_count = tokens + 3;
      const Buffer<uint8_t> x = numbers(tokens == 0 ? 0 : tokens * stride - gap, from, random);
      std::vector<int64_t> free;
      for (int64_t s = 0; s < slot_count; ++s) free.push_back(s);
      random.shuffle(free);
      const Buffer<int64_t> slots = check::guarded(std::vector<int64_t>(free.begin(), free.begin() + tokens));
      EXPECT(bad_slot(slots.data(), tokens, slot_count) == -1);
      ways.each([&](int) {
        Buffer<uint8_t> pages(slot_count * width * element_bytes(to), 7);
        kv_append(x.data(), from, pages.data(), to, slots.data(), tokens, width, stride);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t d = 0; d < width; ++d) {
            alignas(4) uint8_t wanted[4];
            check::put_element(wanted, to, 0, float(check::element(x.data(), from, t * stride + d)));
            const uint8_t* got = pages.data() + (slots[t] * width + d) * element_bytes(to);
            EXPECT(check::same_bits(got, wanted, element_bytes(to)));
          }
        }
        for (size_t s = size_t(tokens); s < free.size(); ++s) {  // other slots are left alone
          const uint8_t* got = pages.data() + free[s] * width * element_bytes(to);
          for (int64_t b = 0; b < width * element_bytes(to); ++b) EXPECT(got[b] == 7);
        }
      });
    }
  }
}

void check_sample(const check::Ways& ways, int64_t count, Random& random) {
  check::begin("sample, " + std::to_string(count));
  Buffer<float> logits(count);
  fill_normal(logits, random, 4.0f);
  for (int64_t i = 0; i < count; i += 7) logits[i] = -INFINITY;
  if (count > 0) logits[count - 1] = 3.0f;
  ways.each([&](int) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
      if (best < 0 || logits[i] > logits[best]) best = i;
    }
    EXPECT(argmax(logits.data(), count) == best);
    for (const double temperature : {0.1, 1.0, 5.0}) {
      for (const double min_p : {0.0, 0.05, 1.0}) {
        for (const double u : {0.0, 0.3, 0.999999}) {
          double total = 0, running = 0;
          int64_t wanted = -1;
          const auto weight = [&](int64_t i) {
            const double w = std::exp((double(logits[i]) - double(logits[best])) / temperature);
            return w >= std::fmax(min_p, 1e-18) ? w : 0.0;
          };
          for (int64_t i = 0; i < count; ++i) total += weight(i);
          for (int64_t i = 0; i < count && wanted < 0; ++i) {
            running += weight(i);
            if (running > u * total) wanted = i;
          }
          EXPECT(sample_min_p(logits.data(), count, temperature, min_p, u) == wanted);
        }
      }
    }
    if (count == 0) return;
    for (const float bad : {std::nanf(""), INFINITY}) {
      const int64_t at = random.below(count);
      const float before = logits[at];
      logits[at] = bad;
      EXPECT(argmax(logits.data(), count) == -1 && sample_min_p(logits.data(), count, 1.0, 0.0, 0.5) == -1);
      logits[at] = before;
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(3);
  // Large enough that every thread has a part.
  check_norm(ways, 40, 2000, Dtype::float32, random);
  check_gated(ways, 9, 9000, true, Dtype::float16, random);
  check_rope(ways, 60, 9, 128, 128, Dtype::float32, random);
  check_append(ways, 20, 5000, random);
  if (ways.threads_only) return 0;
  for (const Dtype dtype : check::kDtypes) {
    for (const int64_t cols : {1, 5, 8, 9, 31, 64, 100, 1025}) {
      for (const int64_t rows : {0, 1, 3}) {
        check_norm(ways, rows, cols, dtype, random);
        check_gated(ways, rows, cols, cols % 2 == 1, dtype, random);
      }
    }
    for (const int64_t head_dim : {2, 6, 16, 40, 80, 130}) {
      for (const int64_t rotary : {int64_t(2), head_dim / 4 * 2, head_dim}) {
        for (const int64_t tokens : {0, 1, 4}) check_rope(ways, tokens, 3, head_dim, rotary, dtype, random);
      }
    }
  }
  for (const int64_t width : {1, 7, 8, 33, 128}) {
    for (const int64_t tokens : {0, 1, 5}) check_append(ways, tokens, width, random);
  }
  const int64_t outside[] = {0, 4, -1}, above[] = {5};
  EXPECT(bad_slot(outside, 3, 5) == 2 && bad_slot(above, 1, 5) == 0);
  for (const int64_t count : {0, 1, 2, 8, 63, 64, 65, 1000}) check_sample(ways, count, random);
  return 0;
}
