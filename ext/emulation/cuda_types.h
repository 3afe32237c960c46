// What the kernels use of vector_types.h, cuda_fp16.h and cuda_bf16.h, so that no CUDA toolkit is needed to test them.
// Conversions and arithmetic round as the device does: to nearest, ties to even, once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/half.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EXL_EMU_VECTORS(T, name, size)                                               \
  struct alignas(2 * (size)) name##2 {                                               \
    T x, y;                                                                          \
  };                                                                                 \
  struct alignas(4 * (size)) name##4 {                                               \
    T x, y, z, w;                                                                    \
  };                                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EXL_EMU_VECTORS(float, float, 4)
EXL_EMU_VECTORS(int, int, 4)
EXL_EMU_VECTORS(unsigned, uint, 4)
EXL_EMU_VECTORS(short, short, 2)
EXL_EMU_VECTORS(unsigned short, ushort, 2)
EXL_EMU_VECTORS(signed char, char, 1)
EXL_EMU_VECTORS(unsigned char, uchar, 1)
#undef EXL_EMU_VECTORS

namespace exl_emu {

inline float half_value(uint16_t bits) { return exl::half_to_float(bits); }
inline float bfloat_value(uint16_t bits) { return exl::bfloat16_to_float(bits); }
inline bool is_nan32(float f) { return f != f; }
inline uint16_t half_bits(float f) { return is_nan32(f) ? uint16_t(0x7fff) : exl::float_to_half(f); }
inline uint16_t bfloat_bits(float f) { return is_nan32(f) ? uint16_t(0x7fff) : exl::float_to_bfloat16(f); }

// A double to `digits` significant bits and exponents down to 2^lowest (the last place of subnormals), as a float.
inline float round_to(double d, int digits, int lowest) {
  if (d == 0 || !std::isfinite(d)) return float(d);
  int exponent = 0;
  std::frexp(d, &exponent);
  const int place = exponent - digits < lowest ? lowest : exponent - digits;
  return float(std::ldexp(std::nearbyint(std::ldexp(d, -place)), place));
}

}  // namespace exl_emu

#define EXL_EMU_SMALL_FLOAT(Type, Pair, bits_of, value_of)                                             \
  struct alignas(2) Type {                                                                             \
    uint16_t bits;                                                                                     \
    Type() = default;                                                                                  \
    Type(float f) : bits(exl_emu::bits_of(f)) {}                                                       \
    operator float() const { return exl_emu::value_of(bits); }                                         \
    Type& operator+=(Type other) { return *this = Type(float(*this) + float(other)); }                 \
    Type& operator-=(Type other) { return *this = Type(float(*this) - float(other)); }                 \
    Type& operator*=(Type other) { return *this = Type(float(*this) * float(other)); }                 \
  };                                                                                                   \
  struct alignas(4) Pair {                                                                             \
    Type x, y;                                                                                         \
    Pair() = default;                                                                                  \
    Pair(Type x_, Type y_) : x(x_), y(y_) {}                                                           \
  };                                                                                                   \
  inline Type operator+(Type a, Type b) { return Type(float(a) + float(b)); }                          \
  inline Type operator-(Type a, Type b) { return Type(float(a) - float(b)); }                          \
  inline Type operator*(Type a, Type b) { return Type(float(a) * float(b)); }                          \
  inline Type operator/(Type a, Type b) { return Type(float(a) / float(b)); }                          \
  inline Type __hadd(Type a, Type b) { return a + b; }                                                 \
  inline Type __hsub(Type a, Type b) { return a - b; }                                                 \
  inline Type __hmul(Type a, Type b) { return a * b; }                                                 \
  inline Type __hdiv(Type a, Type b) { return a / b; }                                                 \
  inline Type __hmax(Type a, Type b) { return Type(std::fmax(float(a), float(b))); }                   \
  inline Type __hmin(Type a, Type b) { return Type(std::fmin(float(a), float(b))); }                   \
  inline Type __hneg(Type a) { Type r; r.bits = uint16_t(a.bits ^ 0x8000u); return r; }                \
  inline Type __habs(Type a) { Type r; r.bits = uint16_t(a.bits & 0x7fffu); return r; }                \
  inline bool __heq(Type a, Type b) { return float(a) == float(b); }                                   \
  inline bool __hgt(Type a, Type b) { return float(a) > float(b); }                                    \
  inline bool __hlt(Type a, Type b) { return float(a) < float(b); }                                    \
  inline bool __hge(Type a, Type b) { return float(a) >= float(b); }                                   \
  inline bool __hle(Type a, Type b) { return float(a) <= float(b); }                                   \
  inline bool __hisnan(Type a) { return exl_emu::is_nan32(float(a)); }                                 \
  inline Pair __hadd2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }                               \
  inline Pair __hsub2(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }                               \
  inline Pair __hmul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }                               \
  inline Pair __hmax2(Pair a, Pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                 \
  inline Pair __hmin2(Pair a, Pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                 \
  inline Pair __habs2(Pair a) { return {__habs(a.x), __habs(a.y)}; }                                   \
  inline Pair __hneg2(Pair a) { return {__hneg(a.x), __hneg(a.y)}; }                                   \
  inline float __low2float(Pair a) { return a.x; }                                                     \
  inline float __high2float(Pair a) { return a.y; }

EXL_EMU_SMALL_FLOAT(__half, __half2, half_bits, half_value)
EXL_EMU_SMALL_FLOAT(__nv_bfloat16, __nv_bfloat162, bfloat_bits, bfloat_value)
#undef EXL_EMU_SMALL_FLOAT

typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

// Exact products, one rounding: a double holds every sum that lies near a rounding boundary.
inline __half __hfma(__half a, __half b, __half c) {
  return __half(exl_emu::round_to(double(float(a)) * double(float(b)) + double(float(c)), 11, -24));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __nv_bfloat16(exl_emu::round_to(double(float(a)) * double(float(b)) + double(float(c)), 8, -133));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half __double2half(double d) { return __half(exl_emu::round_to(d, 11, -24)); }
inline __half __int2half_rn(int i) { return __half(exl_emu::round_to(i, 11, -24)); }
inline __half __ushort2half_rn(unsigned short i) { return __half(float(i)); }
inline int __half2int_rn(__half h) { return int(std::nearbyint(float(h))); }
inline int __half2int_rz(__half h) { return int(float(h)); }
inline __half __ushort_as_half(unsigned short u) {
  __half h;
  h.bits = u;
  return h;
}
inline __half __short_as_half(short s) { return __ushort_as_half(static_cast<unsigned short>(s)); }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
inline __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float f) { return {__half(f), __half(f)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }

inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) {
  __nv_bfloat16 h;
  h.bits = u;
  return h;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 h) { return h.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 h) { return h.y; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {__nv_bfloat16(f), __nv_bfloat16(f)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {float(h.x), float(h.y)}; }
