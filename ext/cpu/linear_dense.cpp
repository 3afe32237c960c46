// Products with dense matrices: packs the input, chooses between the few-row and the many-row kernels, and shares the
// work among threads. None of these choices changes a result, see linear_dense.h.
#include "linear_dense.h"

#include <atomic>
#include <cstring>

#include "isa.h"
#include "linear_dense_isa.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kPanelTiles = 16;  // 64 columns x kBlock float32 = 128 KB: half of a small second-level cache
constexpr int64_t kRowBlock = 384;   // rows packed at a time; a multiple of every tile_rows
constexpr int64_t kGrainWeights = 1 << 17;  // weights of one thread below which a region costs more than it saves

const DenseIsa& chosen() {
#if EXL_X86_ISA
  if (isa() == Isa::avx512) return linear_dense_avx512();
  if (isa() == Isa::avx2) return linear_dense_avx2();
#endif
  return linear_dense_portable();
}

int64_t blocks_of(int64_t inputs) { return (inputs + kBlock - 1) / kBlock; }

void pack(const DenseWeights& w, const float* x, float* to, int64_t block) {
  const int64_t begin = block * kBlock, left = w.inputs - begin, length = left < kBlock ? left : kBlock;
  std::memcpy(to, x + begin, size_t(length) * sizeof(float));
  for (int64_t i = length; i % 16 != 0; ++i) to[i] = 0.0f;
}

void multiply_few(const DenseIsa& kernels, const DenseWeights& w, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory;
  const int64_t blocks = blocks_of(w.inputs), tiles = (w.outputs + kDenseColumns - 1) / kDenseColumns;
  float* packed = memory.floats(blocks * rows * kBlock);
  const DenseInput input{packed, rows};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t r = 0; r < rows; ++r) pack(w, x + r * w.inputs, packed + (block * rows + r) * kBlock, block);
  }
  const int64_t fair = tiles / (8 * int64_t(threads())) + 1, least = kGrainWeights / (w.inputs * kDenseColumns + 1) + 1;
  parallel_steal(tiles, fair > least ? fair : least,
                 [&](int64_t first, int64_t last) { kernels.few(w, input, y, first, last); });
}

void multiply_many(const DenseIsa& kernels, const DenseWeights& w, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory;
  const int64_t blocks = blocks_of(w.inputs), tiles = (w.outputs + kDenseColumns - 1) / kDenseColumns;
  const int64_t most_rows = rows < kRowBlock ? rows : kRowBlock, team = threads();
  const int64_t packed_size = blocks * most_rows * kBlock, panel_size = kPanelTiles * kDenseColumns * kBlock;
  float* packed = memory.floats(packed_size + panel_size * team);

  for (int64_t row0 = 0; row0 < rows; row0 += kRowBlock) {
    const int64_t here = rows - row0 < kRowBlock ? rows - row0 : kRowBlock;
    const DenseInput input{packed, here};
    parallel_for(
        here,
        [&](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r) {
            for (int64_t block = 0; block < blocks; ++block) {
              pack(w, x + (row0 + r) * w.inputs, packed + (block * here + r) * kBlock, block);
            }
          }
        },
        8);

    // An item is a panel of columns times a range of rows. Rows are split only where there are too few panels to go
    // round, since every range dequantizes the panel anew.
    const int64_t panels = (tiles + kPanelTiles - 1) / kPanelTiles;
    int64_t parts = (2 * team + panels - 1) / panels;
    const int64_t most_parts = (here + 4 * kernels.tile_rows - 1) / (4 * kernels.tile_rows);
    if (team == 1 || parts < 1) parts = 1;
    if (parts > most_parts) parts = most_parts;
    const int64_t groups = (here + kernels.tile_rows - 1) / kernels.tile_rows;
    std::atomic<int64_t> next{0};
    parallel_for(team, [&](int64_t slot, int64_t) {
      float* panel = packed + packed_size + panel_size * slot;
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < panels * parts;) {
        const int64_t first = item / parts * kPanelTiles, part = item % parts;
        const int64_t last = first + kPanelTiles < tiles ? first + kPanelTiles : tiles;
        const int64_t begin = groups * part / parts * kernels.tile_rows;
        const int64_t stop = groups * (part + 1) / parts * kernels.tile_rows, end = stop < here ? stop : here;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t left = w.inputs - block * kBlock, length = left < kBlock ? left : kBlock;
          kernels.fill(w, block, first, last, panel);
          kernels.many(input, begin, end, block, length, panel, y + row0 * w.outputs, w.outputs, first, last);
        }
      }
    });
  }
}

}  // namespace

void linear_dense_cpu(const DenseWeights& w, const float* x, float* y, int64_t rows) {
  if (rows <= 0 || w.outputs <= 0) return;
  if (w.inputs <= 0) {
    std::memset(y, 0, size_t(rows * w.outputs) * sizeof(float));
    return;
  }
  const DenseIsa& kernels = chosen();
  if (rows > kernels.few_rows) return multiply_many(kernels, w, x, y, rows);
  multiply_few(kernels, w, x, y, rows);
}

}  // namespace exl
