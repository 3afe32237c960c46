// Packing matrices (cpu/tiles.h) and multiplying with them (cpu/linear_packed.h).
#include "cpu/linear_packed.h"

#include "check.h"
#include "packed_matrix.h"

using namespace exl;
using check::Buffer;
using check::exl2;
using check::gptq;
using check::Matrix;
using check::Random;

namespace {

constexpr int64_t kAlways = int64_t(1) << 62;

// A batch that holds what an input may be. Row r of 13: 3 outliers, 5 zeros, 7 next to nothing, 9 NaN, 11 infinity.
Buffer<float> inputs(int64_t rows, int64_t count, Random& random) {
  Buffer<float> x(rows * count);
  fill_normal(x, random);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x.data() + r * count;
    switch (r % 13) {
      case 3: row[random.below(count)] *= 1000.0f; break;
      case 5: std::memset(row, 0, size_t(count) * sizeof(float)); break;
      case 7: for (int64_t k = 0; k < count; ++k) row[k] *= 1e-33f; break;
      case 9: row[random.below(count)] = std::nanf(""); break;
      case 11: row[random.below(count)] = -INFINITY; break;
    }
  }
  return x;
}

// The product and how far a kernel may be from it. linear_packed.h: a span's inputs are off by at most its largest /
// 254, or / 32512 with the residual; below 1e-30 they may count as zeros. Float32 rounds the sum once a span, and
// every term of it three times.
struct Oracle {
  std::vector<double> value, bound;

  Oracle(const Matrix& m, const float* x, int64_t rows, bool residual) {
    std::vector<double> weight(size_t(m.positions * m.outputs));
    for (int64_t p = 0; p < m.positions; ++p) {
      for (int64_t n = 0; n < m.outputs; ++n) weight[size_t(p * m.outputs + n)] = m.weight(p, n);
    }
    const double steps = double(m.spans.size()) + 4;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> sum(size_t(m.outputs)), size(size_t(m.outputs)), off(size_t(m.outputs));
      int64_t p = 0;
      for (const Span& span : m.spans) {
        const int64_t stop = p + span.units * kUnit;
        double most = 0;
        for (int64_t q = p; q < stop; ++q) {
          const int32_t k = m.input[size_t(q)];
          if (k >= 0) most = std::fmax(most, std::fabs(double(x[r * m.inputs + k])));
        }
        const double error = most < 1e-30 ? most : most / (residual ? 32512.0 : 254.0);
        for (; p < stop; ++p) {
          const int32_t k = m.input[size_t(p)];
          const double value = k < 0 ? 0.0 : x[r * m.inputs + k];
          for (int64_t n = 0; n < m.outputs; ++n) {
            const double w = weight[size_t(p * m.outputs + n)];
            sum[size_t(n)] += value * w;
            size[size_t(n)] += (std::fabs(value) + error) * std::fabs(w);
            off[size_t(n)] += k < 0 ? 0.0 : error * std::fabs(w);
          }
        }
      }
      for (int64_t n = 0; n < m.outputs; ++n) {
        value.push_back(sum[size_t(n)]);
        bound.push_back(off[size_t(n)] + steps * 0x1p-24 * size[size_t(n)] + 1e-44);
      }
    }
  }
};

void compare(const Oracle& oracle, const Matrix& m, const float* x, const float* y, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    bool finite = true;
    for (int64_t k = 0; k < m.inputs; ++k) finite = finite && std::isfinite(x[r * m.inputs + k]);
    for (int64_t n = 0; n < m.outputs; ++n) {
      const float got = y[r * m.outputs + n];
      const size_t at = size_t(r * m.outputs + n);
      if (finite) {
        check::expect_near(got, oracle.value[at], oracle.bound[at], "y", r, n);
      } else {
        EXPECT(std::isnan(got));
      }
    }
  }
}

Buffer<float> multiply(const Matrix& m, const float* x, int64_t rows, int64_t residual_rows) {
  Buffer<float> y(rows * m.outputs);
  const Product product{m.view(), y.data()};
  linear_packed_cpu(&product, 1, x, rows, residual_rows);
  return y;
}

// Every batch gives a row the same bits; so do all instruction sets.
void check_matrix(const check::Ways& ways, const std::string& name, Matrix m, int64_t most_rows, Random& random) {
  check::begin(name);
  const Buffer<float> x = inputs(most_rows, m.inputs, random);
  const Oracle exact(m, x.data(), most_rows, true), plain(m, x.data(), most_rows, false);
  Buffer<float> first[2] = {Buffer<float>(0), Buffer<float>(0)};
  ways.each([&](int team) {
    m.pack();  // the same memory from any team and instruction set
    for (const bool residual : {true, false}) {
      const int64_t limit = residual ? kAlways : 0;
      Buffer<float> whole = multiply(m, x.data(), most_rows, limit);
      compare(residual ? exact : plain, m, x.data(), whole.data(), most_rows);
      if (first[residual].size() == 0) first[residual] = check::guarded(std::vector<float>(whole.begin(), whole.end()));
      EXPECT(check::same_bits(whole.data(), first[residual].data(), whole.size()));
      if (team == 1) continue;  // how rows are taken together does not depend on the team
      for (int64_t rows = 0; rows < most_rows; rows += rows < 18 || rows > 30 ? 1 : 5) {
        Buffer<float> some(rows * m.inputs);  // of its own: what is read behind its last row is caught
        std::memcpy(some.data(), x.data(), size_t(some.size()) * sizeof(float));
        const Buffer<float> y = multiply(m, some.data(), rows, limit);
        EXPECT(check::same_bits(y.data(), whole.data(), y.size()));
      }
    }
  });
}

