// Row kernels: norms, activations, embedding, against double.
// kernels: norm.cu gated.cu embed.cu
#include "../../../ext/cuda/embed.h"
#include "../../../ext/cuda/gated.h"
#include "../../../ext/cuda/norm.h"
#include "check.h"

using check::Buffer;
using exl::Dtype;

namespace {

std::vector<float> random(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(generator);
  return values;
}

void norm(int64_t rows, int64_t cols, bool add, bool permute, std::string& bytes) {
  Buffer<float> x(random(size_t(rows * cols), 1)), delta(random(size_t(rows * cols), 2)), w(random(size_t(cols), 3));
  Buffer<float> y(size_t(rows * cols));
  Buffer<int32_t> order((size_t(cols)));
  for (int64_t c = 0; c < cols; ++c) order[size_t(c)] = int32_t(permute ? cols - 1 - c : c);
  std::vector<double> stream(size_t(rows * cols));
  for (size_t i = 0; i < stream.size(); ++i) stream[i] = add ? double(x[i] + delta[i]) : double(x[i]);
  const int32_t* columns = permute ? order.data() : nullptr;
  if (add) {
    exl::add_rms_norm_cuda(x.data(), delta.data(), Dtype::float32, w.data(), columns, y.data(), Dtype::float32, rows,
                           cols, 1e-5f, 1.0f, nullptr);
  } else {
    exl::rms_norm_cuda(x.data(), Dtype::float32, w.data(), columns, y.data(), Dtype::float32, rows, cols, 1e-5f, 1.0f,
                       nullptr);
  }
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += stream[size_t(r * cols + c)] * stream[size_t(r * cols + c)];
    const double factor = 1 / std::sqrt(sum / double(cols) + 1e-5);
    for (int64_t c = 0; c < cols; ++c) {
      const size_t from = size_t(order[size_t(c)]);
      const double wanted = stream[size_t(r * cols) + from] * factor * (double(w[from]) + 1);
      check::near(y[size_t(r * cols + c)], wanted, 4e-6 * std::fabs(wanted) + 1e-7, "norm", r * cols + c);
    }
  }
  y.append_to(bytes);
  x.append_to(bytes);
}

void gated(int64_t rows, int64_t cols, std::string& bytes) {
  Buffer<float> both(random(size_t(rows * cols * 2), 4));
  Buffer<float> out(size_t(rows * cols));
  exl::gated_cuda(both.data(), both.data() + cols, Dtype::float32, out.data(), Dtype::float32, rows, cols, 2 * cols,
                  2 * cols, exl::GatedActivation::silu, nullptr);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const double g = both[size_t(i / cols * 2 * cols + i % cols)], u = both[size_t(i / cols * 2 * cols + cols + i % cols)];
    const double wanted = g / (1 + std::exp(-g)) * u;
    check::near(out[size_t(i)], wanted, 1e-6 * std::fabs(wanted) + 1e-30, "gated", i);
  }
  out.append_to(bytes);
}

void embed(int64_t cols, std::string& bytes) {
  Buffer<float> table(random(size_t(7 * cols), 5));
  Buffer<int64_t> tokens(std::vector<int64_t>{6, 0, 7, -1, 3});
  Buffer<float> out(size_t(5 * cols));
  exl::embed_cuda(tokens.data(), table.data(), Dtype::float32, out.data(), 5, 7, cols, 2.0f, nullptr);
  for (int64_t i = 0; i < 5 * cols; ++i) {
    const int64_t token = tokens[size_t(i / cols)];
    const float got = out[size_t(i)];
    if (token < 0 || token > 6) {
      if (got == got) check::wrong("a token outside the table gives a number");
    } else {
      check::near(got, 2.0 * table[size_t(token * cols + i % cols)], 0, "embed", i);
    }
  }
  out.append_to(bytes);
}

}  // namespace

int main(int argc, char** argv) {
  return check::every_order(argc, argv, [] {
    std::string bytes;
    for (bool add : {false, true}) {
      norm(11, 40, add, false, bytes);   // a warp for each row, the last block short
      norm(9, 37, add, true, bytes);
      norm(2, 700, add, false, bytes);   // a block for each row
      norm(3, 1031, add, true, bytes);
    }
    gated(3, 171, bytes);
    embed(300, bytes);
    return bytes;
  });
}
