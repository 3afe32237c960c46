// The quantizer's inner loops, cpu/encode.h. What they decide is checked step by step against their own outputs: where
// two codes are equally good but for a rounding, either will do, and the steps that follow start from the one taken.
#include "cpu/encode.h"

#include "check.h"

using namespace exl;
using check::Buffer;
using check::Random;

namespace {

double value_of(double code, float scale) { return half_to_float(float_to_half(float(code * double(scale)))); }

double nearest(double w, double scale, int bits) {
  if (scale == 0) return 0;
  const double top = double(1 << (bits - 1)) - 1;
  return std::fmin(std::fmax(std::nearbyint(w / scale), -top - 1), top);
}

// Whether `code` is the code of w, give or take `error` steps of its scale.
bool is_code(double code, double w, double scale, int bits, double error) {
  if (scale == 0) return code == 0;
  return code >= nearest(w - error * scale, scale, bits) && code <= nearest(w + error * scale, scale, bits);
}

struct Problem {
  EncodeShape shape;
  Buffer<float> w, u, h, scales, row_weights, group_scales, gradient;

  Problem(int64_t rows, int64_t columns, int bits, int64_t candidates, Random& random)
      : shape{rows, columns, bits},
        w(rows * columns),
        u(rows * rows),
        h(rows * rows),
        scales(candidates * columns),
        row_weights(rows),
        group_scales(candidates),
        gradient(rows * columns) {
    fill_normal(w, random, 0.1f);
    if (w.size() > 3) w[3] = 100.0f;
    fill_normal(gradient, random, 0.05f);
    for (float& s : row_weights) s = float(random.uniform());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        u[i * rows + j] = h[i * rows + j] = i == j ? float(1 + random.uniform()) : 0.2f * random.normal();
      }
    }
    const double step = 0.3 / double(1 << (bits - 1));
    for (int64_t i = 0; i < candidates * columns; ++i) {
      const double size = i % 9 == 8 ? 0.0 : i % 9 == 7 ? 5e-7 : step * (0.5 + random.uniform());
      scales[i] = half_to_float(float_to_half(float(size)));
    }
    for (float& m : group_scales) m = half_to_float(float_to_half(float(step * (0.5 + random.uniform()) / 256)));
  }
};

void check_search(const check::Ways& ways, const Problem& p, int64_t candidates) {
  const auto [rows, columns, bits] = p.shape;
  ways.each([&](int) {
    Buffer<uint8_t> codes(candidates * columns);
    Buffer<float> loss(candidates * columns);
    scale_search_cpu(p.shape, p.w.data(), p.row_weights.data(), p.group_scales.data(), candidates, codes.data(),
                     loss.data());
    for (int64_t i = 0; i < candidates * columns; ++i) {
      const auto loss_of = [&](int s) {
        const float scale = half_to_float(float_to_half(float(s * s) * p.group_scales[i / columns]));
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const double w = p.w[r * columns + i % columns], d = w - value_of(nearest(w, scale, bits), scale);
          sum += double(p.row_weights[r]) * d * d;
        }
        return sum;
      };
      EXPECT(codes[i] >= 1 && codes[i] <= 16);
      // A difference is rounded once, relative to the weight; its square, the product and the sum once each.
      const double mine = loss_of(codes[i]), slack = (double(rows) + 8) * 0x1p-23 * mine + 1e-9;
      check::expect_near(loss[i], mine, slack, "loss", i / columns, i % columns);
      for (int s = 1; s <= 16; ++s) EXPECT(mine <= loss_of(s) + 2 * slack);
    }
  });
}

