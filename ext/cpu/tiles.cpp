// See tiles.h: the layout. The codes themselves are moved by tiles_kernel.h.
#include "tiles.h"

#include <cstring>
#include <vector>

#include "isa.h"
#include "threads.h"
#include "tiles_isa.h"

namespace exl {
namespace {

// So a visit to a row of words fetches 1 KiB, and where rows are visited out of order their parts stay cached.
constexpr int64_t kTilesAtOnce = 16;
constexpr int64_t kGathered = 2 << 20;  // bytes of words in another order that a thread holds, about

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

// Columns [first, first + count) of the result, side by side: a code is looked at several times, a word moved once.
void gather(const TileSource& s, int64_t first, int64_t count, int32_t* to) {
  for (int64_t row = 0; row < s.word_rows; ++row) {
    const int32_t* from = s.words + row * s.stride;
    for (int64_t n = 0; n < count; ++n) *to++ = from[s.columns[first + n]];
  }
}

PackTiles packer() {
#if EXL_X86_ISA
  if (isa() == Isa::avx512) return pack_tiles_avx512;
  if (isa() == Isa::avx2) return pack_tiles_avx2;
#endif
  return pack_tiles_portable;
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
  const PackTiles pack = packer();
  if (s.columns == nullptr) {
    parallel_chunks(tiles, kTilesAtOnce, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTileColumns;
      pack(s, {s.words + first, s.stride, s.stride - first}, to, begin, end);
    });
    return;
  }
  // A visit fetches nearly every line of a row, whatever it takes of it: few visits, of equal size for all threads.
  const int64_t most = kGathered / (s.word_rows * kTileColumns * 4 + 1);
  const int64_t fair = (tiles + threads() - 1) / threads();
  const int64_t wanted = most < fair ? most : fair;
  const int64_t at_once = wanted > kTilesAtOnce ? wanted : kTilesAtOnce;
  const int64_t visits = (tiles + at_once - 1) / at_once;
  const int64_t workers = visits < threads() ? visits : threads();
  const int64_t room = s.word_rows * at_once * kTileColumns;
  std::vector<int32_t> rooms(size_t(workers * room));  // here, as nothing may be allocated in a region
  parallel_for(workers, [&](int64_t from, int64_t until) {
    for (int64_t worker = from; worker < until; ++worker) {
      int32_t* const words = rooms.data() + worker * room;
      for (int64_t begin = worker * at_once; begin < tiles; begin += workers * at_once) {
        const int64_t end = begin + at_once < tiles ? begin + at_once : tiles;
        const int64_t first = begin * kTileColumns, last = end * kTileColumns;
        const int64_t count = (s.outputs < last ? s.outputs : last) - first;
        gather(s, first, count, words);
        for (int64_t t = begin; t < end; t += kTilesAtOnce) {
          const int64_t before = (t - begin) * kTileColumns;
          const int64_t stop = t + kTilesAtOnce < end ? t + kTilesAtOnce : end;
          pack(s, {words + before, count, count - before}, to, t, stop);
        }
      }
    }
  });
}

}  // namespace exl
