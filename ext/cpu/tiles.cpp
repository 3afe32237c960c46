// See tiles.h. Columns are taken 32 at a time: two cache lines of every row of words, turned into bit streams that stay
// in the second-level cache.
#include "tiles.h"

#include <atomic>
#include <cstring>

#include "../common/bitstream.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kTilesAtOnce = 8;
constexpr int64_t kColumnsAtOnce = kTilesAtOnce * kTileColumns;
constexpr int64_t kSpareWords = 2;  // 8 bytes are loaded wherever 8 codes begin

// The streams of columns [first, first + kColumnsAtOnce), zeros where the matrix has none.
void transpose(const TileRegion& r, int64_t first, uint32_t* streams) {
  const int64_t length = r.word_rows + kSpareWords;
  const int64_t left = r.outputs - first, live = left < kColumnsAtOnce ? left : kColumnsAtOnce;
  if (live < kColumnsAtOnce) std::memset(streams, 0, size_t(kColumnsAtOnce * length) * sizeof(uint32_t));
  for (int64_t row = 0; row < r.word_rows; ++row) {
    const int32_t* from = r.words + row * r.stride + first;
    for (int64_t c = 0; c < live; ++c) streams[c * length + row] = uint32_t(from[c]);
  }
}

void copy_tile(const TileRegion& r, const uint32_t* streams, uint8_t* to) {
  const int64_t length = r.word_rows + kSpareWords, bytes = step_bytes(r.bits);
  for (int64_t at = 0; at < r.positions / kStepCodes * bytes; at += bytes) {
    for (int64_t c = 0; c < kTileColumns; ++c, to += bytes) {
      std::memcpy(to, reinterpret_cast<const uint8_t*>(streams + c * length) + at, size_t(bytes));
    }
  }
}

// codes: room for one number per stored row and one more; a number holds the codes of the tile's four columns.
void permute_tile(const TileRegion& r, const uint32_t* streams, uint32_t* codes, uint8_t* to) {
  const int64_t length = r.word_rows + kSpareWords, rows = r.word_rows * 32 / r.bits;
  const uint64_t mask = (uint64_t(1) << r.bits) - 1;
  for (int64_t row = 0; row < rows; row += 8) {  // 8 codes are `bits` whole bytes
    uint64_t eight[kTileColumns];
    for (int64_t c = 0; c < kTileColumns; ++c) {
      std::memcpy(&eight[c], reinterpret_cast<const uint8_t*>(streams + c * length) + row / 8 * r.bits, 8);
    }
    for (int i = 0; i < 8; ++i) {
      const int shift = i * r.bits;
      codes[row + i] = uint32_t((eight[0] >> shift & mask) | (eight[1] >> shift & mask) << 8 |
                                (eight[2] >> shift & mask) << 16 | (eight[3] >> shift & mask) << 24);
    }
  }
  codes[rows] = 0;
  for (int64_t position = 0; position < r.positions; position += kStepCodes) {
    for (int half = 0; half < 2; ++half) {
      uint64_t eight[kTileColumns] = {};
      for (int i = 0; i < 8; ++i) {
        const int64_t row = r.order[position + half * 8 + i];
        const uint64_t four = codes[row < 0 ? rows : row];
        for (int c = 0; c < kTileColumns; ++c) eight[c] |= (four >> 8 * c & 255) << i * r.bits;
      }
      for (int64_t c = 0; c < kTileColumns; ++c) {
        std::memcpy(to + c * step_bytes(r.bits) + half * r.bits, &eight[c], size_t(r.bits));
      }
    }
    to += kTileColumns * step_bytes(r.bits);
  }
}

}  // namespace

void fill_tiles(const TileRegion& region) {
  static thread_local Scratch memory;
  const int64_t tiles = (region.outputs + kTileColumns - 1) / kTileColumns;
  const int64_t pieces = (tiles + kTilesAtOnce - 1) / kTilesAtOnce, team = threads() < pieces ? threads() : pieces;
  const int64_t length = region.word_rows + kSpareWords;
  const int64_t codes = region.order == nullptr ? 0 : region.word_rows * 32 / region.bits + 1;
  const int64_t slot_size = kColumnsAtOnce * length + codes;
  float* scratch = memory.floats(team * slot_size);
  static_assert(sizeof(float) == sizeof(uint32_t), "scratch is counted in 32-bit words");
  std::atomic<int64_t> next{0};
  parallel_for(team, [&](int64_t slot, int64_t) {
    uint32_t* streams = reinterpret_cast<uint32_t*>(scratch + slot * slot_size);
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      transpose(region, piece * kColumnsAtOnce, streams);
      for (int64_t t = 0; t < kTilesAtOnce && piece * kTilesAtOnce + t < tiles; ++t) {
        const uint32_t* tile = streams + t * kTileColumns * length;
        uint8_t* to = region.tiles + (piece * kTilesAtOnce + t) * region.tile_bytes;
        if (region.order == nullptr) {
          copy_tile(region, tile, to);
        } else {
          permute_tile(region, tile, streams + kColumnsAtOnce * length, to);
        }
      }
    }
  });
}

}  // namespace exl
