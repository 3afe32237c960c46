// See tiles.h. Codes are taken out of the words for 16 columns at once: the inner loops run over neighbours in memory.
#include "tiles.h"

#include <cstring>

#include "threads.h"

namespace exl {
namespace {

constexpr int64_t kTilesAtOnce = 4;  // as much of a row of words as is worth a visit

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

uint64_t mix(uint64_t hash, uint64_t value) {  // FNV-1a over 64-bit words, with the high half folded back
  hash = (hash ^ value) * 0x100000001b3ull;
  return hash ^ (hash >> 32);
}

uint64_t signature_of(const TileSource& s) {
  uint64_t hash = mix(mix(0xcbf29ce484222325ull, uint64_t(s.inputs)), uint64_t(s.positions));
  for (int64_t i = 0; i < s.span_count; ++i) hash = mix(hash, uint64_t(s.spans[i].units));
  for (int64_t i = 0; s.rows != nullptr && i < s.positions; ++i) hash = mix(hash, uint64_t(s.rows[i]) + 1);
  return hash;
}

using Columns = uint32_t[kTileColumns];

// Codes of 32 positions, four to a number: quads[q][n], position 4q + j in byte j. bit[i]: where the code of position i
// begins in the stream of a column, -1: no code.
void gather_quads(const TileSource& s, int64_t first, int bits, const int64_t* bit, Columns* quads) {
  const int64_t left = s.stride - first;
  const uint32_t mask = (1u << bits) - 1;
  for (int q = 0; q < 8; ++q) {
    Columns out = {};
    for (int j = 0; j < 4; ++j) {
      const int64_t begin = bit[4 * q + j];
      if (begin < 0) continue;
      const int64_t row = begin / 32;
      const int shift = int(begin % 32);
      const int32_t* low = s.words + row * s.stride + first;
      const int32_t* high = shift + bits > 32 ? low + s.stride : low;
      const int up = shift + bits > 32 ? 32 - shift : 0;
      Columns edge[2] = {};
      if (left < kTileColumns) {
        std::memcpy(edge[0], low, size_t(left) * 4);
        std::memcpy(edge[1], high, size_t(left) * 4);
        low = reinterpret_cast<const int32_t*>(edge[0]);
        high = reinterpret_cast<const int32_t*>(edge[1]);
      }
      if (up != 0) {
        for (int n = 0; n < kTileColumns; ++n) {
          out[n] |= ((uint32_t(low[n]) >> shift | uint32_t(high[n]) << up) & mask) << 8 * j;
        }
      } else {
        for (int n = 0; n < kTileColumns; ++n) out[n] |= (uint32_t(low[n]) >> shift & mask) << 8 * j;
      }
    }
    std::memcpy(quads[q], out, sizeof(out));
  }
}

// `count` bits of every code of a quad, from bit `from` on, at bit `at` of a line.
struct Piece {
  int line, quad, from, count, at;
};

// See tiles.h. Ends with count 0.
constexpr Piece kPieces2[] = {{0, 0, 0, 2, 0}, {0, 1, 0, 2, 2}, {0, 2, 0, 2, 4}, {0, 3, 0, 2, 6}, {1, 4, 0, 2, 0},
                              {1, 5, 0, 2, 2}, {1, 6, 0, 2, 4}, {1, 7, 0, 2, 6}, {}};
constexpr Piece kPieces3[] = {{0, 0, 0, 3, 0}, {0, 1, 0, 3, 3}, {1, 2, 0, 3, 0}, {1, 3, 0, 3, 3}, {2, 4, 0, 3, 0},
                              {2, 5, 0, 3, 3}, {0, 6, 0, 2, 6}, {2, 6, 2, 1, 6}, {1, 7, 0, 2, 6}, {2, 7, 2, 1, 7}, {}};
constexpr Piece kPieces4[] = {{0, 0, 0, 4, 0}, {0, 1, 0, 4, 4}, {1, 2, 0, 4, 0}, {1, 3, 0, 4, 4}, {2, 4, 0, 4, 0},
                              {2, 5, 0, 4, 4}, {3, 6, 0, 4, 0}, {3, 7, 0, 4, 4}, {}};
constexpr Piece kPieces5[] = {{0, 0, 0, 5, 0}, {1, 1, 0, 5, 0}, {2, 2, 0, 5, 0}, {3, 3, 0, 5, 0}, {4, 4, 0, 5, 0},
                              {0, 5, 0, 3, 5}, {1, 5, 3, 2, 5}, {2, 6, 0, 3, 5}, {3, 6, 3, 2, 5}, {4, 7, 0, 3, 5},
                              {1, 7, 3, 1, 7}, {3, 7, 4, 1, 7}, {}};
constexpr Piece kPieces6[] = {{0, 0, 0, 6, 0}, {1, 1, 0, 6, 0}, {2, 2, 0, 6, 0}, {0, 3, 0, 2, 6}, {1, 3, 2, 2, 6},
                              {2, 3, 4, 2, 6}, {3, 4, 0, 6, 0}, {4, 5, 0, 6, 0}, {5, 6, 0, 6, 0}, {3, 7, 0, 2, 6},
                              {4, 7, 2, 2, 6}, {5, 7, 4, 2, 6}, {}};
constexpr Piece kPieces8[] = {{0, 0, 0, 8, 0}, {1, 1, 0, 8, 0}, {2, 2, 0, 8, 0}, {3, 3, 0, 8, 0}, {4, 4, 0, 8, 0},
                              {5, 5, 0, 8, 0}, {6, 6, 0, 8, 0}, {7, 7, 0, 8, 0}, {}};

const Piece* pieces_of(int bits) {
  switch (bits) {
    case 2: return kPieces2;
    case 3: return kPieces3;
    case 4: return kPieces4;
    case 5: return kPieces5;
    case 6: return kPieces6;
    default: return kPieces8;
  }
}

void put_unit(const Columns* quads, int bits, uint8_t* to) {
  Columns lines[8] = {};
  for (const Piece* p = pieces_of(bits); p->count != 0; ++p) {
    const uint32_t mask = ((1u << p->count) - 1) * 0x01010101u;
    const uint32_t* quad = quads[p->quad];
    for (int n = 0; n < kTileColumns; ++n) lines[p->line][n] |= (quad[n] >> p->from & mask) << p->at;
  }
  std::memcpy(to, lines, size_t(bits * kLine));
}

// The scales of groups [begin, end), which lie together.
void put_scales(const TileSource& s, int64_t tile, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t first = tile * kTileColumns, left = s.outputs - first;
  const size_t live = size_t(left < kTileColumns ? left : kTileColumns);
  std::memset(to, 0, size_t(scale_bytes(s.kind)));
  for (int64_t g = begin; g < end; ++g) {
    const int64_t i = g - begin;
    if (s.kind == ScaleKind::exl2) {
      const uint32_t* from = s.scale_words + g * s.scale_stride;
      for (int64_t n = first; n < first + int64_t(live); ++n) {
        const int64_t at = n % 2 * 8 + (n - first) / 2;
        to[i * 8 + at / 2] |= uint8_t((from[n / 8] >> n % 8 * 4 & 15) << at % 2 * 4);
      }
      continue;
    }
    std::memcpy(to + i * 32, s.scales + g * s.outputs + first, live * 2);
    if (s.kind == ScaleKind::zeros) std::memcpy(to + 128 + i * 16, s.zeros + g * s.outputs + first, live);
  }
}

// Whether span i is the first of a panel, given the units of the panel before it.
bool opens_panel(const TileSource& s, int64_t i, int64_t units) {
  return i == 0 || units + s.spans[i].units > kPanelUnits;
}

// Calls f(span, whether it opens a panel, the bytes of scales before it) for all spans.
template <class F>
void each_span(const TileSource& s, const F& f) {
  int64_t units = 0;
  for (int64_t i = 0; i < s.span_count; ++i) {
    const bool opens = opens_panel(s, i, units);
    const bool fresh = i == 0 || s.spans[i].group != s.spans[i - 1].group;
    const bool scales = opens || (fresh && s.spans[i].group % scale_groups(s.kind) == 0);
    units = (opens ? 0 : units) + s.spans[i].units;
    f(i, opens, scales ? scale_bytes(s.kind) : 0);
  }
}

}  // namespace

PackedHeader packed_header(const TileSource& s) {
  PackedHeader h{};
  h.magic = kPackedMagic;
  h.signature = signature_of(s);
  h.inputs = s.inputs;
  h.outputs = s.outputs;
  h.positions = s.positions;
  h.groups = s.groups;
  h.spans = s.span_count;
  h.kind = s.kind;
  h.zero_base = s.zero_base;
  h.spans_at = lines(sizeof(PackedHeader));
  int64_t tile_bytes = 0;  // of all panels
  each_span(s, [&](int64_t i, bool opens, int32_t scales) {
    h.panels += opens;
    tile_bytes += scales + int64_t(s.spans[i].units) * s.spans[i].bits * kLine;
  });
  h.panels_at = h.spans_at + lines(s.span_count * int64_t(sizeof(Span)));
  const int64_t behind = h.panels_at + lines(h.panels * int64_t(sizeof(Panel)));
  h.rows_at = s.rows != nullptr ? behind : 0;
  h.tables_at = behind + (s.rows != nullptr ? lines(s.positions * 4) : 0);
  h.tiles_at = h.tables_at + (s.kind == ScaleKind::exl2 ? s.groups * 64 : 0);
  h.bytes = h.tiles_at + (s.outputs + kTileColumns - 1) / kTileColumns * tile_bytes;
  return h;
}

void pack_tiles(const TileSource& s, uint8_t* to) {
  const PackedHeader h = packed_header(s);
  std::memset(to, 0, size_t(h.tiles_at));
  std::memcpy(to, &h, sizeof(h));
  const int64_t tiles = (s.outputs + kTileColumns - 1) / kTileColumns;
  Span* spans = reinterpret_cast<Span*>(to + h.spans_at);
  Panel* panel = reinterpret_cast<Panel*>(to + h.panels_at) - 1;
  int64_t unit = 0;
  each_span(s, [&](int64_t i, bool opens, int32_t scales) {
    if (opens) {
      const int64_t at = i == 0 ? h.tiles_at : panel->at + tiles * panel->tile_bytes;
      *++panel = {i, 0, unit, at, 0};
    }
    spans[i] = s.spans[i];
    spans[i].scales = scales;
    ++panel->spans;
    panel->tile_bytes += scales + int64_t(s.spans[i].units) * s.spans[i].bits * kLine;
    unit += s.spans[i].units;
  });
  if (s.rows != nullptr) std::memcpy(to + h.rows_at, s.rows, size_t(s.positions) * 4);
  if (s.kind == ScaleKind::exl2) std::memcpy(to + h.tables_at, s.tables, size_t(s.groups) * 64);
  const auto body = [&](int64_t begin, int64_t end) {
    int64_t position = 0, stream = 0;
    for (const Panel* p = reinterpret_cast<const Panel*>(to + h.panels_at); p <= panel; ++p) {
      int64_t place = p->at;
      for (int64_t i = p->span; i < p->span + p->spans; ++i) {
        const int bits = spans[i].bits;
        if (spans[i].scales != 0) {
          const int64_t together = scale_groups(s.kind), g = spans[i].group / together * together;
          const int64_t stop = g + together < s.groups ? g + together : s.groups;
          for (int64_t t = begin; t < end; ++t) put_scales(s, t, g, stop, to + t * p->tile_bytes + place);
          place += spans[i].scales;
        }
        for (int32_t u = 0; u < spans[i].units; ++u, position += kUnit, place += bits * kLine) {
          int64_t bit[kUnit];
          for (int k = 0; k < kUnit; ++k, stream += bits) {
            const int64_t row = s.order != nullptr ? s.order[position + k] : 0;
            bit[k] = s.order == nullptr ? stream : row < 0 ? -1 : row * bits;
          }
          for (int64_t t = begin; t < end; ++t) {
            Columns quads[8];
            gather_quads(s, t * kTileColumns, bits, bit, quads);
            put_unit(quads, bits, to + t * p->tile_bytes + place);
          }
        }
      }
    }
  };
  parallel_chunks(tiles, kTilesAtOnce, body);
}

}  // namespace exl
