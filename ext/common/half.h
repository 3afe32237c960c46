// 16-bit floats as plain bits, and their exact conversions to and from float32.
//
//   Half      IEEE binary16: 1 sign, 5 exponent, 10 mantissa bits; subnormals, infinities and NaN included
//   BFloat16  the upper half of a float32
//
// Widening is exact. Narrowing rounds to nearest, ties to even, as torch does; NaN stays a (quiet) NaN, overflow
// becomes infinity, small halves become subnormal. Test: tests/ext/test_half.py (all 65536 patterns).
//
// Everything here has internal linkage on purpose. These functions are compiled once per instruction set; a shared
// `inline` copy would let the linker keep the AVX-512 one for callers that run on plain x86-64.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace exl {

// Element types that kernels accept for activations and pages. The numbers are our own, not torch's.
enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

static inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1fu) {  // infinity, or NaN made quiet as the hardware does
    return bits_to_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  }
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return bits_to_float(sign | float_to_bits(magnitude));
  }
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}

static inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));  // NaN, quiet
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: add 0.5, whose last mantissa bit weighs 2^-24, and let the adder round
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(rounded) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude + 0xfffu + odd - (112u << 23)) >> 13));
#endif
}

static inline float bfloat16_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // it must not round to infinity
  if (is_nan) return uint16_t(((bits >> 16) & 0x8000u) | 0x7fc0u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One spelling for all element types, so that a kernel can be a template over float, Half and BFloat16.
static inline float to_float(float value) { return value; }
static inline float to_float(Half value) { return half_to_float(value.bits); }
static inline float to_float(BFloat16 value) { return bfloat16_to_float(value.bits); }

static inline void from_float(float value, float& out) { out = value; }
static inline void from_float(float value, Half& out) { out.bits = float_to_half(value); }
static inline void from_float(float value, BFloat16& out) { out.bits = float_to_bfloat16(value); }

}  // namespace exl
