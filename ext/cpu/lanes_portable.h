// Four float32 lanes in the compiler's own vectors: for processors without AVX2 and for other architectures.
// Interface: lanes.h.
#pragma once

#include "lanes.h"

namespace exl {
namespace {

struct Part128 {
  static constexpr int width = 4;
  static constexpr bool sums_of_16 = false;
  typedef float Float4 __attribute__((vector_size(16)));
  Float4 v;

  static EXL_INLINE Part128 all(float value) { return {Float4{value, value, value, value}}; }
  static EXL_INLINE Part128 load(const float* from) {
    Part128 out;
    std::memcpy(&out.v, from, sizeof out.v);
    return out;
  }
  template <class T>
  static EXL_INLINE Part128 load(const T* from) {
    return {Float4{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
  }
  template <class T>
  static EXL_INLINE Part128 load_part(const T* from, int count) {
    float lane[width] = {};
    for (int i = 0; i < count && i < width; ++i) lane[i] = to_float(from[i]);
    return load(lane);
  }
  EXL_INLINE void store(float* to) const { std::memcpy(to, &v, sizeof v); }

  static EXL_INLINE float sum(const Part128* a) {
    const Float4 quarter = (a[0].v + a[2].v) + (a[1].v + a[3].v);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  }
  static EXL_INLINE void sums4(const Part128* a, const Part128* b, const Part128* c, const Part128* d, float* sums) {
    sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
  }
};

template <class F>
EXL_INLINE Part128 each(const F& f) {
  return {Part128::Float4{f(0), f(1), f(2), f(3)}};
}

EXL_INLINE Part128 operator+(Part128 a, Part128 b) { return {a.v + b.v}; }
EXL_INLINE Part128 operator-(Part128 a, Part128 b) { return {a.v - b.v}; }
EXL_INLINE Part128 operator*(Part128 a, Part128 b) { return {a.v * b.v}; }
EXL_INLINE Part128 operator/(Part128 a, Part128 b) { return {a.v / b.v}; }
EXL_INLINE Part128 fma(Part128 a, Part128 b, Part128 c) { return {a.v * b.v + c.v}; }
EXL_INLINE Part128 maximum(Part128 a, Part128 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
EXL_INLINE Part128 round_half(Part128 a) {
  return each([&](int i) { return half_to_float(float_to_half(a.v[i])); });
}
// a * 2^n, n being the integer in the low bits of t's representation; the result must be a normal number.
EXL_INLINE Part128 times_power(Part128 a, Part128 t) {
  return each([&](int i) { return bits_to_float(float_to_bits(a.v[i]) + (float_to_bits(t.v[i]) << 23)); });
}
// x < limit ? yes : no, so `no` where x is NaN.
EXL_INLINE Part128 below(Part128 x, Part128 limit, Part128 yes, Part128 no) {
  return each([&](int i) { return x.v[i] < limit.v[i] ? yes.v[i] : no.v[i]; });
}

}  // namespace
}  // namespace exl
