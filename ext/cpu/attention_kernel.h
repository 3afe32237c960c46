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

// Raw products q.k of R rows from row `row` on with keys [first, last). `far`: keys and values lie in the pages.
template <class I, class T, int R, bool far>
void score_rows(const AttentionChunk& a, int64_t row) {
  const T* const* keys = reinterpret_cast<const T* const*>(a.keys);
  for (int64_t j = a.first / 4 * 4; j < a.last; j += 4) {
    const T* columns[4];
    for (int64_t c = 0; c < 4; ++c) {  // outside [first, last) a neighbour stands in; its product is never read
      const int64_t key = j + c < a.first ? a.first : j + c < a.last ? j + c : a.last - 1;
      columns[c] = keys[key];
    }
    if (far && row == 0) {  // keys of a head lie far apart, where no hardware prefetcher follows; the values come next
      for (int64_t c = 0; c < 4; ++c) {
        fetch_ahead(j + c + kAhead < a.last ? keys[j + c + kAhead] : nullptr, a.head_dim);
        fetch_ahead(j + c >= a.first && j + c < a.last ? static_cast<const T*>(a.values[j + c]) : nullptr, a.head_dim);
      }
    }
    dot_tile<typename I::Part, R>(a.q + row * a.padded_dim, a.padded_dim, columns, a.head_dim,
                                  a.scores + row * kChunk + j, kChunk, false);
  }
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

// Weighted values of R rows, `C` registers of the head dimension from element `d` on; with `add`, to what is there.
template <class I, class T, int R, int C, bool add>
EXL_INLINE void mix_tile(const AttentionChunk& a, int64_t row, int64_t d, float* mixed) {
  using P = typename I::Part;
  P sum[R][C];
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    const float* from = mixed + (row + r) * a.padded_dim + d;
    EXL_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = add ? P::load(from + c * P::width) : P::all(0.0f);
  }
  const T* const* values = reinterpret_cast<const T* const*>(a.values);
  const float* weights = a.scores + row * kChunk;
  const int64_t left = a.head_dim - d;
  for (int64_t j = a.first; j < a.last; ++j) {
    const T* value = values[j] + d;
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

template <class I, class T, int R, bool add>
void mix_rows(const AttentionChunk& a, int64_t row, float* mixed) {
  constexpr int64_t width = I::Part::width;
  int64_t d = 0;
  for (; d + 4 * width <= a.padded_dim; d += 4 * width) mix_tile<I, T, R, 4, add>(a, row, d, mixed);
  for (; d < a.padded_dim; d += width) mix_tile<I, T, R, 1, add>(a, row, d, mixed);
}

// Reads keys and values where they are.
template <class I, class T>
void attend_direct(const AttentionChunk& a, const AttentionState& to) {
  each_tile<I::score_rows>(a.rows, [&](int64_t row, auto r) { score_rows<I, T, decltype(r)::value, true>(a, row); });
  for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(a, row, to);
  each_tile<I::tile_rows>(a.rows, [&](int64_t row, auto r) {
    mix_rows<I, T, decltype(r)::value, false>(a, row, to.mixed);
  });
}

// `count` heads to rows of a panel, zeros or anything finite behind head_dim; `ahead` pointers may be looked at.
using Widen = void (*)(const void* const* heads, int64_t count, int64_t ahead, int64_t head_dim, int64_t padded_dim,
                       float* panel);

template <class I, class T>
void widen_elements(const void* const* heads, int64_t count, int64_t ahead, int64_t head_dim, int64_t padded_dim,
                    float* panel) {
  for (int64_t j = 0; j < count; ++j, panel += padded_dim) {
    const T* head = static_cast<const T*>(heads[j]);
    fetch_ahead(j + kAhead < ahead ? static_cast<const T*>(heads[j + kAhead]) : nullptr, head_dim);
    for (int64_t d = 0; d < head_dim; d += 16) {
      Lanes<typename I::Part>::load_part(head + d, head_dim - d).store(panel + d);
    }
  }
}

template <class I>
Widen widening(Dtype dtype, int bits) {
  if (bits != 0) return code_kernels<I>(bits).widen;
  switch (dtype) {
    case Dtype::float16: return &widen_elements<I, Half>;
    case Dtype::bfloat16: return &widen_elements<I, BFloat16>;
    default: return &widen_elements<I, float>;
  }
}

// Widens some keys to a float32 panel and works on that, then the next ones. Nothing is rounded and the order of
// operations is that of attend_direct, so the results are the same. It pays as soon as several register tiles read the
// chunk.
template <class I>
void attend_panels(const AttentionChunk& a, const AttentionState& to) {
  const int64_t step = panel_keys(a.padded_dim);
  const void* heads[kChunk];
  const auto each_panel = [&](const void* const* from, Widen widen, const auto& body) {
    for (int64_t j = a.first / step * step; j < a.last; j += step) {
      AttentionChunk part = a;
      part.head_dim = a.padded_dim;
      part.first = j < a.first ? a.first : j;
      part.last = j + step < a.last ? j + step : a.last;
      widen(from + part.first, part.last - part.first, a.last - part.first, a.head_dim, a.padded_dim, a.panel);
      for (int64_t i = part.first; i < part.last; ++i) heads[i] = a.panel + (i - part.first) * a.padded_dim;
      part.keys = part.values = heads;
      body(part);
    }
  };
  each_panel(a.keys, widening<I>(a.dtype, a.key_bits), [&](const AttentionChunk& part) {
    each_tile<I::score_rows>(a.rows, [&](int64_t row, auto r) {
      score_rows<I, float, decltype(r)::value, false>(part, row);
    });
  });
  for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(a, row, to);
  std::memset(to.mixed, 0, size_t(a.rows * a.padded_dim) * sizeof(float));
  each_panel(a.values, widening<I>(a.dtype, a.value_bits), [&](const AttentionChunk& part) {
    each_tile<I::tile_rows>(a.rows, [&](int64_t row, auto r) {
      mix_rows<I, float, decltype(r)::value, true>(part, row, to.mixed);
    });
  });
}

template <class I>
void attend(const AttentionChunk& a, const AttentionState& to) {
  if (a.key_bits != 0) {
    if (a.rows > I::code_rows) return attend_panels<I>(a, to);  // decoding once is worth a copy
    code_kernels<I>(a.key_bits).score(a);
    for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(a, row, to);
    return code_kernels<I>(a.value_bits).mix(a, to.mixed);
  }
  if (a.rows > 2 * I::tile_rows) return attend_panels<I>(a, to);
  switch (a.dtype) {
    case Dtype::float32: return attend_direct<I, float>(a, to);
    case Dtype::float16: return attend_direct<I, Half>(a, to);
    case Dtype::bfloat16: return attend_direct<I, BFloat16>(a, to);
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
