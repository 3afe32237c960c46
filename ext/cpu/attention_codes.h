// Attention over rows of codes (../common/kv_rows.h): part of attention_kernel.h, written over an instruction set I
//
//   I::code_rows          query rows, one register tile, up to which codes are decoded on the way to the sums
//   I::Codes<bits>(half)  a group of a row: the address of its scale
//     .part(step, i)      values i * Part::width on of 16, as a Part. Past head_dim they meet zeros in the queries, or
//                         nobody looks at what becomes of them
//
// Products of a code and a scale are exact, so it makes no difference to a result where they are formed.
#pragma once

#include "../common/kv_rows.h"
#include "attention_isa.h"
#include "lanes.h"

namespace exl {
namespace {

constexpr int64_t kAhead = 16;  // keys

// Into the second-level cache: the keys and values of a chunk together exceed the first.
template <class T>
EXL_INLINE void fetch_ahead(const T* row, int64_t count) {
  if (row == nullptr) return;
  for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// Calls f(row, R) for tiles of R rows, R a compile-time constant: the largest that fit, so that keys are read rarely.
// Eight rows are two fours: a tile of two would wait for its loads.
template <int most, class F>
EXL_INLINE void each_tile(int64_t rows, const F& f) {
  constexpr int middle = most > 4 ? 4 : most;
  int64_t row = 0;
  for (; row + most <= rows && (most <= middle || rows - row != 2 * middle); row += most) f(row, Constant<most>());
  for (; most > middle && row + middle <= rows; row += middle) f(row, Constant<middle>());
  for (; row + 2 <= rows; row += 2) f(row, Constant<2>());
  if (row < rows) f(row, Constant<1>());
}

// The address of the first step of a row.
EXL_INLINE const uint8_t* steps_of(const void* row, int64_t head_dim) {
  return static_cast<const uint8_t*>(row) + 2 * kv_groups(head_dim);
}

// dot_tile of lanes.h for four rows of codes.
template <class I, int bits, int R>
EXL_INLINE void dot_codes(const float* x, int64_t x_stride, const uint8_t* const* rows, int64_t head_dim, float* out,
                          int64_t out_stride) {
  using P = typename I::Part;
  using Codes = typename I::template Codes<bits>;
  Lanes<P> total[R][4];
  const int64_t steps = kv_steps(head_dim), first = 2 * kv_groups(head_dim);
  for (int i = 0; i < Lanes<P>::parts; ++i) {
    P sum[R][4];
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      EXL_UNROLL for (int c = 0; c < 4; ++c) sum[r][c] = P::all(0.0f);
    }
    const auto add = [&](int64_t step, auto count) {
      P w[4][2];
      EXL_UNROLL for (int c = 0; c < 4; ++c) {
        const Codes codes(rows[c] + step);
        const uint8_t* at = rows[c] + first + step * 2 * bits;
        w[c][0] = codes.part(at, i);
        if constexpr (decltype(count)::value > 1) w[c][1] = codes.part(at + 2 * bits, i);
      }
      EXL_UNROLL for (int s = 0; s < decltype(count)::value; ++s) {
        EXL_UNROLL for (int r = 0; r < R; ++r) {
          const P a = P::load(x + r * x_stride + (step + s) * kKvStep + i * P::width);
          EXL_UNROLL for (int c = 0; c < 4; ++c) sum[r][c] = fma(a, w[c][s], sum[r][c]);
        }
      }
    };
    int64_t step = 0;
    for (; step + 2 <= steps; step += 2) add(step, Constant<2>());
    if (step < steps) add(step, Constant<1>());
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      EXL_UNROLL for (int c = 0; c < 4; ++c) total[r][c].part[i] = sum[r][c];
    }
  }
  if constexpr (P::sums_of_16 && R == 4) {
    P four_rows[16];
    EXL_UNROLL for (int i = 0; i < 16; ++i) four_rows[i] = total[i / 4][i % 4].part[0];
    return P::sums4x4(four_rows, out, out_stride, false);
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) sums4(total[r], out + r * out_stride);
}

// As score_rows.
template <class I, int bits, int R>
void score_codes_rows(const AttentionChunk& a, int64_t row) {
  const uint8_t* const* keys = reinterpret_cast<const uint8_t* const*>(a.keys);
  const int64_t bytes = kv_row_bytes(a.head_dim, bits);
  for (int64_t j = a.first / 4 * 4; j < a.last; j += 4) {
    const uint8_t* some[4];
    for (int64_t c = 0; c < 4; ++c) {
      const int64_t key = j + c < a.first ? a.first : j + c < a.last ? j + c : a.last - 1;
      some[c] = keys[key];
      if (row != 0) continue;
      fetch_ahead(j + c + kAhead < a.last ? keys[j + c + kAhead] : nullptr, bytes);
      fetch_ahead(j + c >= a.first && j + c < a.last ? static_cast<const uint8_t*>(a.values[j + c]) : nullptr, bytes);
    }
    dot_codes<I, bits, R>(a.q + row * a.padded_dim, a.padded_dim, some, a.head_dim, a.scores + row * kChunk + j,
                          kChunk);
  }
}

// As mix_tile, `steps` steps from step `first` on.
template <class I, int bits, int R, int steps>
EXL_INLINE void mix_codes(const AttentionChunk& a, int64_t row, int64_t first, float* mixed) {
  using P = typename I::Part;
  using Codes = typename I::template Codes<bits>;
  constexpr int parts = Lanes<P>::parts;
  P sum[R][steps * parts];
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    EXL_UNROLL for (int c = 0; c < steps * parts; ++c) sum[r][c] = P::all(0.0f);
  }
  const float* weights = a.scores + row * kChunk;
  for (int64_t j = a.first; j < a.last; ++j) {
    const uint8_t *scales = static_cast<const uint8_t*>(a.values[j]) + first;
    const uint8_t* at = steps_of(a.values[j], a.head_dim) + first * 2 * bits;
    P v[steps * parts];
    EXL_UNROLL for (int s = 0; s < steps; s += 2) {
      const Codes codes(scales + s);
      EXL_UNROLL for (int i = 0; i < parts; ++i) v[s * parts + i] = codes.part(at + s * 2 * bits, i);
      if constexpr (steps > 1) {
        EXL_UNROLL for (int i = 0; i < parts; ++i) v[(s + 1) * parts + i] = codes.part(at + (s + 1) * 2 * bits, i);
      }
    }
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      const P w = P::all(weights[r * kChunk + j]);
      EXL_UNROLL for (int c = 0; c < steps * parts; ++c) sum[r][c] = fma(w, v[c], sum[r][c]);
    }
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    float* to = mixed + (row + r) * a.padded_dim + first * kKvStep;
    EXL_UNROLL for (int c = 0; c < steps * parts; ++c) sum[r][c].store(to + c * P::width);
  }
}

