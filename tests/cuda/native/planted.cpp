// planted.cu against a double-precision loop; argv[2] is the mistake to switch on.
#include "check.h"
#include "planted.h"

namespace {

constexpr int kGroup = 64;

struct Shape {
  int m, k, n, splits;
};

// Twice, since a launch has to leave its tickets as it found them.
void matmul(const Shape& s, std::string& bytes) {
  const int tiles = (s.n + 31) / 32, groups = s.k / kGroup, blocks = s.k / 32;
  std::mt19937 random(7);
  std::vector<uint8_t> codes(size_t(s.k) * tiles * 32);
  check::Buffer<uint8_t> zero(size_t(tiles) * groups * 32);
  check::Buffer<uint16_t> scale(zero.size()), x(size_t(s.m) * s.k), y(size_t(s.m) * s.n);
  check::Buffer<uint4> weights(size_t(tiles) * blocks * 32);
  check::Buffer<float> part(size_t(tiles) * s.splits * 256);
  check::Buffer<int> ticket(static_cast<size_t>(tiles));
  for (auto& c : codes) c = random() & 15;
  for (size_t i = 0; i < zero.size(); ++i) {
    zero[i] = random() & 15;
    scale[i] = exl::float_to_half(0.01f + float(random() % 100) * 1e-4f);
  }
  for (size_t i = 0; i < x.size(); ++i) x[i] = exl::float_to_half(float(int(random() % 2001) - 1000) * 1e-3f);
  for (int i = 0; i < tiles; ++i) ticket[size_t(i)] = 0;
  const auto code = [&](int k, int n) { return uint32_t(codes[size_t(k) * tiles * 32 + n]); };
  for (int tile = 0; tile < tiles; ++tile) {
    for (int b = 0; b < blocks; ++b) {
      for (int l = 0; l < 32; ++l) {
        uint32_t words[4] = {};
        for (int i = 0; i < 32; ++i) {
          const int half = i >> 4 & 1, step = i >> 3 & 1, r = i >> 1 & 3, h = i & 1;
          const int k = b * 32 + step * 16 + (l & 3) * 2 + h + (r >> 1) * 8, n = half * 16 + (l >> 2) + (r & 1) * 8;
          words[half * 2 + step] |= code(k, tile * 32 + n) << (4 * r + 16 * h);
        }
        weights[(size_t(tile) * blocks + b) * 32 + size_t(l ^ 1)] = {words[0], words[1], words[2], words[3]};
      }
    }
  }
  for (int again = 0; again < 2; ++again) {
    std::memset(y.data(), 0xff, y.size() * 2);
    planted_matmul(weights.data(), scale.data(), zero.data(), x.data(), part.data(), ticket.data(), y.data(), s.m, s.k,
                   s.n, s.splits, nullptr);
    for (int row = 0; row < s.m; ++row) {
      for (int n = 0; n < s.n; ++n) {
        double sum = 0, size = 0;
        for (int k = 0; k < s.k; ++k) {
          const size_t at = (size_t(n / 32) * groups + k / kGroup) * 32 + n % 32;
          const double term = double(exl::half_to_float(x[size_t(row) * s.k + k])) *
                              double(exl::half_to_float(scale[at])) * (int(code(k, n)) - int(zero[at]));
          sum += term;
          size += std::fabs(term);
        }
        // half a unit of the result's last place, and float32 sums
        const double tolerance = std::fabs(sum) / 2048 + 1e-6 * size;
        check::near(double(exl::half_to_float(y[size_t(row) * s.n + n])), sum, tolerance, "y", row * s.n + n);
      }
    }
  }
  y.append_to(bytes);
}

}  // namespace

int main(int argc, char** argv) {
  planted_bug = argc > 2 ? std::atoi(argv[2]) : kNone;
  return check::every_order(argc, argv, [] {
    std::string bytes;
    matmul({3, 1600, 40, 2}, bytes);  // more tiles to a warp than the ring has stages, tails in n and in the splits
    matmul({8, 576, 64, 3}, bytes);   // a warp without work
    return bytes;
  });
}
