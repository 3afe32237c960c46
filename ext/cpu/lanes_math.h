// Elementary functions over Lanes. NaN stays NaN. Only multiplications, additions and one division in a
// fixed order, so AVX2 and AVX-512 agree to the bit. Internal linkage, see isa.h.
#pragma once

#include "lanes.h"

namespace exl {
namespace {

// e^x for x <= 88. x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of e^r to r^7, whose remainder is below
// 6e-9 of the result; error within 2 units in the last place. Below -87, where 2^n is no longer a normal number: 0.
template <class P>
EXL_INLINE Lanes<P> exp_lanes(const Lanes<P>& x) {
  using L = Lanes<P>;
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  const L magic = L::all(12582912.0f);
  const L shifted = fma(x, L::all(1.44269504f), magic);
  const L n = shifted - magic;
  // ln 2 in two parts: the first has few enough bits that n times it is exact.
  const L r = fma(n, L::all(-1.42860677e-6f), fma(n, L::all(-0.693145752f), x));
  L p = L::all(1.0f / 5040.0f);
  p = fma(p, r, L::all(1.0f / 720.0f));
  p = fma(p, r, L::all(1.0f / 120.0f));
  p = fma(p, r, L::all(1.0f / 24.0f));
  p = fma(p, r, L::all(1.0f / 6.0f));
  p = fma(p, r, L::all(0.5f));
  p = fma(p, r, L::all(1.0f));
  p = fma(p, r, L::all(1.0f));
  L out;
  EXL_UNROLL for (int i = 0; i < L::parts; ++i) {
    out.part[i] = below(x.part[i], P::all(-87.0f), P::all(0.0f), times_power(p.part[i], shifted.part[i]));
  }
  return out;
}

// tanh x. Near zero a quotient of polynomials (the continued fraction of tanh cut after seven steps; its error is below
// 1e-9 for |x| <= 1), further out 1 - 2 / (e^2|x| + 1), where nothing cancels.
template <class P>
EXL_INLINE Lanes<P> tanh_lanes(const Lanes<P>& x) {
  using L = Lanes<P>;
  const L one = L::all(1.0f), zero = L::zero();
  const L size = maximum(x, zero - x);
  const L square = x * x;
  const L top = fma(square, fma(square, square + L::all(378.0f), L::all(17325.0f)), L::all(135135.0f));
  const L inner = fma(square, fma(square, L::all(28.0f), L::all(3150.0f)), L::all(62370.0f));
  const L bottom = fma(square, inner, L::all(135135.0f));
  const L near = x * top / bottom;
  const L bounded = zero - maximum(L::all(-10.0f), zero - size);  // tanh 10 rounds to 1
  const L away = one - L::all(2.0f) / (exp_lanes(bounded + bounded) + one);
  const L negative = zero - away;
  L out;
  EXL_UNROLL for (int i = 0; i < L::parts; ++i) {
    const P sign = below(x.part[i], zero.part[i], negative.part[i], away.part[i]);
    out.part[i] = below(size.part[i], one.part[i], near.part[i], sign);
  }
  return out;
}

}  // namespace
}  // namespace exl
