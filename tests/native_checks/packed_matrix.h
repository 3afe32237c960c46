// Matrices for the checks of packed products: drawn at random, written as a checkpoint has them, packed by cpu/tiles.h.
#pragma once

#include "check.h"
#include "cpu/tiles.h"

namespace check {

using namespace exl;

// A matrix in the words of a checkpoint, and beside it every code, scale and zero-point as plain numbers.
struct Matrix {
  int64_t inputs, outputs, positions = 0;
  ScaleKind kind;
  std::vector<int> bits;             // of each group
  std::vector<Span> spans;
  std::vector<int32_t> order, rows;  // both empty: stored rows, and inputs, in order
  std::vector<int32_t> input;        // at each position, -1: none
  std::vector<int32_t> group;        // of each position
  std::vector<uint8_t> code;         // [position][output]
  std::vector<double> scale;         // [group][output]
  std::vector<int> zero;             // [group][output]
  std::vector<int32_t> words;
  std::vector<uint32_t> scale_words;
  std::vector<float> tables;
  std::vector<uint16_t> halves;
  std::vector<uint8_t> zeros;
  int64_t zero_base = 0;
  Buffer<uint8_t> packed{0};

  int64_t groups() const { return int64_t(bits.size()); }
  double weight(int64_t position, int64_t n) const {
    const int64_t at = group[size_t(position)] * outputs + n;
    return (code[size_t(position * outputs + n)] - zero[size_t(at)]) * scale[size_t(at)];
  }

  // Rows of group after group, `counts` positions each; spans of at most 4 units.
  void cut(const std::vector<int64_t>& counts) {
    for (size_t g = 0; g < counts.size(); ++g) {
      for (int64_t units = counts[g] / kUnit; units > 0; units -= kSpanUnits) {
        spans.push_back({bits[g], int32_t(g), int32_t(units < kSpanUnits ? units : kSpanUnits), -1});
      }
      group.insert(group.end(), size_t(counts[g]), int32_t(g));
      positions += counts[g];
    }
  }

  // The stream of a column: stored row k is `width[k]` bits.
  void put_codes(const std::vector<std::vector<uint8_t>>& stored, const std::vector<int>& width) {
    int64_t total = 0;
    for (int w : width) total += w;
    const int64_t word_rows = (total + 31) / 32;
    words.assign(size_t(word_rows * outputs), 0);
    int64_t bit = 0;
    for (size_t k = 0; k < stored.size(); ++k) {
      for (int b = 0; b < width[k]; ++b, ++bit) {
        for (int64_t n = 0; n < outputs; ++n) {
          const uint32_t one = uint32_t(stored[k][size_t(n)] >> b & 1) << bit % 32;
          words[size_t(bit / 32 * outputs + n)] |= int32_t(one);
        }
      }
    }
  }

  void pack() {
    // All that the packer reads ends at a guard page.
    if (packed.size() == 0) begin("packing " + std::to_string(inputs) + " x " + std::to_string(outputs));
    const auto w = guarded(words), o = guarded(order), r = guarded(rows);
    const auto sw = guarded(scale_words);
    const auto t = guarded(tables);
    const auto h = guarded(halves);
    const auto z = guarded(zeros);
    const auto s = guarded(spans);
    TileSource source{};
    source.words = w.data(), source.word_rows = int64_t(words.size()) / outputs, source.stride = outputs;
    source.inputs = inputs, source.outputs = outputs, source.groups = groups();
    source.spans = s.data(), source.span_count = s.size(), source.positions = positions;
    source.order = order.empty() ? nullptr : o.data();
    source.rows = rows.empty() ? nullptr : r.data();
    source.kind = kind, source.zero_base = zero_base;
    source.scale_words = sw.data(), source.scale_stride = (outputs + 7) / 8, source.tables = t.data();
    source.scales = h.data(), source.zeros = kind == ScaleKind::zeros ? z.data() : nullptr;
    const PackedHeader header = packed_header(source);
    Buffer<uint8_t> first(header.bytes);
    pack_tiles(source, first.data());
    EXPECT(first.size() > int64_t(sizeof(header)) && std::memcmp(first.data(), &header, sizeof(header)) == 0);
    if (packed.size() != 0) EXPECT(same_bits(first.data(), packed.data(), packed.size()));
    packed = static_cast<Buffer<uint8_t>&&>(first);
  }

