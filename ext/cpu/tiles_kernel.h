// The packing of tiles, see tiles.h: codes are taken out of the words for 16 columns, half of a tile, at once. Written in
// vectors of the compiler, which makes of them what the instruction set of the including file has.
//
// Everything has internal linkage, see isa.h.
#pragma once

#include <cstring>
#include <utility>

#include "tiles_isa.h"

namespace exl {
namespace {

#define EXL_INLINE inline __attribute__((always_inline))

typedef uint32_t Columns __attribute__((vector_size(64)));  // one number of each of the 16 columns

// `count` bits of every code of a quad, from bit `from` on, at bit `at` of a line.
struct Piece {
  int line, quad, from, count, at;
};

// See tiles.h.
template <int bits>
constexpr Piece kPieces[] = {{}};
template <>
constexpr Piece kPieces<2>[] = {{0, 0, 0, 2, 0}, {0, 1, 0, 2, 2}, {0, 2, 0, 2, 4}, {0, 3, 0, 2, 6},
                                {1, 4, 0, 2, 0}, {1, 5, 0, 2, 2}, {1, 6, 0, 2, 4}, {1, 7, 0, 2, 6}};
template <>
constexpr Piece kPieces<3>[] = {{0, 0, 0, 3, 0}, {0, 1, 0, 3, 3}, {1, 2, 0, 3, 0}, {1, 3, 0, 3, 3}, {2, 4, 0, 3, 0},
                                {2, 5, 0, 3, 3}, {0, 6, 0, 2, 6}, {2, 6, 2, 1, 6}, {1, 7, 0, 2, 6}, {2, 7, 2, 1, 7}};
template <>
constexpr Piece kPieces<4>[] = {{0, 0, 0, 4, 0}, {0, 1, 0, 4, 4}, {1, 2, 0, 4, 0}, {1, 3, 0, 4, 4},
                                {2, 4, 0, 4, 0}, {2, 5, 0, 4, 4}, {3, 6, 0, 4, 0}, {3, 7, 0, 4, 4}};
template <>
constexpr Piece kPieces<5>[] = {{0, 0, 0, 5, 0}, {1, 1, 0, 5, 0}, {2, 2, 0, 5, 0}, {3, 3, 0, 5, 0},
                                {4, 4, 0, 5, 0}, {0, 5, 0, 3, 5}, {1, 5, 3, 2, 5}, {2, 6, 0, 3, 5},
                                {3, 6, 3, 2, 5}, {4, 7, 0, 3, 5}, {1, 7, 3, 1, 7}, {3, 7, 4, 1, 7}};
template <>
constexpr Piece kPieces<6>[] = {{0, 0, 0, 6, 0}, {1, 1, 0, 6, 0}, {2, 2, 0, 6, 0}, {0, 3, 0, 2, 6},
                                {1, 3, 2, 2, 6}, {2, 3, 4, 2, 6}, {3, 4, 0, 6, 0}, {4, 5, 0, 6, 0},
                                {5, 6, 0, 6, 0}, {3, 7, 0, 2, 6}, {4, 7, 2, 2, 6}, {5, 7, 4, 2, 6}};
template <>
constexpr Piece kPieces<8>[] = {{0, 0, 0, 8, 0}, {1, 1, 0, 8, 0}, {2, 2, 0, 8, 0}, {3, 3, 0, 8, 0},
                                {4, 4, 0, 8, 0}, {5, 5, 0, 8, 0}, {6, 6, 0, 8, 0}, {7, 7, 0, 8, 0}};

constexpr int64_t kColumns = 16;             // of half a tile
constexpr int64_t kHalfLine = kColumns * 4;  // bytes

// Rows of words, for the 16 columns of half a tile.
struct Words {
  const int32_t* words;
  int64_t stride;
  int64_t live;  // columns

  Words(const TileWords& all, int64_t half)  // of those that `all` begins with
      : words(all.words + half * kColumns), stride(all.stride), live(all.columns - half * kColumns) {}

