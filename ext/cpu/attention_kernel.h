// The attention kernels, written once over an instruction set I (Part, tile_rows, score_rows, and what
// attention_codes.h needs). Included by attention_portable.cpp, attention_avx2.cpp and attention_avx512.cpp only;
// internal linkage, see isa.h.
#pragma once

#include <cstring>

#include "attention_codes.h"
#include "attention_isa.h"
#include "lanes.h"
#include "lanes_math.h"

namespace exl {
namespace {

constexpr float kHidden = -__builtin_inff();

template <class P>
EXL_INLINE float sum_of(const Lanes<P>& a) {
  const Lanes<P> four[4] = {a, Lanes<P>::zero(), Lanes<P>::zero(), Lanes<P>::zero()};
  float sums[4];
  sums4(four, sums);
  return sums[0];
}

// How many products of a register take as long as a line from memory.
constexpr int64_t kLineProducts = 6;

// Asks for what memory can deliver while `rows` rows meet `keys` keys or values. A few lines at a time: more of them
// would wait for a free place, and the arithmetic behind them.
EXL_INLINE void fetch_meanwhile(const AttentionChunk& a, int64_t rows, int64_t keys, FetchQueue* queue) {
  if (queue != nullptr) fetch_some(*queue, rows * keys * (a.padded_dim / 16) / kLineProducts);
}

// Raw products q.k of `tiles` times R rows from row `row` on with keys [first, last). dim: head_dim, or 0 for any.
template <class I, class T, int R, int dim>
void score_rows(const AttentionChunk& a, int64_t row, int64_t tiles, int64_t first, int64_t last, FetchQueue* queue) {
  const T* const* keys = reinterpret_cast<const T* const*>(a.keys);
  const int64_t head_dim = dim != 0 ? dim : a.head_dim, padded_dim = dim != 0 ? dim : a.padded_dim;
  const float* const q = a.q + row * padded_dim;
  float* const scores = a.scores + row * kChunk;
  for (int64_t j = first / 4 * 4; j < last; j += 4) {
    fetch_meanwhile(a, tiles * R, 4, queue);
    const T* columns[4];
    if (first <= j && j + 4 <= last) {
      EXL_UNROLL for (int64_t c = 0; c < 4; ++c) columns[c] = keys[j + c] + a.skip;
    } else {
      for (int64_t c = 0; c < 4; ++c) {  // outside [first, last) a neighbour stands in; its product is never read
        const int64_t key = j + c < first ? first : j + c < last ? j + c : last - 1;
        columns[c] = keys[key] + a.skip;
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      dot_tile<typename I::Part, R>(q + t * R * padded_dim, padded_dim, columns, head_dim, scores + t * R * kChunk + j,
                                    kChunk, false);
    }
  }
}

// All rows.
template <class I, class T>
EXL_INLINE void score_all(const AttentionChunk& a, int64_t first, int64_t last, FetchQueue* queue) {
  constexpr int most = I::score_rows;
  const int64_t tiles = a.rows / most;
  if (tiles > 0 && a.head_dim == 64) {
    score_rows<I, T, most, 64>(a, 0, tiles, first, last, queue);
  } else if (tiles > 0 && a.head_dim == 128) {
    score_rows<I, T, most, 128>(a, 0, tiles, first, last, queue);
  } else if (tiles > 0) {
    score_rows<I, T, most, 0>(a, 0, tiles, first, last, queue);
  }
  int64_t row = tiles * most;
  if (most > 4 && row + 4 <= a.rows) score_rows<I, T, 4, 0>(a, row, 1, first, last, queue), row += 4;
  for (; row + 2 <= a.rows; row += 2) score_rows<I, T, 2, 0>(a, row, 1, first, last, queue);
  if (row < a.rows) score_rows<I, T, 1, 0>(a, row, 1, first, last, queue);
}

// Scores of one row to softmax weights, zero for hidden keys in [first, last).
template <class I>
void weigh_row(const AttentionChunk& a, int64_t row, const AttentionState& to) {
  using L = Lanes<typename I::Part>;
  float* s = a.scores + row * kChunk;
  const int64_t begin = a.begin[row], end = a.end[row];
  if (begin >= end) {
    to.maximum[row] = kHidden;
    to.sum[row] = 0.0f;
    for (int64_t j = a.first; j < a.last; ++j) s[j] = 0.0f;
    return;
  }
  const int64_t low = begin / 16 * 16, high = (end + 15) / 16 * 16;
  const L scale = L::all(a.scale), cap = L::all(a.softcap);
  for (int64_t j = low; j < high; j += 16) {
    L score = L::load(s + j) * scale;
    if (a.softcap > 0.0f) score = cap * tanh_lanes(score / cap);
    score.store(s + j);
  }
  for (int64_t j = low; j < begin; ++j) s[j] = kHidden;
  for (int64_t j = end; j < high; ++j) s[j] = kHidden;
  L most = L::all(kHidden);
  for (int64_t j = low; j < high; j += 16) most = maximum(most, L::load(s + j));
  float lane[16];
  most.store(lane);
  float top = lane[0];
  for (int l = 1; l < 16; ++l) top = lane[l] > top ? lane[l] : top;
  L sum = L::zero();
  for (int64_t j = low; j < high; j += 16) {
    const L weight = exp_lanes(L::load(s + j) - L::all(top));
    weight.store(s + j);
    sum = sum + weight;
  }
  for (int64_t j = a.first; j < low; ++j) s[j] = 0.0f;
  for (int64_t j = high; j < a.last; ++j) s[j] = 0.0f;
  to.maximum[row] = top;
  to.sum[row] = sum_of(sum);
}

// Weighted values [first, last) of R rows, `C` registers of the head dimension from element `d` on, added to `mixed`.
template <class I, class T, int R, int C>
EXL_INLINE void mix_tile(const AttentionChunk& a, int64_t row, int64_t d, int64_t first, int64_t last, float* mixed,
                         FetchQueue* queue) {
  using P = typename I::Part;
  P sum[R][C];
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    const float* from = mixed + (row + r) * a.padded_dim + d;
    EXL_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = P::load(from + c * P::width);
  }
  const T* const* values = reinterpret_cast<const T* const*>(a.values);
  const float* weights = a.scores + row * kChunk;
  const int64_t left = a.head_dim - d;
  for (int64_t j = first; j < last; ++j) {
    if (C == 4 && j % 4 == 0) fetch_meanwhile(a, R * 4 * C * P::width / a.padded_dim, 1, queue);
    const T* value = values[j] + a.skip + d;
    P v[C];
    if (left >= C * P::width) {
      EXL_UNROLL for (int c = 0; c < C; ++c) v[c] = P::load(value + c * P::width);
    } else {
      EXL_UNROLL for (int c = 0; c < C; ++c) v[c] = part_of<P>(value + c * P::width, left - c * P::width);
    }
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      const P w = P::all(weights[r * kChunk + j]);
      EXL_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = fma(w, v[c], sum[r][c]);
    }
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    EXL_UNROLL for (int c = 0; c < C; ++c) sum[r][c].store(mixed + (row + r) * a.padded_dim + d + c * P::width);
  }
}

template <class I, class T, int R>
void mix_rows(const AttentionChunk& a, int64_t row, int64_t first, int64_t last, float* mixed, FetchQueue* queue) {
  constexpr int64_t width = I::Part::width;
  int64_t d = 0;
  for (; d + 4 * width <= a.padded_dim; d += 4 * width) mix_tile<I, T, R, 4>(a, row, d, first, last, mixed, queue);
  for (; d < a.padded_dim; d += width) mix_tile<I, T, R, 1>(a, row, d, first, last, mixed, queue);
}

EXL_INLINE void clear(const AttentionChunk& a, const AttentionState& to) {
  std::memset(to.mixed, 0, size_t(a.rows * a.padded_dim) * sizeof(float));
}

// Keys, and then values, a block at a time, all heads of a block together: the heads of a token lie side by side, so
// memory is read from front to back, and what a block brings into the caches is used at once.
constexpr int64_t kBlockBytes = 32 << 10;
constexpr int64_t kMostBlock = 64;  // keys

// Reads keys and values where they are.
template <class I, class T>
void attend_direct(const AttentionChunk* chunks, int64_t heads, const AttentionState* to, FetchQueue* queue) {
  const AttentionChunk& a = chunks[0];
  const int64_t fitting = kBlockBytes / (heads * a.head_dim * int64_t(sizeof(T))) / 4 * 4;
  const int64_t step = fitting < 4 ? 4 : fitting < kMostBlock ? fitting : kMostBlock;
  const auto each_block = [&](const auto& body) {
    for (int64_t j = a.first / step * step; j < a.last; j += step) {
      const int64_t first = j < a.first ? a.first : j, last = j + step < a.last ? j + step : a.last;
      for (int64_t h = 0; h < heads; ++h) body(h, first, last);
    }
  };
  each_block([&](int64_t h, int64_t first, int64_t last) { score_all<I, T>(chunks[h], first, last, queue); });
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(chunks[h], row, to[h]);
    clear(a, to[h]);
  }
  each_block([&](int64_t h, int64_t first, int64_t last) {
    each_tile<I::tile_rows>(a.rows, [&](int64_t row, auto r) {
      mix_rows<I, T, decltype(r)::value>(chunks[h], row, first, last, to[h].mixed, queue);
    });
  });
}

