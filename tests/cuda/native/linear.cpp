// Matrices from their codes to products, against loops in double precision: mixed widths, a permutation, split columns.
// kernels: repack.cu dequant.cu skinny_stage.cu skinny.cu gemm.cu
#include <map>
#include <memory>
#include <utility>

#include "../../../ext/cuda/dequant.h"
#include "../../../ext/cuda/repack.h"
#include "../../../ext/cuda/skinny.h"
#include "../../../ext/cuda/skinny_stage.h"
#include "check.h"

namespace {

using namespace exl;

std::vector<UnitEntry> units_of(const std::vector<std::pair<int, int>>& groups) {  // (bits, units)
  std::vector<UnitEntry> units;
  uint32_t line = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (int u = 0; u < groups[g].second; ++u) {
      units.push_back({line, uint32_t(groups[g].first) | uint32_t(g) << 8});
      line += uint32_t(groups[g].first);
    }
  }
  return units;
}

// One matrix in all its forms.
struct Matrix {
  ScaleRecord kind;
  int outputs, columns, groups, units, zero_base;
  int64_t lines;
  std::vector<uint8_t> codes;   // [position][32 * columns]
  std::vector<double> scale;    // [group][32 * columns]
  std::vector<int> zero;        // the same
  std::vector<int> bits, group;  // of every unit
  std::unique_ptr<check::Buffer<uint8_t>> tiles, records;
  std::unique_ptr<check::Buffer<UnitEntry>> table;
  std::unique_ptr<check::Buffer<uint16_t>> maxima;
  CudaMatrix view;

  int width() const { return columns * kTileColumns32; }
  double weight(int position, int n) const {
    const int u = position / kUnitRows;
    const size_t at = size_t(group[size_t(u)]) * width() + n;
    return (codes[size_t(position) * width() + n] - zero[at]) * scale[at];
  }
};

Matrix make(ScaleRecord kind, int outputs, const std::vector<std::pair<int, int>>& layout, unsigned seed) {
  std::mt19937 random(seed);
  Matrix w;
  w.kind = kind;
  w.outputs = outputs;
  w.columns = (outputs + kTileColumns32 - 1) / kTileColumns32;
  w.groups = int(layout.size());
  const std::vector<UnitEntry> units = units_of(layout);
  w.units = int(units.size());
  w.zero_base = kind == ScaleRecord::zeros ? 1 : 0;
  w.lines = 0;
  int widest = 0;
  for (const UnitEntry& u : units) {
    w.bits.push_back(int(u.bits_group & 255));
    w.group.push_back(int(u.bits_group >> 8));
    w.lines += w.bits.back();
    widest = w.bits.back() > widest ? w.bits.back() : widest;
  }
  w.codes.resize(size_t(w.units) * kUnitRows * w.width());
  check::Buffer<uint32_t> words(size_t(w.lines) * w.width());
  std::memset(words.data(), 0, words.size() * 4);
  for (int p = 0; p < w.units * kUnitRows; ++p) {
    const int u = p / kUnitRows, bits = w.bits[size_t(u)];
    for (int n = 0; n < w.width(); ++n) {
      const uint32_t code = random() & ((1u << bits) - 1);
      w.codes[size_t(p) * w.width() + n] = uint8_t(code);
      for (int b = 0; b < bits; ++b) {
        const int64_t bit = int64_t(units[size_t(u)].line) * 32 + p % kUnitRows * bits + b;
        words[size_t(bit / 32) * w.width() + n] |= (code >> b & 1u) << (bit % 32);
      }
    }
  }
  w.table = std::make_unique<check::Buffer<UnitEntry>>(units);
  w.tiles = std::make_unique<check::Buffer<uint8_t>>(size_t(w.columns) * w.lines * kLineBytes);
  repack_cuda({words.data(), w.lines, w.width(), nullptr, w.table->data(), w.units, w.columns, w.lines * kLineBytes},
              w.tiles->data(), nullptr);

  const int record = record_bytes(kind);
  w.records = std::make_unique<check::Buffer<uint8_t>>(size_t(w.columns) * w.groups * record);
  w.maxima = std::make_unique<check::Buffer<uint16_t>>(size_t(w.groups));
  w.scale.resize(size_t(w.groups) * w.width());
  w.zero.resize(w.scale.size());
  std::memset(w.records->data(), 0, w.records->size());
  for (int g = 0; g < w.groups; ++g) {
    (*w.maxima)[size_t(g)] = float_to_half(float(1 + random() % 100) * 1e-5f);
    for (int n = 0; n < w.width(); ++n) {
      uint8_t* r = w.records->data() + (size_t(n / 32) * w.groups + g) * record;
      const int entry = n % 32 / 8, lane = n % 8;
      const size_t at = size_t(g) * w.width() + n;
      w.zero[at] = 1 << (layout[size_t(g)].first - 1);
      if (kind == ScaleRecord::exl2) {
        const int s = int(random() % 16);
        r[2 * lane + entry / 2] = uint8_t(r[2 * lane + entry / 2] | s << (4 * (entry % 2)));
        const float product = float((s + 1) * (s + 1)) * half_to_float((*w.maxima)[size_t(g)]);
        w.scale[at] = double(half_to_float(float_to_half(product)));
      } else {
        const uint16_t scale = float_to_half(float(1 + random() % 100) * 1e-4f);
        std::memcpy(r + 8 * lane + 2 * entry, &scale, 2);
        w.scale[at] = double(half_to_float(scale));
      }
      if (kind == ScaleRecord::zeros) {
        r[64 + 4 * lane + entry] = uint8_t(random() % 16);
        w.zero[at] = r[64 + 4 * lane + entry] + w.zero_base;
      }
    }
  }
  w.view = {w.tiles->data(), w.records->data(), w.table->data(), kind == ScaleRecord::exl2 ? w.maxima->data() : nullptr,
            w.lines * kLineBytes, w.units, w.groups, outputs, widest, record, kind, w.zero_base};
  return w;
}

