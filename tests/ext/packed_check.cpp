// The AVX-VNNI kernels against the portable ones, bit for bit, on a processor that has their instruction in the form of
// AVX-512VL. Exit status 77: this one does not.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/linear_packed_isa.h"

namespace {

uint64_t state = 88172645463325252ull;

uint64_t random_bits() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

float random_float() { return float(int64_t(random_bits() % 2001) - 1000) * 1e-3f; }

struct Matrix {
  std::vector<exl::Span> spans;
  std::vector<int32_t> words, rows;
  std::vector<uint32_t> scale_words;
  std::vector<float> tables;
  std::vector<uint16_t> scales;
  std::vector<uint8_t> zeros, memory;
  exl::Packed packed;

  // Groups of the widths in `bits`, `units` long.
  Matrix(const std::vector<int>& bits, int units, int64_t outputs, exl::ScaleKind kind) {
    exl::TileSource s{};
    int64_t total = 0;
    for (size_t g = 0; g < bits.size(); ++g) {
      for (int left = units; left > 0; left -= 4) {
        const int here = left < 4 ? left : 4;
        spans.push_back({bits[g], int32_t(g), here, 0});
        s.positions += here * exl::kUnit;
        total += here * exl::kUnit * bits[g];
      }
    }
    s.span_count = int64_t(spans.size());
    s.spans = spans.data();
    s.groups = int64_t(bits.size());
    s.inputs = s.positions;
    s.outputs = s.stride = outputs;
    s.word_rows = total / 32;
    words.resize(size_t(s.word_rows * outputs));
    for (auto& word : words) word = int32_t(random_bits());
    s.words = words.data();
    for (int64_t i = 0; i < s.positions; ++i) rows.push_back(int32_t((i * 37 + 5) % s.positions));
    s.rows = rows.data();
    s.kind = kind;
    s.scale_stride = (outputs + 7) / 8;
    scale_words.resize(size_t(s.groups * s.scale_stride));
    for (auto& word : scale_words) word = uint32_t(random_bits());
    tables.resize(size_t(s.groups) * 16);
    for (auto& value : tables) value = random_float();
    scales.resize(size_t(s.groups * outputs));
    for (auto& half : scales) half = uint16_t(0x2000 + random_bits() % 1024);
    zeros.resize(size_t(s.groups * outputs));
    for (auto& zero : zeros) zero = uint8_t(random_bits() % 4);
    s.scale_words = scale_words.data();
    s.tables = tables.data();
    s.scales = scales.data();
    s.zeros = zeros.data();
    s.zero_base = 1;
    memory.resize(size_t(exl::packed_header(s).bytes));
    exl::pack_tiles(s, memory.data());
    packed = {reinterpret_cast<const exl::PackedHeader*>(memory.data())};
  }
};

std::vector<float> product(const exl::PackedIsa& kernels, const Matrix& m, const std::vector<float>& x, int64_t rows,
                           bool residual) {
  const exl::PackedHeader& h = *m.packed.header;
  const int64_t spans_at = h.positions * (residual ? 2 : 1), stride = spans_at + h.spans * 8;
  std::vector<uint8_t> input(size_t(rows * stride));
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = input.data() + r * stride;
    kernels.quantize(m.packed, x.data() + r * h.inputs, residual, row,
                     reinterpret_cast<exl::InputSpan*>(row + spans_at));
  }
  std::vector<float> y(size_t(rows * h.outputs), -1.0f);
  const exl::QuantizedRows quantized{input.data(), stride, spans_at, residual};
  for (int64_t p = 0; p < h.panels; ++p) {
    kernels.multiply(m.packed, p, 0, m.packed.tiles(), quantized, rows, y.data());
  }
  return y;
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni")) return 77;
  int wrong = 0, compared = 0;
  for (const int units : {1, 3, 6}) {
    for (const auto kind : {exl::ScaleKind::exl2, exl::ScaleKind::symmetric, exl::ScaleKind::zeros}) {
      const Matrix m({8, 8, 6, 5, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2}, units, 71, kind);
      std::vector<float> x(size_t(9 * m.packed.header->inputs));
      for (auto& value : x) value = random_float();
      for (const bool residual : {true, false}) {
        for (int64_t rows = 1; rows <= 9; ++rows, ++compared) {
          const auto fast = product(exl::linear_packed_avxvnni(), m, x, rows, residual);
          const auto slow = product(exl::linear_packed_portable(), m, x, rows, residual);
          if (std::memcmp(fast.data(), slow.data(), fast.size() * sizeof(float)) == 0) continue;
          std::printf("units %d kind %d rows %d residual %d differ\n", units, int(kind), int(rows), int(residual));
          ++wrong;
        }
      }
    }
  }
  std::printf("%d of %d compared differ\n", wrong, compared);
  return wrong != 0;
}