template <class I, int bits, int R>
void mix_codes_rows(const AttentionChunk& a, int64_t row, float* mixed) {
  constexpr int most = Lanes<typename I::Part>::parts == 1 ? 4 : 2;  // steps whose sums fit the registers
  const int64_t steps = kv_steps(a.head_dim);
  int64_t step = 0;
  for (; step + most <= steps; step += most) mix_codes<I, bits, R, most>(a, row, step, mixed);
  if (most > 2 && step + 2 <= steps) mix_codes<I, bits, R, 2>(a, row, step, mixed), step += 2;
  if (step < steps) mix_codes<I, bits, R, 1>(a, row, step, mixed);
}

template <class I, int bits>
void score_codes(const AttentionChunk& a) {
  each_tile<I::code_rows>(a.rows, [&](int64_t row, auto r) { score_codes_rows<I, bits, decltype(r)::value>(a, row); });
}

template <class I, int bits>
void mix_codes(const AttentionChunk& a, float* mixed) {
  each_tile<I::code_rows>(a.rows, [&](int64_t row, auto r) {
    mix_codes_rows<I, bits, decltype(r)::value>(a, row, mixed);
  });
}

template <class I, int bits>
void widen_codes(const void* const* heads, int64_t count, int64_t ahead, int64_t head_dim, int64_t padded_dim,
                 float* panel) {
  using P = typename I::Part;
  const int64_t steps = padded_dim / kKvStep, bytes = kv_row_bytes(head_dim, bits);
  for (int64_t j = 0; j < count; ++j, panel += padded_dim) {
    const uint8_t *scales = static_cast<const uint8_t*>(heads[j]), *at = steps_of(heads[j], head_dim);
    fetch_ahead(j + kAhead < ahead ? static_cast<const uint8_t*>(heads[j + kAhead]) : nullptr, bytes);
    const auto widen = [&](const typename I::template Codes<bits>& codes, int64_t step) {
      EXL_UNROLL for (int i = 0; i < Lanes<P>::parts; ++i) {
        codes.part(at + step * 2 * bits, i).store(panel + step * kKvStep + i * P::width);
      }
    };
    int64_t step = 0;
    for (; step + 2 <= steps; step += 2) {
      const typename I::template Codes<bits> codes(scales + step);
      widen(codes, step);
      widen(codes, step + 1);
    }
    if (step < steps) widen(typename I::template Codes<bits>(scales + step), step);
  }
}

// What a width needs.
struct CodeKernels {
  void (*score)(const AttentionChunk& a);
  void (*mix)(const AttentionChunk& a, float* mixed);
  void (*widen)(const void* const* heads, int64_t count, int64_t ahead, int64_t head_dim, int64_t padded_dim,
                float* panel);
};

template <class I, int bits>
constexpr CodeKernels kernels_of_width() {
  return {&score_codes<I, bits>, &mix_codes<I, bits>, &widen_codes<I, bits>};
}

template <class I>
const CodeKernels& code_kernels(int bits) {
  static constexpr CodeKernels kernels[] = {
      kernels_of_width<I, 2>(), kernels_of_width<I, 3>(), kernels_of_width<I, 4>(), kernels_of_width<I, 5>(),
      kernels_of_width<I, 6>(), kernels_of_width<I, 7>(), kernels_of_width<I, 8>(),
  };
  return kernels[bits - 2];
}

}  // namespace
}  // namespace exl
