#pragma once
// What the kernels have in common.  They are written once over `F` and `I` (16 lanes each) of the instruction set that includes them, with
//
//   QK_NB      panels of a tile, for few rows twice as many
//   QK_MR      rows of a tile of inputs as floats
//   QK_IMR     rows of a tile of inputs as integers
//   QK_DIRECT  up to so many rows codes are decoded in registers; for more, a stretch of QK_NB panels is decoded once into a buffer that stays in the
//              first-level cache, and every tile of rows multiplies with it
#include "numbers.h"
#include "panels.h"

namespace qk {
namespace {

#define QK_INLINE static inline __attribute__((always_inline))

// without it GCC unrolls only after it has decided which arrays live in registers
#define QK_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t WIDTH = QK_NB * LANES;  // channels of a tile

QK_INLINE F scale_at(const Weight& w, int64_t index) {
  if (w.scale_type == FLOAT32) return f_load((const float*)w.scale + index);
  const uint16_t* p = (const uint16_t*)w.scale + index;
  return w.scale_type == FLOAT16 ? f_from_half(p) : f_from_bfloat(p);
}

QK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

QK_INLINE void put(const Output& out, int64_t n, int64_t row, int64_t column, const float* values, int64_t count) {
  count = least(count, n - column);
  if (out.type == FLOAT32) {
    float* y = (float*)out.y + row * n + column;
    for (int64_t i = 0; i < count; i++) y[i] = values[i];
  } else {
    uint16_t* y = (uint16_t*)out.y + row * n + column;
    for (int64_t i = 0; i < count; i++) y[i] = out.type == FLOAT16 ? float_to_half(values[i]) : float_to_bfloat(values[i]);
  }
}

}  // namespace
}  // namespace qk