// `count` heads to rows of a panel, zeros or anything finite behind head_dim; `ahead` pointers may be looked at.
template <class I, class T>
void widen_elements(const void* const* heads, int64_t skip, int64_t count, int64_t ahead, int64_t head_dim,
                    int64_t padded_dim, float* panel) {
  for (int64_t j = 0; j < count; ++j, panel += padded_dim) {
    const T* head = static_cast<const T*>(heads[j]) + skip;
    fetch_ahead(j + kAhead < ahead ? static_cast<const T*>(heads[j + kAhead]) + skip : nullptr, head_dim);
    for (int64_t d = 0; d < head_dim; d += 16) {
      Lanes<typename I::Part>::load_part(head + d, head_dim - d).store(panel + d);
    }
  }
}

template <class I>
void widen(const AttentionChunk& a, const void* const* heads, int bits, int64_t first, int64_t last) {
  const int64_t count = last - first, ahead = a.last - first;
  if (bits != 0) return code_kernels<I>(bits).widen(heads + first, count, ahead, a.head_dim, a.padded_dim, a.panel);
  const auto elements = a.dtype == Dtype::float16    ? &widen_elements<I, Half>
                        : a.dtype == Dtype::bfloat16 ? &widen_elements<I, BFloat16>
                                                     : &widen_elements<I, float>;
  elements(heads + first, a.skip, count, ahead, a.head_dim, a.padded_dim, a.panel);
}