// Matrices of one input in one call.
void check_together(const check::Ways& ways, std::vector<Matrix>& matrices, int64_t rows, Random& random) {
  check::begin(std::to_string(matrices.size()) + " matrices together, " + std::to_string(rows) + " rows");
  const Buffer<float> x = inputs(rows, matrices[0].inputs, random);
  ways.each([&](int) {
    std::vector<Buffer<float>> together;
    std::vector<Product> products;
    for (const Matrix& m : matrices) {
      together.emplace_back(rows * m.outputs);
      products.push_back({m.view(), together.back().data()});
    }
    linear_packed_cpu(products.data(), int(products.size()), x.data(), rows, kAlways);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const Buffer<float> alone = multiply(matrices[i], x.data(), rows, kAlways);
      EXPECT(check::same_bits(alone.data(), together[i].data(), alone.size()));
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(1);
  using Layout = std::vector<std::pair<int, int64_t>>;
  const Layout every{{8, 32}, {6, 64}, {5, 32}, {4, 96}, {3, 64}, {2, 32}};
  set_threads(4);

  // Large enough that every thread has a part.
  check_matrix(ways, "exl2, large", exl2({{8, 256}, {4, 512}, {2, 256}}, 1000, true, false, random), 3, random);
  check_matrix(ways, "gptq, large", gptq(4, 1024, 1030, 128, true, false, false, random), 18, random);
  std::vector<Matrix> family;
  for (int i = 0; i < 4; ++i) family.push_back(exl2(every, 300 + 31 * i, i > 1, false, random));
  for (const int64_t rows : {1, 5, 40}) check_together(ways, family, rows, random);
  if (ways.threads_only) return 0;

  for (const int64_t outputs : {1, 15, 16, 33}) {
    const std::string n = ", " + std::to_string(outputs) + " columns";
    check_matrix(ways, "exl2, every width" + n, exl2(every, outputs, true, false, random), 33, random);
    check_matrix(ways, "exl2, in order" + n, exl2({{4, 64}, {4, 32}}, outputs, false, false, random), 14, random);
  }
  check_matrix(ways, "exl2, subnormal scales", exl2(every, 24, true, true, random), 14, random);
  check_matrix(ways, "exl2, 20 small groups", exl2(Layout(20, {4, 32}), 24, true, false, random), 9, random);
  const Layout panels{{5, 1024}, {4, 960}, {4, 160}, {3, 2080}, {2, 64}};
  check_matrix(ways, "exl2, several panels", exl2(panels, 19, true, false, random), 6, random);
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    const std::string b = std::to_string(bits) + " bits";
    check_matrix(ways, "exl2, K = 32, " + b, exl2({{bits, 32}}, 17, false, false, random), 33, random);
    for (const int64_t group : {32, 64, 128, 160}) {
      const std::string g = ", groups of " + std::to_string(group);
      check_matrix(ways, "exl2, " + b + g, exl2(Layout(3, {bits, group}), 18, true, false, random), 9, random);
    }
    if (bits == 5 || bits == 6) continue;
    for (const int64_t group : {int64_t(-1), int64_t(1), int64_t(20), int64_t(32), int64_t(128)}) {
      const std::string g = "gptq, " + b + ", groups of " + std::to_string(group);
      check_matrix(ways, g, gptq(bits, 160, 18, group, false, false, false, random), 9, random);
      check_matrix(ways, g + ", order", gptq(bits, 200, 7, group, true, false, false, random), 9, random);
      check_matrix(ways, g + ", symmetric", gptq(bits, 96, 33, group, group == 20, true, false, random), 9, random);
    }
    check_matrix(ways, "gptq, subnormal scales, " + b, gptq(bits, 96, 9, 32, true, false, true, random), 14, random);
    check_matrix(ways, "gptq, K = 1, " + b, gptq(bits, 1, 5, 32, false, false, false, random), 33, random);
  }
  check_matrix(ways, "gptq, one group, several panels", gptq(3, 4160, 20, -1, false, false, false, random), 3, random);
  check_matrix(ways, "gptq, order, several panels", gptq(4, 2600, 20, 96, true, true, false, random), 3, random);
  return 0;
}