std::vector<int32_t> permutation(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> rows(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) rows[size_t(i)] = i;
  for (int i = count - 1; i > 0; --i) std::swap(rows[size_t(i)], rows[random() % unsigned(i + 1)]);
  return rows;
}

void dequantized(const Matrix& w, const std::vector<int32_t>& order, std::string& bytes) {
  const int inputs = w.units * kUnitRows, columns = w.columns - 1;
  check::Buffer<int32_t> rows(order);
  check::Buffer<uint16_t> out(size_t(inputs) * columns * 32);
  dequant_cuda(w.view, rows.data(), inputs, 1, columns, out.data(), nullptr);
  for (int p = 0; p < inputs; ++p) {
    for (int n = 0; n < columns * 32; ++n) {
      const size_t at = size_t(order[size_t(p)]) * columns * 32 + n;
      const double wanted = double(half_to_float(float_to_half(float(w.weight(p, n + 32)))));
      check::near(double(half_to_float(out[at])), wanted, 0.0, "dequantized", int64_t(at));
    }
  }
  out.append_to(bytes);
}

// The units of all column groups in a row, cut in `blocks` pieces of about equal numbers.
struct Cuts {
  std::vector<Segment> segments;
  std::vector<int32_t> first{0};
  int slots = 0;
};

Cuts cut(const std::vector<const Matrix*>& matrices, int width, int blocks) {
  Cuts cuts;
  std::vector<std::pair<int, int>> groups;
  for (size_t i = 0; i < matrices.size(); ++i) {
    for (int c = 0; c < matrices[i]->columns; c += width) groups.push_back({int(i), c});
  }
  const int units = matrices[0]->units, total = units * int(groups.size());
  for (int b = 0; b < blocks; ++b) {
    for (int at = total * b / blocks, end = total * (b + 1) / blocks; at < end;) {
      const int g = at / units, stop = end < (g + 1) * units ? end : (g + 1) * units;
      cuts.segments.push_back({groups[size_t(g)].first, groups[size_t(g)].second, at % units, stop - g * units, 0, 0, 0, 0});
      at = stop;
    }
    cuts.first.push_back(int32_t(cuts.segments.size()));
  }
  std::map<std::pair<int, int>, std::vector<Segment*>> parts;
  for (Segment& s : cuts.segments) parts[{s.matrix, s.column}].push_back(&s);
  for (auto& [where, list] : parts) {
    for (size_t i = 0; i < list.size(); ++i) {
      list[i]->piece = int32_t(i);
      list[i]->pieces = int32_t(list.size());
      list[i]->slot = cuts.slots;
    }
    cuts.slots += int(list.size());
  }
  return cuts;
}

