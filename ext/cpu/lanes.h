// Sixteen float32 lanes as one value, whatever the instruction set: the arithmetic the matrix and attention kernels are
// written in. A Part is one vector register; Lanes<Part> is as many of them as make 16 lanes.
//
//   Part512 (lanes_avx512.h)  1 x 16      Part256 (lanes_avx2.h)  2 x 8      Part128 (lanes_portable.h)  4 x 4
//
// Every operation is per lane, and the one reduction has a fixed tree, so AVX2 and AVX-512 give the same bits. The
// portable Part multiplies and adds with two roundings, because a fused operation would be a library call there.
//
// A Part has: width; zero, all, load and load_part (from float, Half, BFloat16), store; + - * /, fma, maximum,
// round_half, times_power, below; and sums4; sums_of_16, and where that is true sums4x4, for 16 sums at once by the
// same tree. maximum(a, b) is b if either is NaN. Internal linkage everywhere, see isa.h.
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {
namespace {

// A number as a type, to hand to a generic lambda.
template <int n>
struct Constant {
  static constexpr int value = n;
};

#define EXL_INLINE inline __attribute__((always_inline))
#define EXL_UNROLL _Pragma("GCC unroll 16")

// Up to P::width elements, zero in the other lanes; `count` may be negative or too large.
template <class P, class T>
EXL_INLINE P part_of(const T* from, int64_t count) {
  if (count >= P::width) return P::load(from);
  if (count <= 0) return P::all(0.0f);
  return P::load_part(from, int(count));
}

template <class P>
struct Lanes {
  static constexpr int parts = 16 / P::width;
  P part[parts];

  static EXL_INLINE Lanes zero() { return all(0.0f); }
  static EXL_INLINE Lanes all(float value) {
    Lanes out;
    EXL_UNROLL for (int i = 0; i < parts; ++i) out.part[i] = P::all(value);
    return out;
  }
  // 16 elements, widened to float32.
  template <class T>
  static EXL_INLINE Lanes load(const T* from) {
    Lanes out;
    EXL_UNROLL for (int i = 0; i < parts; ++i) out.part[i] = P::load(from + i * P::width);
    return out;
  }
  // The first `count` elements (0..16), zero in the other lanes; nothing behind them is read.
  template <class T>
  static EXL_INLINE Lanes load_part(const T* from, int64_t count) {
    Lanes out;
    EXL_UNROLL for (int i = 0; i < parts; ++i) out.part[i] = part_of<P>(from + i * P::width, count - i * P::width);
    return out;
  }
  EXL_INLINE void store(float* to) const {
    EXL_UNROLL for (int i = 0; i < parts; ++i) part[i].store(to + i * P::width);
  }
};

#define EXL_LANES_OPERATOR(op)                                                          \
  template <class P>                                                                    \
  EXL_INLINE Lanes<P> operator op(const Lanes<P>& a, const Lanes<P>& b) {               \
    Lanes<P> out;                                                                       \
    EXL_UNROLL for (int i = 0; i < Lanes<P>::parts; ++i) out.part[i] = a.part[i] op b.part[i]; \
    return out;                                                                         \
  }
EXL_LANES_OPERATOR(+)
EXL_LANES_OPERATOR(-)
EXL_LANES_OPERATOR(*)
EXL_LANES_OPERATOR(/)
#undef EXL_LANES_OPERATOR

// a * b + c
template <class P>
EXL_INLINE Lanes<P> fma(const Lanes<P>& a, const Lanes<P>& b, const Lanes<P>& c) {
  Lanes<P> out;
  EXL_UNROLL for (int i = 0; i < Lanes<P>::parts; ++i) out.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return out;
}

template <class P>
EXL_INLINE Lanes<P> maximum(const Lanes<P>& a, const Lanes<P>& b) {
  Lanes<P> out;
  EXL_UNROLL for (int i = 0; i < Lanes<P>::parts; ++i) out.part[i] = maximum(a.part[i], b.part[i]);
  return out;
}

// Every lane rounded to the nearest half (ties to even, subnormals kept), as float32.
template <class P>
EXL_INLINE Lanes<P> round_half(const Lanes<P>& a) {
  Lanes<P> out;
  EXL_UNROLL for (int i = 0; i < Lanes<P>::parts; ++i) out.part[i] = round_half(a.part[i]);
  return out;
}

// sums[j] = sum of the lanes of a[j], j < 4. The tree, l being a lane: l + (l + 8), then + 4, then + 2, then + 1.
template <class P>
EXL_INLINE void sums4(const Lanes<P>* a, float* sums) {
  P::sums4(a[0].part, a[1].part, a[2].part, a[3].part, sums);
}

// Products of R rows with 4 columns over n elements: out[r * out_stride + c] (+)= sum_k x[r][k] * column_c[k].
//   x        float32, row r at x + r * x_stride, readable and finite up to n rounded up to 16
//   columns  four pointers to n elements of T each
// Lane l adds the products of k = l, l + 16, l + 32 ... in that order; then the tree of sums4; then, if `add`, one
// addition to what out holds. R changes nothing in a row's arithmetic.
template <class P, int R, class T>
EXL_INLINE void dot_tile(const float* x, int64_t x_stride, const T* const* columns, int64_t n, float* out,
                         int64_t out_stride, bool add) {
  constexpr int parts = Lanes<P>::parts;
  Lanes<P> total[R][4];
  const int64_t whole = n / 16 * 16;
  for (int i = 0; i < parts; ++i) {  // one register of the 16 lanes at a time, so that only R * 4 sums are live
    const int64_t first = i * P::width;
    P sum[R][4];
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      EXL_UNROLL for (int c = 0; c < 4; ++c) sum[r][c] = P::all(0.0f);
    }
    const T *c0 = columns[0] + first, *c1 = columns[1] + first, *c2 = columns[2] + first, *c3 = columns[3] + first;
    const float* row = x + first;
    for (int64_t k = 0; k < whole; k += 16) {
      const P w[4] = {P::load(c0 + k), P::load(c1 + k), P::load(c2 + k), P::load(c3 + k)};
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        const P a = P::load(row + r * x_stride + k);
        EXL_UNROLL for (int c = 0; c < 4; ++c) sum[r][c] = fma(a, w[c], sum[r][c]);
      }
    }
    if (whole < n) {
      const int64_t left = n - whole - first;
      const P w[4] = {part_of<P>(c0 + whole, left), part_of<P>(c1 + whole, left), part_of<P>(c2 + whole, left),
                      part_of<P>(c3 + whole, left)};
      EXL_UNROLL for (int r = 0; r < R; ++r) {
        const P a = P::load(row + r * x_stride + whole);
        EXL_UNROLL for (int c = 0; c < 4; ++c) sum[r][c] = fma(a, w[c], sum[r][c]);
      }
    }
    EXL_UNROLL for (int r = 0; r < R; ++r) {
      EXL_UNROLL for (int c = 0; c < 4; ++c) total[r][c].part[i] = sum[r][c];
    }
  }
  if constexpr (P::sums_of_16 && R == 4) {
    P four_rows[16];
    EXL_UNROLL for (int i = 0; i < 16; ++i) four_rows[i] = total[i / 4][i % 4].part[0];
    return P::sums4x4(four_rows, out, out_stride, add);
  }
  EXL_UNROLL for (int r = 0; r < R; ++r) {
    float sums[4];
    sums4(total[r], sums);
    float* y = out + r * out_stride;
    if (add) {
      EXL_UNROLL for (int c = 0; c < 4; ++c) y[c] += sums[c];
    } else {
      EXL_UNROLL for (int c = 0; c < 4; ++c) y[c] = sums[c];
    }
  }
}

}  // namespace
}  // namespace exl
