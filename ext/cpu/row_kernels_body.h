// The bodies behind row_kernels.h, compiled once per instruction set: include it from row_kernels*.cpp only.
#pragma once

#include <cmath>
#include <limits>

#include "kv_quant_body.h"
#include "row_kernels.h"
#include "vec8.h"

namespace exl {
namespace {

// `input` gives the values of x, which may be made only then. The weights are fetched while the squares are added: a
// pass over a large model leaves no cache that still holds them.
template <class T, class Input>
EXL_INLINE void norm_row(const Input& input, const T* x, const float* weight, T* y, int64_t cols, float eps,
                         float offset) {
  D4 low = {}, high = {};  // squares of float32 are exact in double
  for_each_vector(cols, [&](int64_t c, int64_t count) {
    if (c % 16 == 0) __builtin_prefetch(weight + c);
    const F8 v = input(c, count);
    const D4 a = widen(v, 0), b = widen(v, 1);
    low += a * a;
    high += b * b;
  });
  const D4 sums = low + high;
  const double total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float scale = float(1.0 / __builtin_sqrt(total / double(cols) + double(eps)));
  for_each_vector(cols, [&](int64_t c, int64_t count) {
    store(load(x + c, count) * scale * (load(weight + c, count) + offset), y + c, count);
  });
}

template <class T>
void rms_norm_row(const T* x, const float* weight, T* y, int64_t cols, float eps, float offset) {
  norm_row([&](int64_t c, int64_t count) { return load(x + c, count); }, x, weight, y, cols, eps, offset);
}

void add_norm_row(float* x, const float* more, const float* weight, float* y, int64_t cols, float eps, float offset) {
  const auto add = [&](int64_t c, int64_t count) {
    const F8 sum = load(x + c, count) + load(more + c, count);
    store(sum, x + c, count);
    return sum;
  };
  norm_row(add, x, weight, y, cols, eps, offset);
}

template <class T, class F>
void gated_run(const T* gate, const T* up, T* out, int64_t count, const F& activation) {
  for_each_vector(count, [&](int64_t i, int64_t n) {
    store(activation(load(gate + i, n)) * load(up + i, n), out + i, n);
  });
}

template <class T>
void gated_typed(const T* gate, const T* up, T* out, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::silu: return gated_run(gate, up, out, count, [](F8 v) { return silu8(v); });
    case Activation::gelu: return gated_run(gate, up, out, count, [](F8 v) { return gelu8(v); });
    case Activation::gelu_tanh: return gated_run(gate, up, out, count, [](F8 v) { return gelu_tanh8(v); });
    case Activation::relu: return gated_run(gate, up, out, count, [](F8 v) { return relu8(v); });
  }
}

template <class T>
void rope_heads(T* x, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float* cos, const float* sin) {
  const int64_t half = rotary_dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_dim) {
    for_each_vector(half, [&](int64_t i, int64_t n) {
      const F8 a = load(x + i, n), b = load(x + half + i, n);
      const F8 c = load(cos + i, n), s = load(sin + i, n);
      store(a * c - b * s, x + i, n);
      store(b * c + a * s, x + half + i, n);
    });
  }
}

template <class From, class To>
void convert_run(const From* from, To* to, int64_t count) {
  for_each_vector(count, [&](int64_t i, int64_t n) { store(load(from + i, n), to + i, n); });
}

template <class From>
void convert_from(const From* from, void* to, Dtype to_dtype, int64_t count) {
  switch (to_dtype) {
    case Dtype::float32: return convert_run(from, static_cast<float*>(to), count);
    case Dtype::float16: return convert_run(from, static_cast<Half*>(to), count);
    case Dtype::bfloat16: return convert_run(from, static_cast<BFloat16*>(to), count);
  }
}

// One untyped entry per kernel: the dtype becomes a template argument here.
void any_rms_norm(const void* x, const float* w, void* y, Dtype dtype, int64_t cols, float eps, float offset) {
  switch (dtype) {
    case Dtype::float32:
      return rms_norm_row(static_cast<const float*>(x), w, static_cast<float*>(y), cols, eps, offset);
    case Dtype::float16: return rms_norm_row(static_cast<const Half*>(x), w, static_cast<Half*>(y), cols, eps, offset);
    case Dtype::bfloat16:
      return rms_norm_row(static_cast<const BFloat16*>(x), w, static_cast<BFloat16*>(y), cols, eps, offset);
  }
}

void any_gated(const void* gate, const void* up, void* out, Dtype dtype, int64_t count, Activation activation) {
  switch (dtype) {
    case Dtype::float32:
      return gated_typed(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(out),
                         count, activation);
    case Dtype::float16:
      return gated_typed(static_cast<const Half*>(gate), static_cast<const Half*>(up), static_cast<Half*>(out), count,
                         activation);
    case Dtype::bfloat16:
      return gated_typed(static_cast<const BFloat16*>(gate), static_cast<const BFloat16*>(up),
                         static_cast<BFloat16*>(out), count, activation);
  }
}

void any_rope(void* x, Dtype dtype, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float* cos,
              const float* sin) {
  switch (dtype) {
    case Dtype::float32: return rope_heads(static_cast<float*>(x), heads, head_dim, rotary_dim, cos, sin);
    case Dtype::float16: return rope_heads(static_cast<Half*>(x), heads, head_dim, rotary_dim, cos, sin);
    case Dtype::bfloat16: return rope_heads(static_cast<BFloat16*>(x), heads, head_dim, rotary_dim, cos, sin);
  }
}

void any_convert(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count) {
  switch (from_dtype) {
    case Dtype::float32: return convert_from(static_cast<const float*>(from), to, to_dtype, count);
    case Dtype::float16: return convert_from(static_cast<const Half*>(from), to, to_dtype, count);
    case Dtype::bfloat16: return convert_from(static_cast<const BFloat16*>(from), to, to_dtype, count);
  }
}

float max_run(const float* x, int64_t count) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  F8 best = splat(kNone);
  I8 nan = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F8 v = load(x + i);
    nan |= v != v;
    best = select(v > best, v, best);
  }
  float result = kNone;
  bool any_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    any_nan |= nan[lane] != 0;
    result = best[lane] > result ? best[lane] : result;
  }
  for (; i < count; ++i) {
    any_nan |= x[i] != x[i];
    result = x[i] > result ? x[i] : result;
  }
  return any_nan ? std::numeric_limits<float>::quiet_NaN() : result;
}

constexpr RowKernels kThisInstructionSet = {&any_rms_norm, &add_norm_row,  &any_gated,   &any_rope,
                                              &any_convert,  &quantize_head, &rotate_head, &max_run};

}  // namespace
}  // namespace exl
