// 16-bit floats, bit by bit: round to nearest, ties to even; subnormals kept.
#pragma once
#include <stdint.h>
#include <string.h>

static inline uint32_t bits_of(float a) { uint32_t u; memcpy(&u, &a, 4); return u; }
static inline float float_of(uint32_t u) { float a; memcpy(&a, &u, 4); return a; }
static inline float bfloat_to_float(uint16_t h) { return float_of((uint32_t)h << 16); }
static inline uint16_t float_to_bfloat(float a) {
  uint32_t u = bits_of(a);
  uint16_t rounded = (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  return (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 64) : rounded;  // NaN stays NaN
}
static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // exponents differ by 112; the product also brings subnormals to their place
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
static inline uint16_t float_to_half(float a) {
  uint32_t u = bits_of(a), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  if (rest >= 0x47800000) return (uint16_t)(sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00));  // 65536 and more, infinity, NaN
  if (rest < 0x38800000) return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));  // steps of 2^-24: the sum rounds to them
  rest += 0xfff + ((rest >> 13) & 1);
  return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}
