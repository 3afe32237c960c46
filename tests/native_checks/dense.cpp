// Products with dense matrices, cpu/linear_dense.h.
#include "cpu/linear_dense.h"

#include "check.h"

using namespace exl;
using check::Buffer;
using check::Random;

namespace {

struct Case {
  int64_t inputs, outputs, most_rows;
};

void check_case(const check::Ways& ways, const Case& c, Dtype dtype, Random& random) {
  check::begin("K " + std::to_string(c.inputs) + ", N " + std::to_string(c.outputs) + ", " +
                  std::to_string(element_bytes(dtype)) + " bytes, dtype " + std::to_string(int(dtype)));
  Buffer<uint8_t> weight(c.outputs * c.inputs * element_bytes(dtype));
  std::vector<double> w(size_t(c.outputs * c.inputs));
  for (size_t i = 0; i < w.size(); ++i) {
    check::put_element(weight.data(), dtype, int64_t(i), random.normal());
    w[i] = check::element(weight.data(), dtype, int64_t(i));
  }
  Buffer<float> x(c.most_rows * c.inputs);
  fill_normal(x, random);
  if (c.inputs > 0 && c.most_rows > 2) {
    x[c.inputs] *= 1000.0f;                                        // row 1: an outlier
    for (int64_t k = 0; k < c.inputs; ++k) x[2 * c.inputs + k] = 0;  // row 2: zeros
  }
  // linear_dense.h: 16 chains over a block of 512, their tree, then the blocks: so many roundings meet a product.
  const int64_t block = c.inputs < 512 ? c.inputs : 512;
  const double roundings = double((block + 15) / 16 + 5 + (c.inputs + 511) / 512) * 2;  // twice without a fused one
  std::vector<double> value, bound;
  for (int64_t r = 0; r < c.most_rows; ++r) {
    for (int64_t n = 0; n < c.outputs; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < c.inputs; ++k) {
        const double product = double(x[r * c.inputs + k]) * w[size_t(n * c.inputs + k)];
        sum += product, size += std::fabs(product);
      }
      value.push_back(sum);
      bound.push_back(roundings * 0x1p-24 * size);
    }
  }
  const DenseWeights weights{weight.data(), dtype, c.inputs, c.outputs};
  std::vector<float> wide;  // of the instruction sets with a fused multiply-add: equal bits
  ways.each([&](int) {
    Buffer<float> whole(c.most_rows * c.outputs);
    linear_dense_cpu(weights, x.data(), whole.data(), c.most_rows);
    for (int64_t i = 0; i < whole.size(); ++i) {
      check::expect_near(whole[i], value[size_t(i)], bound[size_t(i)], "y", i / c.outputs, i % c.outputs);
    }
    if (isa() != Isa::portable) {
      if (wide.empty()) wide.assign(whole.begin(), whole.end());
      EXPECT(check::same_bits(wide.data(), whole.data(), whole.size()));
    }
    for (int64_t rows = 0; rows < c.most_rows; rows += rows < 18 ? 1 : 7) {
      Buffer<float> some(rows * c.inputs), y(rows * c.outputs);
      std::memcpy(some.data(), x.data(), size_t(some.size()) * sizeof(float));
      linear_dense_cpu(weights, some.data(), y.data(), rows);
      EXPECT(check::same_bits(y.data(), whole.data(), y.size()));
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(2);
  check_case(ways, {1200, 600, 2}, Dtype::float16, random);  // large enough that every thread has a part
  check_case(ways, {700, 150, 20}, Dtype::bfloat16, random);
  if (ways.threads_only) return 0;
  for (const Dtype dtype : check::kDtypes) {
    for (const int64_t inputs : {0, 1, 7, 16, 31, 32, 65, 512, 530}) {
      for (const int64_t outputs : {1, 3, 4, 5, 18}) check_case(ways, {inputs, outputs, 9}, dtype, random);
    }
    for (const int64_t outputs : {1, 17, 64, 66}) check_case(ways, {70, outputs, 33}, dtype, random);
    check_case(ways, {33, 5, 200}, dtype, random);  // more rows than are packed at a time
    check_case(ways, {1030, 9, 14}, dtype, random);
  }
  return 0;
}