// y of the matrices; with a gate of the two first together: silu(y0) * y1.
void product(const std::vector<const Matrix*>& matrices, int m, int blocks, std::string& bytes, bool gated = false) {
  const Matrix& one = *matrices[0];
  const int inputs = one.units * kUnitRows;
  const bool skinny = m <= kSkinnyRows;
  const std::vector<int32_t> order = permutation(inputs, 3);
  std::mt19937 random(11);
  check::Buffer<int32_t> rows(order);
  check::Buffer<uint16_t> x(size_t(m) * inputs), staged(size_t(m) * inputs);
  check::Buffer<float> factors(static_cast<size_t>(m));
  for (size_t i = 0; i < x.size(); ++i) x[i] = float_to_half(float(int(random() % 2001) - 1000) * 1e-3f);
  const int width = skinny ? kSkinnyColumns : kGemmColumns;
  const Cuts cuts = gated ? cut({matrices[0]}, width / 2, blocks) : cut(matrices, width, blocks);
  const int row_blocks = skinny ? 1 : (m + kGemmRows - 1) / kGemmRows;
  check::Buffer<Segment> segments(cuts.segments);
  check::Buffer<int32_t> first(cuts.first), tickets(size_t(cuts.slots) * row_blocks);
  const size_t slot_sums = skinny ? kSkinnyColumns * 32 * kSkinnyRows : kGemmColumns * 32 * kGemmRows;
  check::Buffer<float> partials(slot_sums * size_t(cuts.slots) * size_t(row_blocks));
  std::memset(tickets.data(), 0, tickets.size() * 4);
  LinearWork work{};
  std::vector<std::unique_ptr<check::Buffer<float>>> results;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& w = *matrices[i];
    results.push_back(std::make_unique<check::Buffer<float>>(size_t(m) * w.outputs));
    work.matrix[i] = w.view;
    work.output[i] = {results[i]->data(), nullptr, nullptr, Dtype::float32};
    const int slot = w.view.widest * kLineBytes + w.view.record;
    work.slot_bytes = slot > work.slot_bytes ? slot : work.slot_bytes;
  }
  work.segments = segments.data();
  work.first = first.data();
  work.staged = staged.data();
  work.factors = factors.data();
  work.partials = partials.data();
  work.tickets = tickets.data();
  work.blocks = blocks;
  work.slots = cuts.slots;
  work.m = m;
  work.gate = gated ? Gate::silu : Gate::none;
  skinny_stage_cuda(x.data(), Dtype::float16, rows.data(), staged.data(), factors.data(), m, inputs, one.units, nullptr);
  for (int again = 0; again < 2; ++again) {  // a launch has to leave its tickets as it found them
    for (auto& y : results) std::memset(y->data(), 0xff, y->size() * 4);
    (skinny ? skinny_cuda : gemm_cuda)(work, nullptr);
  }
  const auto sums = [&](const Matrix& w, int row, int n, double& size) {
    double sum = size = 0;
    for (int p = 0; p < inputs; ++p) {
      double weight = w.weight(p, n);
      if (!skinny) weight = double(half_to_float(float_to_half(float(weight))));
      const double term = double(half_to_float(x[size_t(row) * inputs + order[size_t(p)]])) * weight;
      sum += term;
      size += std::fabs(term);
    }
    return sum;
  };
  const double error = (inputs / 8 + 64) * 0x1p-22;
  for (size_t i = 0; i < (gated ? 1 : matrices.size()); ++i) {
    const Matrix& w = *matrices[i];
    for (int row = 0; row < m; row += m > 40 ? 7 : 1) {
      for (int n = 0; n < w.outputs; ++n) {
        const int64_t at = int64_t(row) * w.outputs + n;
        double size = 0, other = 0, wanted = sums(w, row, n, size), tolerance = error * size;
        if (gated) {
          const double up = sums(*matrices[1], row, n, other);
          tolerance = error * (1.2 * size * (std::fabs(up) + error * other) + size * other);
          wanted = wanted / (1 + std::exp(-wanted)) * up;
        }
        check::near(double((*results[i])[size_t(at)]), wanted, tolerance, "y", at);
      }
    }
    results[i]->append_to(bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return check::every_order(argc, argv, [] {
    std::string bytes;
    // 35 units: a warp of four has more of them than the ring has stages.
    const Matrix mixed = make(ScaleRecord::exl2, 72, {{8, 4}, {6, 5}, {5, 7}, {4, 9}, {3, 6}, {2, 4}}, 1);
    const Matrix asymmetric = make(ScaleRecord::zeros, 40, {{4, 17}, {4, 18}}, 2);
    const Matrix middle = make(ScaleRecord::symmetric, 33, {{3, 16}, {3, 19}}, 3);
    dequantized(mixed, permutation(35 * kUnitRows, 5), bytes);
    product({&mixed}, 3, 3, bytes);
    product({&mixed, &asymmetric, &middle}, 11, 2, bytes);
    const Matrix up = make(ScaleRecord::symmetric, 72, {{4, 35}}, 4);
    product({&mixed, &up}, 18, 2, bytes, true);
    product({&mixed}, 66, 2, bytes);
    return bytes;
  });
}
