// Products with packed matrices: quantizes the input, chooses the kernels and shares the work among threads. None of
// these choices changes a result, see linear_packed.h.
#include "linear_packed.h"

#include <cstring>

#include "isa.h"
#include "linear_packed_isa.h"
#include "scratch.h"
#include "threads.h"

namespace exl {

const PackedIsa& linear_packed_isa() {
#if EXL_X86_ISA
  if (use_avx512vnni()) return linear_packed_avx512vnni();
#if EXL_AVXVNNI
  if (use_avxvnni()) return linear_packed_avxvnni();
#endif
  if (isa() != Isa::portable) return linear_packed_avx2();
#endif
  return linear_packed_portable();
}

QuantizedRows quantized_layout(const Packed& w, bool residual) {
  const int64_t units = w.header->positions * (residual ? 2 : 1);
  const int64_t bytes = units + w.header->spans * int64_t(sizeof(InputSpan));
  return {nullptr, (bytes + kLine - 1) / kLine * kLine, units, residual};
}

namespace {

constexpr int64_t kRowsAtOnce = 512;        // quantized at a time
// Few rows: how many pieces a thread's share has, whose last ones others may take. More would even out more, but every
// panel of a piece is a stream that memory takes some 0.6 us to start (LOG.md).
constexpr int64_t kPieces = 4;

// A product and where its quantized input lies.
struct Task {
  Product product;
  QuantizedRows input;
  int64_t first_tile;  // among the tiles of all products
};

// Rows [0, rows) of tiles [begin, end) of one product.
void multiply_tiles(const PackedIsa& kernels, const Task& task, int64_t begin, int64_t end, int64_t rows, float* y) {
  const Packed& w = task.product.w;
  for (int64_t panel = 0; panel < w.header->panels; ++panel) {
    kernels.multiply(w, panel, begin, end, task.input, rows, y);
  }
}

}  // namespace

void linear_packed_cpu(const Product* products, int count, const float* x, int64_t rows, int64_t residual_rows) {
  static thread_local Scratch memory;
  const PackedIsa& kernels = linear_packed_isa();
  const bool residual = rows <= residual_rows;
  const int64_t most_rows = rows < kRowsAtOnce ? rows : kRowsAtOnce;

  Task tasks[kMostTogether];
  int64_t tiles = 0, room = 0, bytes = 0;
  for (int i = 0; i < count; ++i) {
    const Packed& w = products[i].w;
    tasks[i] = {products[i], quantized_layout(w, residual), tiles};
    tiles += w.tiles();
    bytes += w.header->bytes - w.header->tiles_at;
    room += most_rows * tasks[i].input.stride;
  }
  if (rows <= 0 || tiles == 0) return;
  uint8_t* place = reinterpret_cast<uint8_t*>(memory.floats(room / int64_t(sizeof(float))));
  Task* fresh[kMostTogether];  // those whose input is not another's
  int inputs = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < i && tasks[i].input.data == nullptr; ++j) {
      if (tasks[j].product.w.header->signature == tasks[i].product.w.header->signature) tasks[i].input = tasks[j].input;
    }
    if (tasks[i].input.data != nullptr) continue;
    tasks[i].input.data = place;
    place += most_rows * tasks[i].input.stride;
    fresh[inputs++] = &tasks[i];
  }

  const int64_t tile_bytes = bytes / tiles + 1, chunk = kChunkBytes / tile_bytes + 1;
  for (int64_t row0 = 0; row0 < rows; row0 += kRowsAtOnce) {
    const int64_t here = rows - row0 < kRowsAtOnce ? rows - row0 : kRowsAtOnce;
    const auto quantize = [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t r = task / inputs;
        const QuantizedRows& to = fresh[task % inputs]->input;
        const Packed& w = fresh[task % inputs]->product.w;
        uint8_t* row = to.data + r * to.stride;
        kernels.quantize(w, x + (row0 + r) * w.header->inputs, residual, row,
                         reinterpret_cast<InputSpan*>(row + to.spans_at));
      }
    };
    parallel_for(here * inputs, quantize);  // a row takes longer than a region of threads that are awake
    const auto multiply = [&](int64_t first, int64_t last) {
      for (int i = 0; i < count; ++i) {
        const Task& task = tasks[i];
        const int64_t own = task.product.w.tiles();
        int64_t begin = first - task.first_tile, end = last - task.first_tile;
        begin = begin < 0 ? 0 : begin;
        end = end > own ? own : end;
        float* y = task.product.y + row0 * task.product.w.header->outputs;
        if (begin < end) multiply_tiles(kernels, task, begin, end, here, y);
      }
    };
    if (here > kFewRows) {
      parallel_chunks(tiles, chunk, multiply);
    } else {
      // Rounded up no further than needed, so that matrices of one size are cut where they meet.
      const int64_t pieces = kPieces * int64_t(threads()), fair = (tiles + pieces - 1) / pieces;
      const int64_t least = kGrainBytes / tile_bytes + 1;
      parallel_steal(tiles, fair > least ? fair : least, multiply);
    }
  }
}

}  // namespace exl
