// The driver of many small products; the kernels are those of linear_packed.h.
#include "linear_groups.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "linear_packed_isa.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kNear = 32;  // products that are looked at for the same input

// Where the quantized input of a product lies, and what of the work of all is its own.
struct Part {
  QuantizedRows input;
  int64_t input_of;    // the product that quantizes it: this one, or an earlier one
  int64_t first_row;   // among all rows to quantize
  int64_t first_tile;  // among the tiles of all products
};

bool same_input(const GroupProduct& a, const GroupProduct& b) {
  if (a.x != b.x || a.count != b.count || a.residual != b.residual) return false;
  if (a.rows != b.rows) {
    if (a.rows == nullptr || b.rows == nullptr) return false;
    if (std::memcmp(a.rows, b.rows, size_t(a.count) * sizeof(int32_t)) != 0) return false;
  }
  return a.w.header->signature == b.w.header->signature;
}

// f(part index, begin, end) for what [first, last) of the whole is in each part; `of` is where a part begins.
template <class F>
void each_part(const std::vector<Part>& parts, int64_t Part::*of, int64_t first, int64_t last, const F& f) {
  // The last part that begins at or before `first`: those before it that begin there are empty.
  const auto found = std::upper_bound(parts.begin(), parts.end(), first,
                                      [of](int64_t value, const Part& part) { return value < part.*of; });
  for (size_t i = size_t(found - parts.begin()) - 1; first < last; ++i) {
    const int64_t begin = parts[i].*of, next = i + 1 < parts.size() ? parts[i + 1].*of : last;
    const int64_t end = next < last ? next : last;
    if (first < end) f(i, first - begin, end - begin);
    first = end;
  }
}

}  // namespace

void linear_packed_groups(const GroupProduct* products, int64_t count) {
  static thread_local Scratch memory;
  static thread_local std::vector<Part> own;
  std::vector<Part>& parts = own;  // a body on another thread would name its own
  const PackedIsa& kernels = linear_packed_isa();
  parts.clear();
  int64_t tiles = 0, rows = 0, bytes = 0, room = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const GroupProduct& p = products[i];
    parts.push_back({quantized_layout(p.w, p.residual), i, rows, tiles});
    Part& part = parts.back();
    for (int64_t j = i - 1; j >= 0 && j >= i - kNear && part.input_of == i; --j) {
      if (same_input(p, products[j])) part.input_of = parts[size_t(j)].input_of;
    }
    tiles += p.w.tiles();
    bytes += p.w.header->bytes - p.w.header->tiles_at;
    most = p.count > most ? p.count : most;
    if (part.input_of != i) continue;
    rows += p.count;
    room += p.count * part.input.stride;
  }
  if (rows == 0 || tiles == 0) return;
  uint8_t* place = reinterpret_cast<uint8_t*>(memory.floats(room / int64_t(sizeof(float))));
  for (int64_t i = 0; i < count; ++i) {
    Part& part = parts[size_t(i)];
    part.input.data = part.input_of == i ? place : parts[size_t(part.input_of)].input.data;
    if (part.input_of == i) place += products[i].count * part.input.stride;
  }

  parallel_for(rows, [&](int64_t first, int64_t last) {
    each_part(parts, &Part::first_row, first, last, [&](size_t i, int64_t begin, int64_t end) {
      const GroupProduct& p = products[i];
      const QuantizedRows& to = parts[i].input;
      for (int64_t r = begin; r < end; ++r) {
        uint8_t* row = to.data + r * to.stride;
        const float* from = p.x + (p.rows == nullptr ? r : p.rows[r]) * p.w.header->inputs;
        kernels.quantize(p.w, from, p.residual, row, reinterpret_cast<InputSpan*>(row + to.spans_at));
      }
    });
  });
  const auto multiply = [&](int64_t first, int64_t last) {
    each_part(parts, &Part::first_tile, first, last, [&](size_t i, int64_t begin, int64_t end) {
      const GroupProduct& p = products[i];
      for (int64_t panel = 0; panel < p.w.header->panels; ++panel) {
        kernels.multiply(p.w, panel, begin, end, parts[i].input, p.count, p.y);
      }
    });
  };
  const int64_t tile_bytes = bytes / tiles + 1;
  if (most > kFewRows) {
    parallel_chunks(tiles, kChunkBytes / tile_bytes + 1, multiply);
  } else {
    const int64_t fair = tiles / (8 * int64_t(threads())) + 1, least = kGrainBytes / tile_bytes + 1;
    parallel_steal(tiles, fair > least ? fair : least, multiply);
  }
}

}  // namespace exl
