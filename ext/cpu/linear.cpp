// Matrix products: packs the input, chooses between the few-row and the many-row kernels, and shares the work among
// threads. None of these choices changes a result, see linear.h.
#include "linear.h"

#include <atomic>
#include <cstring>

#include "isa.h"
#include "linear_isa.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kPanelTiles = 16;  // 64 columns x kBlock float32 = 128 KB: half of a small second-level cache
constexpr int64_t kRowBlock = 192;    // rows packed at a time; a multiple of every tile_rows
constexpr int64_t kGrainWeights = 1 << 17;  // weights of one thread below which a region costs more than it saves

const LinearIsa& chosen() {
#if EXL_X86_ISA
  if (isa() == Isa::avx512) return linear_avx512();
  if (isa() == Isa::avx2) return linear_avx2();
#endif
  return linear_portable();
}

int64_t blocks_of(int64_t positions) { return (positions + kBlock - 1) / kBlock; }

// Grouped and dense matrices as the driver sees them.
struct GroupedJob {
  const GroupedWeights& w;
  int64_t positions() const { return w.positions; }
  int64_t inputs() const { return w.inputs; }
  int64_t outputs() const { return w.outputs; }
  int64_t scratch() const { return (2 * w.groups + 8) * kTileColumns; }

  void pack(const float* x, float* to, int64_t block) const {
    const int64_t begin = block * kBlock, left = w.positions - begin, length = left < kBlock ? left : kBlock;
    for (int64_t i = 0; i < length; ++i) {
      const int32_t row = w.rows[begin + i];
      to[i] = row < 0 ? 0.0f : x[row];
    }
  }
  int64_t few_rows(const LinearIsa& k) const { return k.few_grouped_rows; }
  // Decoding the weights twice in registers is still cheaper than once into a panel and multiplying from there.
  int64_t few_passes() const { return 2; }
  void few(const LinearIsa& k, const PackedInput& x, float* y, int64_t first, int64_t last, float* scratch) const {
    k.few_grouped(w, x, y, first, last, scratch);
  }
  void fill(const LinearIsa& k, int64_t block, int64_t first, int64_t last, float* panel, float* scratch) const {
    k.fill_grouped(w, block, first, last, panel, scratch);
  }
};

struct DenseJob {
  const DenseWeights& w;
  int64_t positions() const { return (w.inputs + 15) / 16 * 16; }
  int64_t inputs() const { return w.inputs; }
  int64_t outputs() const { return w.outputs; }
  int64_t scratch() const { return 0; }

  void pack(const float* x, float* to, int64_t block) const {
    const int64_t begin = block * kBlock, left = w.inputs - begin, length = left < kBlock ? left : kBlock;
    std::memcpy(to, x + begin, size_t(length) * sizeof(float));
    for (int64_t i = length; i % 16 != 0; ++i) to[i] = 0.0f;
  }
  int64_t few_rows(const LinearIsa& k) const { return k.few_dense_rows; }
  int64_t few_passes() const { return 1; }
  void few(const LinearIsa& k, const PackedInput& x, float* y, int64_t first, int64_t last, float*) const {
    k.few_dense(w, x, y, first, last);
  }
  void fill(const LinearIsa& k, int64_t block, int64_t first, int64_t last, float* panel, float*) const {
    k.fill_dense(w, block, first, last, panel);
  }
};

template <class Job>
void multiply_few(const LinearIsa& kernels, const Job& job, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory;
  const int64_t blocks = blocks_of(job.positions()), tiles = (job.outputs() + kTileColumns - 1) / kTileColumns;
  const int64_t packed_size = blocks * rows * kBlock, slot_size = (job.scratch() + 15) / 16 * 16;
  float* packed = memory.floats(packed_size + slot_size * threads());
  const PackedInput input{packed, rows};
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t r = 0; r < rows; ++r) job.pack(x + r * job.inputs(), packed + (block * rows + r) * kBlock, block);
  }
  std::atomic<int64_t> slots{0};
  const int64_t per_tile = job.positions() * kTileColumns;
  parallel_for(
      tiles,
      [&](int64_t first, int64_t last) {
        float* scratch = packed + packed_size + slot_size * slots.fetch_add(1, std::memory_order_relaxed);
        job.few(kernels, input, y, first, last, scratch);
      },
      kGrainWeights / (per_tile + 1) + 1);
}

template <class Job>
void multiply_many(const LinearIsa& kernels, const Job& job, const float* x, float* y, int64_t rows) {
  static thread_local Scratch memory;
  const int64_t blocks = blocks_of(job.positions()), tiles = (job.outputs() + kTileColumns - 1) / kTileColumns;
  const int64_t most_rows = rows < kRowBlock ? rows : kRowBlock, team = threads();
  const int64_t packed_size = blocks * most_rows * kBlock, panel_size = kPanelTiles * kTileColumns * kBlock;
  const int64_t slot_size = panel_size + (job.scratch() + 15) / 16 * 16;
  float* packed = memory.floats(packed_size + slot_size * team);

  for (int64_t row0 = 0; row0 < rows; row0 += kRowBlock) {
    const int64_t here = rows - row0 < kRowBlock ? rows - row0 : kRowBlock;
    const PackedInput input{packed, here};
    parallel_for(
        here,
        [&](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r) {
            for (int64_t block = 0; block < blocks; ++block) {
              job.pack(x + (row0 + r) * job.inputs(), packed + (block * here + r) * kBlock, block);
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
      float* panel = packed + packed_size + slot_size * slot;
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < panels * parts;) {
        const int64_t first = item / parts * kPanelTiles, part = item % parts;
        const int64_t last = first + kPanelTiles < tiles ? first + kPanelTiles : tiles;
        const int64_t begin = groups * part / parts * kernels.tile_rows;
        const int64_t stop = groups * (part + 1) / parts * kernels.tile_rows, end = stop < here ? stop : here;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t left = job.positions() - block * kBlock, length = left < kBlock ? left : kBlock;
          job.fill(kernels, block, first, last, panel, panel + panel_size);
          kernels.many(input, begin, end, block, length, panel, y + row0 * job.outputs(), job.outputs(), first, last);
        }
      }
    });
  }
}

template <class Job>
void multiply(const Job& job, const float* x, float* y, int64_t rows) {
  if (rows <= 0 || job.outputs() <= 0) return;
  if (job.positions() <= 0) {
    std::memset(y, 0, size_t(rows * job.outputs()) * sizeof(float));
    return;
  }
  const LinearIsa& kernels = chosen();
  const int64_t few = job.few_rows(kernels), passes = (rows + few - 1) / few;
  if (passes > job.few_passes()) return multiply_many(kernels, job, x, y, rows);
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t first = rows * pass / passes, last = rows * (pass + 1) / passes;
    multiply_few(kernels, job, x + first * job.inputs(), y + first * job.outputs(), last - first);
  }
}

}  // namespace

void linear_grouped_cpu(const GroupedWeights& w, const float* x, float* y, int64_t rows) {
  multiply(GroupedJob{w}, x, y, rows);
}

void linear_dense_cpu(const DenseWeights& w, const float* x, float* y, int64_t rows) {
  multiply(DenseJob{w}, x, y, rows);
}

}  // namespace exl
