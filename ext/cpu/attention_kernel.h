// The attention kernels, written once over an instruction set I (Part, tile_rows). Included by attention_portable.cpp,
// attention_avx2.cpp and attention_avx512.cpp only; internal linkage, see isa.h.
#pragma once

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

constexpr int64_t kAhead = 16;  // keys

// Into the second-level cache: the keys and values of a chunk together exceed the first.
template <class T>
EXL_INLINE void fetch_ahead(const T* row, int64_t count) {
  if (row == nullptr) return;
  for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// Raw products q.k of R rows from row `row` on with keys [first, last).
template <class I, class T, int R>
void score_rows(const AttentionChunk& a, int64_t row) {
  const T* const* keys = reinterpret_cast<const T* const*>(a.keys);
  for (int64_t j = a.first / 4 * 4; j < a.last; j += 4) {
    const T* columns[4];
    for (int64_t c = 0; c < 4; ++c) {  // outside [first, last) a neighbour stands in; its product is never read
      const int64_t key = j + c < a.first ? a.first : j + c < a.last ? j + c : a.last - 1;
      columns[c] = keys[key];
    }
    if (row == 0) {  // keys of one head lie far apart, where no hardware prefetcher follows; the values come next
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

// Weighted values of R rows, `C` registers of the head dimension from element `d` on.
template <class I, class T, int R, int C>
EXL_INLINE void mix_tile(const AttentionChunk& a, int64_t row, int64_t d, float* mixed) {
  using P = typename I::Part;
  P sum[R][C];
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    EXL_UNROLL for (int c = 0; c < C; ++c) sum[r][c] = P::all(0.0f);
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

template <class I, class T, int R>
void mix_rows(const AttentionChunk& a, int64_t row, float* mixed) {
  constexpr int64_t width = I::Part::width;
  int64_t d = 0;
  for (; d + 4 * width <= a.padded_dim; d += 4 * width) mix_tile<I, T, R, 4>(a, row, d, mixed);
  for (; d < a.padded_dim; d += width) mix_tile<I, T, R, 1>(a, row, d, mixed);
}

// Calls f(row, R) for tiles of R rows, R a compile-time constant: the largest that fit, so that keys are read rarely.
template <class I, class F>
EXL_INLINE void each_tile(int64_t rows, const F& f) {
  constexpr int most = I::tile_rows, middle = most > 4 ? 4 : most;
  int64_t row = 0;
  for (; row + most <= rows; row += most) f(row, Constant<most>());
  if (most > middle && row + middle <= rows) f(row, Constant<middle>()), row += middle;
  for (; row + 2 <= rows; row += 2) f(row, Constant<2>());
  if (row < rows) f(row, Constant<1>());
}

template <class I, class T>
void attend_type(const AttentionChunk& a, const AttentionState& to) {
  each_tile<I>(a.rows, [&](int64_t row, auto r) { score_rows<I, T, decltype(r)::value>(a, row); });
  for (int64_t row = 0; row < a.rows; ++row) weigh_row<I>(a, row, to);
  each_tile<I>(a.rows, [&](int64_t row, auto r) { mix_rows<I, T, decltype(r)::value>(a, row, to.mixed); });
}

// Copies keys and values to float32 panels and works on those: widening is exact, so the results are the same. It pays
// as soon as several register tiles read the chunk.
template <class I, class T>
void attend_panels(const AttentionChunk& a, const AttentionState& to) {
  using L = Lanes<typename I::Part>;
  const void* keys[kChunk];
  const void* values[kChunk];
  const auto widen = [&](const void* from, float* panel, const void*& pointer) {
    for (int64_t d = 0; d < a.head_dim; d += 16) {
      L::load_part(static_cast<const T*>(from) + d, a.head_dim - d).store(panel + d);
    }
    pointer = panel;
  };
  for (int64_t j = a.first; j < a.last; ++j) {
    fetch_ahead(j + kAhead < a.last ? static_cast<const T*>(a.keys[j + kAhead]) : nullptr, a.head_dim);
    fetch_ahead(j + kAhead < a.last ? static_cast<const T*>(a.values[j + kAhead]) : nullptr, a.head_dim);
    widen(a.keys[j], a.panels + j * a.padded_dim, keys[j]);
    widen(a.values[j], a.panels + (kChunk + j) * a.padded_dim, values[j]);
  }
  AttentionChunk packed = a;
  packed.keys = keys;
  packed.values = values;
  packed.dtype = Dtype::float32;
  attend_type<I, float>(packed, to);
}

template <class I>
void attend(const AttentionChunk& a, const AttentionState& to) {
  if (a.rows > 2 * I::tile_rows) {
    switch (a.dtype) {
      case Dtype::float32: return attend_panels<I, float>(a, to);
      case Dtype::float16: return attend_panels<I, Half>(a, to);
      case Dtype::bfloat16: return attend_panels<I, BFloat16>(a, to);
    }
  }
  switch (a.dtype) {
    case Dtype::float32: return attend_type<I, float>(a, to);
    case Dtype::float16: return attend_type<I, Half>(a, to);
    case Dtype::bfloat16: return attend_type<I, BFloat16>(a, to);
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