  Packed view() const { return {reinterpret_cast<const PackedHeader*>(packed.data())}; }
};

// `layout`: (bits, rows) of the groups. tiny: scales that are subnormal halves, and zero.
inline Matrix exl2(const std::vector<std::pair<int, int64_t>>& layout, int64_t outputs, bool permuted, bool tiny,
                   Random& random) {
  Matrix m;
  m.outputs = outputs, m.kind = ScaleKind::exl2;
  std::vector<int64_t> counts;
  std::vector<int> width;
  for (const auto& [bits, rows] : layout) {
    m.bits.push_back(bits);
    counts.push_back(rows);
    width.insert(width.end(), size_t(rows), bits);
  }
  m.cut(counts);
  m.inputs = m.positions;
  std::vector<std::vector<uint8_t>> stored;
  for (int64_t k = 0; k < m.positions; ++k) {
    m.input.push_back(int32_t(k));
    stored.emplace_back();
    for (int64_t n = 0; n < outputs; ++n) stored.back().push_back(uint8_t(random.below(1 << width[size_t(k)])));
    m.code.insert(m.code.end(), stored.back().begin(), stored.back().end());
  }
  if (permuted) random.shuffle(m.input), m.rows = m.input;
  m.put_codes(stored, width);
  const int64_t stride = (outputs + 7) / 8;
  m.scale_words.assign(size_t(m.groups() * stride), 0);
  for (int64_t g = 0; g < m.groups(); ++g) {
    const double most = tiny ? random.below(3) * 0x1p-24 : 0.001 + 0.02 * random.uniform();
    for (int s = 1; s <= 16; ++s) m.tables.push_back(half_to_float(float_to_half(float(s * s * most))));
    for (int64_t n = 0; n < outputs; ++n) {
      const uint32_t nibble = uint32_t(random.below(16));
      m.scale_words[size_t(g * stride + n / 8)] |= nibble << n % 8 * 4;
      m.scale.push_back(m.tables[size_t(g * 16 + nibble)]);
      m.zero.push_back(1 << (m.bits[size_t(g)] - 1));
    }
  }
  m.pack();
  return m;
}

// group_size -1: one group. An order of rows by activation if `act_order`; groups are padded to whole units.
inline Matrix gptq(int bits, int64_t inputs, int64_t outputs, int64_t group_size, bool act_order, bool symmetric,
                   bool tiny, Random& random) {
  Matrix m;
  m.inputs = inputs, m.outputs = outputs, m.kind = symmetric ? ScaleKind::symmetric : ScaleKind::zeros;
  const int64_t size = group_size < 0 ? inputs : group_size, groups = (inputs + size - 1) / size;
  std::vector<int64_t> group_of, counts;
  for (int64_t k = 0; k < inputs; ++k) group_of.push_back(k / size);
  if (act_order) random.shuffle(group_of);
  bool in_order = true;
  for (int64_t g = 0; g < groups; ++g) {
    m.bits.push_back(bits);
    const size_t before = m.input.size();
    for (int64_t k = 0; k < inputs; ++k) {
      if (group_of[size_t(k)] == g) m.input.push_back(int32_t(k));
    }
    while ((m.input.size() - before) % kUnit != 0) m.input.push_back(-1);
    counts.push_back(int64_t(m.input.size() - before));
  }
  m.cut(counts);
  for (size_t p = 0; p < m.input.size(); ++p) in_order = in_order && m.input[p] == int32_t(p);
  if (!in_order) m.order = m.rows = m.input;
  std::vector<std::vector<uint8_t>> stored;
  for (int64_t k = 0; k < inputs; ++k) {
    stored.emplace_back();
    for (int64_t n = 0; n < outputs; ++n) stored.back().push_back(uint8_t(random.below(1 << bits)));
  }
  for (int32_t k : m.input) {
    for (int64_t n = 0; n < outputs; ++n) m.code.push_back(k < 0 ? 0 : stored[size_t(k)][size_t(n)]);
  }
  m.put_codes(stored, std::vector<int>(size_t(inputs), bits));
  m.zero_base = symmetric ? 1 << (bits - 1) : random.below(2);
  for (int64_t i = 0; i < groups * outputs; ++i) {
    const double scale = tiny ? double(random.below(900)) * 0x1p-24 : 0.001 + 0.02 * random.uniform();
    m.halves.push_back(float_to_half(float(scale)));
    m.scale.push_back(half_to_float(m.halves.back()));
    m.zeros.push_back(uint8_t(random.below(1 << bits)));
    m.zero.push_back(int(m.zero_base) + (symmetric ? 0 : m.zeros.back()));
  }
  m.pack();
  return m;
}

}  // namespace check