void check_feedback(const check::Ways& ways, const Problem& p, int64_t candidates) {
  const auto [rows, columns, bits] = p.shape;
  ways.each([&](int) {
    Buffer<int8_t> codes(rows * columns);
    Buffer<float> q(rows * columns), errors(rows * columns), loss(candidates * columns), again(columns);
    feedback_encode_cpu(p.shape, p.w.data(), p.u.data(), p.scales.data(), codes.data(), q.data(), errors.data());
    feedback_loss_cpu(p.shape, p.w.data(), p.u.data(), p.scales.data(), candidates, loss.data());
    for (int64_t i = 1; i < candidates; ++i) {  // a candidate is what it is alone
      feedback_loss_cpu(p.shape, p.w.data(), p.u.data(), p.scales.data() + i * columns, 1, again.data());
      EXPECT(check::same_bits(again.data(), loss.data() + i * columns, columns));
    }
    for (int64_t n = 0; n < columns; ++n) {
      const float scale = p.scales[n];
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        double w = p.w[r * columns + n], size = std::fabs(w);
        for (int64_t i = 0; i < r; ++i) {
          const double move = double(p.u[i * rows + r]) * double(errors[i * columns + n]);
          w -= move, size += std::fabs(move);
        }
        const int64_t at = r * columns + n;
        const double rounding = (double(r) + 4) * 0x1p-24 * size;
        EXPECT(is_code(codes[at], w, scale, bits, scale == 0 ? 0 : rounding / double(scale) + 1e-5));
        EXPECT(q[at] == value_of(codes[at], scale) && !(q[at] == 0 && std::signbit(q[at])));
        const double error = (w - double(q[at])) / double(p.u[r * rows + r]);
        const double bound = rounding + 4 * 0x1p-24 * std::fabs(error) + 1e-12;
        check::expect_near(errors[at], error, bound, "error", r, n);
        sum += double(errors[at]) * double(errors[at]);
      }
      check::expect_near(loss[n], sum, (double(rows) + 4) * 0x1p-23 * sum, "loss", 0, n);
    }
  });
}

void check_descent(const check::Ways& ways, Problem& p) {
  const auto [rows, columns, bits] = p.shape;
  if (rows > 2) p.h[2 * rows + 2] = 0.0f;  // a row that keeps its value
  Buffer<float> q(rows * columns);
  for (int64_t i = 0; i < q.size(); ++i) {
    const float scale = p.scales[i % columns];
    q[i] = float(value_of(nearest(p.w[i], scale, bits), scale));
  }
  ways.each([&](int) {
    Buffer<int8_t> codes(rows * columns);
    Buffer<float> fresh(rows * columns), delta(rows * columns);
    descend_cpu(p.shape, q.data(), p.gradient.data(), p.h.data(), p.scales.data(), codes.data(), fresh.data(),
                delta.data());
    for (int64_t n = 0; n < columns; ++n) {
      const float scale = p.scales[n];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * columns + n;
        double gradient = p.gradient[at], size = std::fabs(gradient);
        for (int64_t i = 0; i < r; ++i) {
          const double move = double(p.h[i * rows + r]) * double(delta[i * columns + n]);
          gradient += move, size += std::fabs(move);
        }
        const double turn = p.h[r * rows + r];
        EXPECT(fresh[at] == value_of(codes[at], scale));
        EXPECT(delta[at] == q[at] - fresh[at]);
        if (!(turn > 0)) {
          EXPECT(fresh[at] == q[at]);
          continue;
        }
        const double w = double(q[at]) + gradient / turn;
        const double rounding = (double(r) + 4) * 0x1p-24 * (std::fabs(double(q[at])) + size / turn);
        EXPECT(is_code(codes[at], w, scale, bits, scale == 0 ? 0 : rounding / double(scale) + 1e-5));
      }
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(5);
  const auto all = [&](int64_t rows, int64_t columns, int bits, int64_t candidates) {
    check::begin(std::to_string(rows) + " x " + std::to_string(columns) + ", " + std::to_string(bits) + " bits, " +
                    std::to_string(candidates) + " candidates");
    Problem p(rows, columns, bits, candidates, random);
    check_search(ways, p, candidates);
    check_feedback(ways, p, candidates);
    check_descent(ways, p);
  };
  all(32, 400, 4, 4);  // large enough that every thread has a part
  if (ways.threads_only) return 0;
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int64_t rows : {1, 2, 7, 32, 45}) {
      for (const int64_t columns : {1, 31, 32, 65}) all(rows, columns, bits, columns == 31 ? 3 : 1);
    }
  }
  return 0;
}