  EXL_INLINE Columns row(int64_t row) const {
    Columns out = {};
    const int32_t* from = words + row * stride;
    if (live >= kColumns) {
      std::memcpy(&out, from, sizeof(out));
    } else if (live > 0) {
      std::memcpy(&out, from, size_t(live) * 4);
    }
    return out;
  }
};

// The code at bit `begin` of a stream of which `rows` are 32 bits each.
template <int bits, int begin>
EXL_INLINE Columns code_at(const Columns* rows) {
  constexpr int row = begin / 32, shift = begin % 32;
  Columns code = rows[row] >> shift;
  if constexpr (shift + bits > 32) code |= rows[row + 1] << (32 - shift);
  return code & ((1u << bits) - 1);
}

// Codes of 32 positions, four to a number: quads[q][n], position 4q + j in byte j. In stored order they are `bits`
// whole rows of words.
template <int bits, int... q>
EXL_INLINE void quads_in_order(const Columns* rows, Columns* quads, std::integer_sequence<int, q...>) {
  ((quads[q] = code_at<bits, 4 * q * bits>(rows) | code_at<bits, (4 * q + 1) * bits>(rows) << 8 |
               code_at<bits, (4 * q + 2) * bits>(rows) << 16 | code_at<bits, (4 * q + 3) * bits>(rows) << 24),
   ...);
}

template <int bits>
EXL_INLINE void quads_by_order(const Words& words, const int32_t* order, Columns* quads) {
  constexpr uint32_t mask = (1u << bits) - 1;
  for (int q = 0; q < 8; ++q) {
    Columns quad = {};
    for (int j = 0; j < 4; ++j) {
      const int64_t stored = order[4 * q + j];
      if (stored < 0) continue;
      const int64_t row = stored * bits / 32;
      const int shift = int(stored * bits % 32);
      Columns code = words.row(row) >> shift;
      if (shift + bits > 32) code |= words.row(row + 1) << (32 - shift);
      quad |= (code & mask) << 8 * j;
    }
    quads[q] = quad;
  }
}

template <int bits, int i>
EXL_INLINE void put_piece(const Columns* quads, Columns* lines) {
  constexpr Piece p = kPieces<bits>[i];
  constexpr uint32_t mask = ((1u << p.count) - 1) * 0x01010101u;
  lines[p.line] |= (quads[p.quad] >> p.from & mask) << p.at;
}

template <int bits, int... i>
EXL_INLINE void put_unit(const Columns* quads, uint8_t* to, std::integer_sequence<int, i...>) {
  Columns lines[bits] = {};
  (put_piece<bits, i>(quads, lines), ...);
  for (int l = 0; l < bits; ++l) std::memcpy(to + l * kLine, &lines[l], sizeof(lines[l]));
}

// One unit of `tiles` tiles, at `to` for the first and `tile_bytes` further for every next one.
template <int bits>
void pack_unit(const TileSource& s, const TileWords& all, int64_t position, int64_t word_row, int64_t tiles,
               uint8_t* to, int64_t tile_bytes) {
  constexpr int pieces = int(sizeof(kPieces<bits>) / sizeof(Piece));
  for (int64_t half = 0; half < 2 * tiles; ++half) {
    const Words words(all, half);
    Columns quads[8];
    if (s.order != nullptr) {
      quads_by_order<bits>(words, s.order + position, quads);
    } else {
      Columns rows[bits];
      for (int r = 0; r < bits; ++r) rows[r] = words.row(word_row + r);
      quads_in_order<bits>(rows, quads, std::make_integer_sequence<int, 8>());
    }
    put_unit<bits>(quads, to + half / 2 * tile_bytes + half % 2 * kHalfLine,
                   std::make_integer_sequence<int, pieces>());
  }
}

using PackUnit = void (*)(const TileSource&, const TileWords&, int64_t, int64_t, int64_t, uint8_t*, int64_t);

PackUnit unit_packer(int bits) {
  switch (bits) {
    case 2: return pack_unit<2>;
    case 3: return pack_unit<3>;
    case 4: return pack_unit<4>;
    case 5: return pack_unit<5>;
    case 6: return pack_unit<6>;
    default: return pack_unit<8>;
  }
}

// The even nibbles of 16 together, lowest first.
EXL_INLINE uint64_t even_nibbles(uint64_t x) {
  x &= 0x0f0f0f0f0f0f0f0full;
  x = (x | x >> 4) & 0x00ff00ff00ff00ffull;
  x = (x | x >> 8) & 0x0000ffff0000ffffull;
  return (x | x >> 16) & 0xffffffffull;
}

// The nibbles of a group for `live` of 16 columns, zero for those that do not exist.
EXL_INLINE uint64_t nibbles_of(const TileSource& s, int64_t group, int64_t first, int64_t live) {
  const uint32_t* from = s.scale_words + group * s.scale_stride;
  uint64_t nibbles = 0;
  if (s.columns != nullptr) {
    for (int64_t n = 0; n < live; ++n) {
      const int64_t column = s.columns[first + n];
      nibbles |= uint64_t(from[column / 8] >> column % 8 * 4 & 15) << 4 * n;
    }
    return nibbles;
  }
  if (live <= 0) return 0;
  nibbles = from[first / 8] | uint64_t(live > 8 ? from[first / 8 + 1] : 0) << 32;
  return live < kColumns ? nibbles & ((1ull << 4 * live) - 1) : nibbles;
}

// The scales of groups [begin, end), which lie together.
void put_scales(const TileSource& s, int64_t tile, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t first = tile * kTileColumns, left = s.outputs - first;
  const int64_t live = left < kTileColumns ? left : kTileColumns;
  std::memset(to, 0, size_t(scale_bytes(s.kind)));
  for (int64_t g = begin; g < end; ++g) {
    const int64_t i = g - begin;
    if (s.kind == ScaleKind::exl2) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t begins = half * kColumns, more = live - begins;
        const uint64_t nibbles = nibbles_of(s, g, first + begins, more < kColumns ? more : kColumns);
        const uint64_t sorted = even_nibbles(nibbles) | even_nibbles(nibbles >> 4) << 32;
        std::memcpy(to + i * 16 + half * 8, &sorted, 8);
      }
      continue;
    }
    uint8_t* const halves = to + i * 64;
    uint8_t* const bytes = to + 256 + i * 32;
    if (s.columns == nullptr) {
      std::memcpy(halves, s.scales + g * s.outputs + first, size_t(live) * 2);
      if (s.kind == ScaleKind::zeros) std::memcpy(bytes, s.zeros + g * s.outputs + first, size_t(live));
      continue;
    }
    for (int64_t n = 0; n < live; ++n) {
      const int64_t from = g * s.outputs + s.columns[first + n];
      std::memcpy(halves + 2 * n, s.scales + from, 2);
      if (s.kind == ScaleKind::zeros) bytes[n] = s.zeros[from];
    }
  }
}

void pack_range(const TileSource& s, const TileWords& words, uint8_t* to, int64_t begin, int64_t end) {
  const Packed packed{reinterpret_cast<const PackedHeader*>(to)};
  const Span* spans = packed.spans();
  const int64_t together = scale_groups(s.kind);
  int64_t position = 0, word_row = 0;
  for (int64_t i = 0; i < packed.header->panels; ++i) {
    const Panel& panel = packed.panel(i);
    uint8_t* place = to + panel.at;
    for (const Span* span = spans + panel.span; span < spans + panel.span + panel.spans; ++span) {
      if (span->scales != 0) {
        const int64_t g = span->group / together * together;
        const int64_t stop = g + together < s.groups ? g + together : s.groups;
        for (int64_t t = begin; t < end; ++t) put_scales(s, t, g, stop, place + t * panel.tile_bytes);
        place += span->scales;
      }
      const PackUnit pack = unit_packer(span->bits);
      for (int32_t u = 0; u < span->units; ++u) {
        pack(s, words, position, word_row, end - begin, place + begin * panel.tile_bytes, panel.tile_bytes);
        position += kUnit;
        word_row += span->bits;
        place += span->bits * kLine;
      }
    }
  }
}

}  // namespace
}  // namespace exl
