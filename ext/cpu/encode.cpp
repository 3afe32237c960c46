// The quantizer's inner loops: cuts the columns into packed tiles and shares the tiles among threads. See encode.h.
#include "encode.h"

#include <atomic>
#include <cstring>

#include "../common/half.h"
#include "encode_isa.h"
#include "isa.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kC = kEncodeColumns;
constexpr int64_t kGrainSteps = 1 << 15;  // quantized or updated weights of a thread that are worth waking it

const EncodeIsa& chosen() {
#if EXL_X86_ISA
  if (isa() == Isa::avx512) return encode_avx512();
  if (isa() == Isa::avx2) return encode_avx2();
#endif
  return encode_portable();
}

// Columns [first, first + count) of a row-major matrix.
struct Strip {
  int64_t first, count, rows, columns;

  Strip(const EncodeShape& shape, int64_t tile)
      : first(tile * kC),
        count(shape.columns - first < kC ? shape.columns - first : kC),
        rows(shape.rows),
        columns(shape.columns) {}

  // (height, columns) into (height, kC), zeros behind the last column.
  void pack(const float* from, int64_t height, float* to) const {
    if (count < kC) std::memset(to, 0, size_t(height * kC) * sizeof(float));
    from += first;
    for (int64_t r = 0; r < height; ++r, from += columns, to += kC) {
      if (count == kC) {
        std::memcpy(to, from, kC * sizeof(float));
      } else {
        std::memcpy(to, from, size_t(count) * sizeof(float));
      }
    }
  }
  template <class To, class Convert>
  void unpack(const float* from, int64_t height, To* to, const Convert& convert) const {
    to += first;
    for (int64_t r = 0; r < height; ++r, from += kC, to += columns) {
      if (count == kC) {
        for (int64_t c = 0; c < kC; ++c) to[c] = To(convert(from[c]));
      } else {
        for (int64_t c = 0; c < count; ++c) to[c] = To(convert(from[c]));
      }
    }
  }
};

float same(float x) { return x; }
float negated(float x) { return 0.0f - x; }  // never -0
int32_t integer(float x) { return int32_t(x); }

// body(tile, variant, scratch, fresh) for all tiles of columns and all variants. `scratch` has `floats` floats and is
// kept between calls of one thread; `fresh` tells that the tile is not the one of its last call.
template <class Body>
void over_tiles(const EncodeShape& shape, int64_t variants, int64_t steps, int64_t floats, const Body& body) {
  static thread_local Scratch memory;
  const int64_t tiles = (shape.columns + kC - 1) / kC;
  floats = (floats + 15) / 16 * 16;
  float* all = memory.floats(floats * threads());
  std::atomic<int64_t> slots{0};
  parallel_for(
      tiles * variants,
      [&](int64_t begin, int64_t end) {
        float* scratch = all + floats * slots.fetch_add(1, std::memory_order_relaxed);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t variant = task % variants;
          body(task / variants, variant, scratch, task == begin || variant == 0);
        }
      },
      kGrainSteps / (steps * kC + 1) + 1);
}

}  // namespace

void scale_search_cpu(const EncodeShape& shape, const float* w, const float* row_weights, const float* group_scales,
                      int64_t candidates, uint8_t* codes, float* loss) {
  static thread_local Scratch memory;
  if (candidates == 0) return;
  float* scales = memory.floats(candidates * 16);
  for (int64_t i = 0; i < candidates; ++i) {
    for (int s = 1; s <= 16; ++s) {
      scales[i * 16 + s - 1] = half_to_float(float_to_half(float(s * s) * group_scales[i]));
    }
  }
  const EncodeIsa& kernels = chosen();
  const int64_t packed = shape.rows * kC;
  over_tiles(shape, candidates, shape.rows * 16, packed + 2 * kC,
             [&](int64_t tile, int64_t candidate, float* scratch, bool fresh) {
               const Strip strip(shape, tile);
               if (fresh) strip.pack(w, shape.rows, scratch);
               float *best = scratch + packed, *least = best + kC;
               kernels.search(scratch, row_weights, scales + candidate * 16, shape.rows, shape.bits, best, least);
               strip.unpack(best, 1, codes + candidate * shape.columns, integer);
               strip.unpack(least, 1, loss + candidate * shape.columns, same);
             });
}

void feedback_loss_cpu(const EncodeShape& shape, const float* w, const float* u, const float* scales,
                       int64_t candidates, float* loss) {
  if (candidates == 0) return;
  const EncodeIsa& kernels = chosen();
  const int64_t packed = shape.rows * kC;
  over_tiles(shape, candidates, shape.rows * shape.rows / 2, 2 * packed + 2 * kC,
             [&](int64_t tile, int64_t candidate, float* scratch, bool fresh) {
               const Strip strip(shape, tile);
               if (fresh) strip.pack(w, shape.rows, scratch);
               float *moves = scratch + packed, *scale = moves + packed, *sum = scale + kC;
               strip.pack(scales + candidate * shape.columns, 1, scale);
               kernels.feedback({shape.rows, shape.bits, u, scratch, nullptr, scale, moves, nullptr, nullptr, sum});
               strip.unpack(sum, 1, loss + candidate * shape.columns, same);
             });
}

void feedback_encode_cpu(const EncodeShape& shape, const float* w, const float* u, const float* scales, int8_t* codes,
                         float* q, float* errors) {
  const EncodeIsa& kernels = chosen();
  const int64_t packed = shape.rows * kC;
  over_tiles(shape, 1, shape.rows * shape.rows / 2, 4 * packed + kC,
             [&](int64_t tile, int64_t, float* start, bool) {
               const Strip strip(shape, tile);
               float *moves = start + packed, *code = moves + packed, *value = code + packed, *scale = value + packed;
               strip.pack(w, shape.rows, start);
               strip.pack(scales, 1, scale);
               kernels.feedback({shape.rows, shape.bits, u, start, nullptr, scale, moves, code, value, nullptr});
               strip.unpack(code, shape.rows, codes, integer);
               strip.unpack(value, shape.rows, q, same);
               strip.unpack(moves, shape.rows, errors, negated);
             });
}

void descend_cpu(const EncodeShape& shape, const float* q, const float* gradient, const float* h, const float* scales,
                 int8_t* codes, float* new_q, float* delta) {
  const EncodeIsa& kernels = chosen();
  const int64_t packed = shape.rows * kC;
  over_tiles(shape, 1, shape.rows * shape.rows / 2, 5 * packed + kC,
             [&](int64_t tile, int64_t, float* start, bool) {
               const Strip strip(shape, tile);
               float *before = start + packed, *moves = before + packed, *code = moves + packed;
               float *value = code + packed, *scale = value + packed;
               strip.pack(gradient, shape.rows, start);
               strip.pack(q, shape.rows, before);
               strip.pack(scales, 1, scale);
               kernels.descend({shape.rows, shape.bits, h, start, before, scale, moves, code, value, nullptr});
               strip.unpack(code, shape.rows, codes, integer);
               strip.unpack(value, shape.rows, new_q, same);
               strip.unpack(moves, shape.rows, delta, same);
             });
}

}  // namespace exl