// Widens some keys to a float32 panel and works on that, then the next ones. Nothing is rounded and the order of
// operations is that of attend_direct, so the results are the same. It pays as soon as several register tiles read the
// chunk.
template <class I>
void attend_panels(const AttentionChunk& a, const AttentionState& to) {
  const int64_t step = panel_keys(a.padded_dim);
  const void* heads[kChunk];
  const auto each_panel = [&](const void* const* from, int bits, const auto& body) {
    for (int64_t j = a.first / step * step; j < a.last; j += step) {
      AttentionChunk part = a;
      part.head_dim = a.padded_dim, part.skip = 0;
      const int64_t first = j < a.first ? a.first : j, last = j + step < a.last ? j + step : a.last;
      widen<I>(a, from, bits, first, last);
      for (int64_t i = first; i < last; ++i) heads[i] = a.panel + (i - first) * a.padded_dim;
      part.keys = part.values = heads;
      body(part, first, last);
    }
  };
  each_panel(a.keys, a.key_bits, [&](const AttentionChunk& part, int64_t first, int64_t last) {
    score_all<I, float>(part, first, last, nullptr);
  });
  for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(a, row, to);
  clear(a, to);
  each_panel(a.values, a.value_bits, [&](const AttentionChunk& part, int64_t first, int64_t last) {
    each_tile<I::tile_rows>(a.rows, [&](int64_t row, auto r) {
      mix_rows<I, float, decltype(r)::value>(part, row, first, last, to.mixed, nullptr);
    });
  });
}

template <class I>
void attend(const AttentionChunk* chunks, int64_t heads, const AttentionState* to, FetchQueue* queue) {
  const AttentionChunk& a = chunks[0];
  if (a.key_bits == 0 && a.rows <= 2 * I::tile_rows) {
    switch (a.dtype) {
      case Dtype::float32: return attend_direct<I, float>(chunks, heads, to, queue);
      case Dtype::float16: return attend_direct<I, Half>(chunks, heads, to, queue);
      case Dtype::bfloat16: return attend_direct<I, BFloat16>(chunks, heads, to, queue);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    if (a.key_bits == 0 || a.rows > I::code_rows) {  // decoding once is worth a copy
      attend_panels<I>(chunks[h], to[h]);
      continue;
    }
    code_kernels<I>(a.key_bits).score(chunks[h]);
    for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(chunks[h], row, to[h]);
    code_kernels<I>(a.value_bits).mix(chunks[h], to[h].mixed);
  }
}

template <class I>
void merge(const AttentionState& total, const AttentionState& next, int64_t rows, int64_t padded_dim) {
  using L = Lanes<typename I::Part>;
  for (int64_t r = 0; r < rows; ++r) {
    if (next.maximum[r] == kHidden) continue;
    const float before = total.maximum[r], top = next.maximum[r] > before ? next.maximum[r] : before;
    const L keep = exp_lanes(L::all(before - top)), add = exp_lanes(L::all(next.maximum[r] - top));
    float kept[16], added[16];
    keep.store(kept);
    add.store(added);
    total.maximum[r] = top;
    total.sum[r] = total.sum[r] * kept[0] + next.sum[r] * added[0];
    float* to = total.mixed + r * padded_dim;
    const float* from = next.mixed + r * padded_dim;
    for (int64_t d = 0; d < padded_dim; d += 16) fma(L::load(to + d), keep, L::load(from + d) * add).store(to + d);
  }
}

template <class I>
constexpr AttentionIsa attention_isa() {
  return {&attend<I>, &merge<I>};
}

}  // namespace
}  // namespace exl
