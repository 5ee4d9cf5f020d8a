// The kernels, written once over `F` and `I` (16 lanes each) of the instruction set that includes this file.
//
// Few rows: codes are decoded in registers.  More rows: a stretch of QK_NB panels is decoded once into a buffer that stays in the first-level cache,
// and every tile of QK_MR rows multiplies with it.
#include "numbers.h"
#include "panels.h"

namespace qk {
namespace {

#define QK_INLINE static inline __attribute__((always_inline))

// without it GCC unrolls only after it has decided which arrays live in registers
#define QK_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t WIDTH = QK_NB * LANES;  // channels of a tile
constexpr int64_t STRETCH = 128;          // inputs that are decoded to floats at one time

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

// code J of a lane, and which of the lane's inputs it belongs to
template <int B, int J> struct Code;
template <int J> struct Code<4, J> {
  static constexpr int at = (J >> 1) + 4 * (J & 1);
  QK_INLINE F value(I v) { return nibble<J>(v); }
};
template <int J> struct Code<8, J> {
  static constexpr int at = J;
  QK_INLINE F value(I v) { return byte<J>(v); }
};

// float inputs ----------------------------------------------------------------------------------------------------------------------------

template <int B, int J, int MR, int NB>
QK_INLINE void multiply(const I (&v)[NB], const float* x, int64_t k, F (&sum)[2][MR][NB]) {
  QK_UNROLL
  for (int b = 0; b < NB; b++) {
    F code = Code<B, J>::value(v[b]);
    QK_UNROLL
    for (int m = 0; m < MR; m++) sum[J & 1][m][b] = f_fma(code, f_set1(x[m * k + Code<B, J>::at]), sum[J & 1][m][b]);
  }
  if constexpr (J + 1 < 32 / B) multiply<B, J + 1>(v, x, k, sum);
}

// MR rows from `row`, NB panels from p; those beyond p1 are computed twice and not written
template <int B, int MR, int NB>
static void float_direct(const Weight& w, const float* x, const float* sums, int64_t row, int64_t p, int64_t p1, Output out) {
  constexpr int64_t STEP = 32 / B;
  const int64_t groups = w.k / w.group, steps = w.group / STEP;
  // the same place of the panels that come next: their streams are new to the processor's own prefetcher
  const int64_t ahead = NB * w.panel_bytes();
  const uint8_t* codes[NB];
  int64_t scales[NB];
  QK_UNROLL
  for (int b = 0; b < NB; b++) {
    int64_t panel = least(p + b, p1 - 1);
    codes[b] = w.codes + panel * w.panel_bytes();
    scales[b] = panel * groups * LANES;
  }
  F total[MR][NB];
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < NB; b++) total[m][b] = f_zero();
  x += row * w.k;
  for (int64_t g = 0; g < groups; g++) {
    // two sums each, so that an addition need not wait for the one before
    F sum[2][MR][NB];
    QK_UNROLL
    for (int h = 0; h < 2; h++)
      QK_UNROLL
      for (int m = 0; m < MR; m++)
        QK_UNROLL
        for (int b = 0; b < NB; b++) sum[h][m][b] = f_zero();
    for (int64_t i = 0; i < steps; i++) {
      I v[NB];
      QK_UNROLL
      for (int b = 0; b < NB; b++) {
        v[b] = i_load(codes[b]);
        __builtin_prefetch(codes[b] + ahead, 0, 2);
        codes[b] += 64;
      }
      multiply<B, 0>(v, x, w.k, sum);
      x += STEP;
    }
    QK_UNROLL
    for (int b = 0; b < NB; b++) {
      F s = scale_at(w, scales[b] + g * LANES);
      QK_UNROLL
      for (int m = 0; m < MR; m++) total[m][b] = f_fma(f_add(sum[0][m][b], sum[1][m][b]), s, total[m][b]);
      if (w.shift) {
        F shift = f_load(w.shift + scales[b] + g * LANES);
        QK_UNROLL
        for (int m = 0; m < MR; m++) total[m][b] = f_fma(shift, f_set1(sums[(row + m) * groups + g]), total[m][b]);
      }
    }
  }
  float values[LANES];
  for (int b = 0; b < NB && p + b < p1; b++)
    QK_UNROLL
    for (int m = 0; m < MR; m++) {
      f_store(values, total[m][b]);
      put(out, w.n, row + m, (p + b) * LANES, values, LANES);
    }
}

template <int B, int J>
QK_INLINE void decode(I v, F s, F shift, bool shifted, float* to) {
  F code = Code<B, J>::value(v);
  f_store(to + Code<B, J>::at * WIDTH, shifted ? f_fma(code, s, shift) : f_mul(code, s));
  if constexpr (J + 1 < 32 / B) decode<B, J + 1>(v, s, shift, shifted, to);
}

// values of panel p, inputs k0 to k1, as [k1 - k0][WIDTH], of which this fills 16 columns
template <int B>
static void decode_stretch(const Weight& w, int64_t p, int64_t k0, int64_t k1, float* to) {
  constexpr int64_t STEP = 32 / B;
  const int64_t first = p * (w.k / w.group) * LANES;
  const uint8_t* codes = w.codes + p * w.panel_bytes() + k0 / STEP * 64;
  for (int64_t k = k0; k < k1;) {
    int64_t g = k / w.group, end = least(k1, (g + 1) * w.group);
    F s = scale_at(w, first + g * LANES), shift = w.shift ? f_load(w.shift + first + g * LANES) : f_zero();
    for (; k < end; k += STEP, codes += 64, to += STEP * WIDTH) decode<B, 0>(i_load(codes), s, shift, w.shift != nullptr, to);
  }
}

template <int MR>
static void float_tile(const float* x, int64_t stride, const float* values, int64_t count, float* c) {
  F sum[MR][QK_NB];
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) sum[m][b] = f_load(c + m * WIDTH + b * LANES);
  for (int64_t k = 0; k < count; k++, values += WIDTH) {
    F v[QK_NB];
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) v[b] = f_load(values + b * LANES);
    QK_UNROLL
    for (int m = 0; m < MR; m++) {
      F a = f_set1(x[m * stride + k]);
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) sum[m][b] = f_fma(v[b], a, sum[m][b]);
    }
  }
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) f_store(c + m * WIDTH + b * LANES, sum[m][b]);
}

template <int MR>
QK_INLINE void float_tiles(int64_t rows, const float* x, int64_t stride, const float* values, int64_t count, float* c) {
  if (rows == MR) return float_tile<MR>(x, stride, values, count, c);
  if constexpr (MR > 1) float_tiles<MR - 1>(rows, x, stride, values, count, c);
}

template <int B>
static void float_buffered(const Weight& w, const float* x, int64_t t, int64_t p, int64_t p1, Output out) {
  alignas(64) float values[STRETCH * WIDTH], c[MROWS * WIDTH];
  for (int64_t m0 = 0; m0 < t; m0 += MROWS) {
    const int64_t rows = least(MROWS, t - m0);
    for (int64_t i = 0; i < rows * WIDTH; i++) c[i] = 0;
    for (int64_t k = 0; k < w.k; k += STRETCH) {
      const int64_t count = least(STRETCH, w.k - k);
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) decode_stretch<B>(w, least(p + b, p1 - 1), k, k + count, values + b * LANES);
      for (int64_t m = 0; m < rows; m += QK_MR)
        float_tiles<QK_MR>(least(QK_MR, rows - m), x + (m0 + m) * w.k + k, w.k, values, count, c + m * WIDTH);
    }
    for (int64_t m = 0; m < rows; m++) put(out, w.n, m0 + m, p * LANES, c + m * WIDTH, least(WIDTH, (p1 - p) * LANES));
  }
}

template <int B>
static void float_rows(const Weight& w, const float* x, const float* sums, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (t > QK_DIRECT) {
    for (int64_t p = p0; p < p1; p += QK_NB) float_buffered<B>(w, x, t, p, p1, out);
    return;
  }
  for (int64_t row = 0; row < t;) {
    if (t - row >= 2) {
      for (int64_t p = p0; p < p1; p += QK_NB) float_direct<B, 2, QK_NB>(w, x, sums, row, p, p1, out);
      row += 2;
    } else {
      for (int64_t p = p0; p < p1; p += 2 * QK_NB) float_direct<B, 1, 2 * QK_NB>(w, x, sums, row, p, p1, out);
      row += 1;
    }
  }
}

static void float_linear(const Weight& w, const float* x, const float* sums, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (w.bits == 4) float_rows<4>(w, x, sums, t, p0, p1, out);
  else float_rows<8>(w, x, sums, t, p0, p1, out);
}

// int8 inputs -----------------------------------------------------------------------------------------------------------------------------

struct Inputs {
  const int8_t* codes;
  const float* scale;
  const int32_t* sums;  // [T, K / segment]
  int64_t segments;
};

QK_INLINE I inputs_at(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return i_set1(four);
}

template <int B, int MR, int NB>
static void int_direct(const Weight& w, const Inputs& x, int64_t row, int64_t p, int64_t p1, Output out) {
  constexpr int64_t STEP = 32 / B;
  constexpr int32_t ZERO = B == 4 ? 8 : 128;  // what the stored codes are raised by
  const int64_t groups = w.k / w.group, per_group = w.group / w.segment, steps = w.segment / STEP;
  // the same place of the panels that come next: their streams are new to the processor's own prefetcher
  const int64_t ahead = NB * w.panel_bytes();
  const uint8_t* codes[NB];
  int64_t scales[NB];
  QK_UNROLL
  for (int b = 0; b < NB; b++) {
    int64_t panel = least(p + b, p1 - 1);
    codes[b] = w.codes + panel * w.panel_bytes();
    scales[b] = panel * groups * LANES;
  }
  F total[MR][NB];
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < NB; b++) total[m][b] = f_zero();
  const int8_t* at = x.codes + row * w.k;
  const int32_t* sums = x.sums + row * x.segments;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t q = 0; q < per_group; q++, sums++) {
      I sum[MR][NB];
      QK_UNROLL
      for (int m = 0; m < MR; m++)
        QK_UNROLL
        for (int b = 0; b < NB; b++) sum[m][b] = i_set1(-ZERO * sums[m * x.segments]);
      for (int64_t i = 0; i < steps; i++, at += STEP)
        QK_UNROLL
        for (int b = 0; b < NB; b++) {
          I v = i_load(codes[b]);
          __builtin_prefetch(codes[b] + ahead, 0, 2);
          codes[b] += 64;
          if constexpr (B == 8) {
            QK_UNROLL
            for (int m = 0; m < MR; m++) sum[m][b] = dot4<B>(sum[m][b], v, inputs_at(at + m * w.k));
          } else {
            I low = low4(v), high = high4(v);
            QK_UNROLL
            for (int m = 0; m < MR; m++) {
              sum[m][b] = dot4<B>(sum[m][b], low, inputs_at(at + m * w.k));
              sum[m][b] = dot4<B>(sum[m][b], high, inputs_at(at + m * w.k + 4));
            }
          }
        }
      QK_UNROLL
      for (int b = 0; b < NB; b++) {
        F s = scale_at(w, scales[b] + g * LANES);
        QK_UNROLL
        for (int m = 0; m < MR; m++) total[m][b] = f_fma(i_to_f(sum[m][b]), s, total[m][b]);
        if (w.shift) {
          F shift = f_load(w.shift + scales[b] + g * LANES);
          QK_UNROLL
          for (int m = 0; m < MR; m++) total[m][b] = f_fma(shift, f_set1((float)sums[m * x.segments]), total[m][b]);
        }
      }
    }
  float values[LANES];
  for (int b = 0; b < NB && p + b < p1; b++)
    QK_UNROLL
    for (int m = 0; m < MR; m++) {
      f_store(values, f_mul(total[m][b], f_set1(x.scale[row + m])));
      put(out, w.n, row + m, (p + b) * LANES, values, LANES);
    }
}

// One segment: count inputs of MR rows with QK_NB panels of unpacked bytes, scaled and added to c.  Not inlined: what the caller holds in registers
// would push sums out of them.
template <int B, int MR>
static __attribute__((noinline)) void int_tile(const int8_t* x, int64_t stride, const int32_t* sums, int64_t segments, const uint8_t* const* bytes,
                                               int64_t count, const float* s, const float* shift, float* c) {
  constexpr int32_t ZERO = B == 4 ? 8 : 128;
  I sum[MR][QK_NB];
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) sum[m][b] = i_set1(-ZERO * sums[m * segments]);
  const uint8_t* at[QK_NB];
  QK_UNROLL
  for (int b = 0; b < QK_NB; b++) at[b] = bytes[b];
  for (int64_t k = 0; k < count; k += 4) {
    I v[QK_NB];
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) v[b] = i_load(at[b] + k * LANES);
    QK_UNROLL
    for (int m = 0; m < MR; m++) {
      I a = inputs_at(x + m * stride + k);
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) sum[m][b] = dot4<B>(sum[m][b], v[b], a);
    }
  }
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) {
      float* to = c + m * WIDTH + b * LANES;
      F total = f_fma(i_to_f(sum[m][b]), f_load(s + b * LANES), f_load(to));
      if (shift) total = f_fma(f_load(shift + b * LANES), f_set1((float)sums[m * segments]), total);
      f_store(to, total);
    }
}

template <int B, int MR>
QK_INLINE void int_tiles(int64_t rows, const int8_t* x, int64_t stride, const int32_t* sums, int64_t segments, const uint8_t* const* bytes,
                         int64_t count, const float* s, const float* shift, float* c) {
  if (rows == MR) return int_tile<B, MR>(x, stride, sums, segments, bytes, count, s, shift, c);
  if constexpr (MR > 1) int_tiles<B, MR - 1>(rows, x, stride, sums, segments, bytes, count, s, shift, c);
}

template <int B>
static void int_buffered(const Weight& w, const Inputs& x, int64_t t, int64_t p, int64_t p1, Output out) {
  alignas(64) uint8_t unpacked[QK_NB][SEGMENT * LANES];
  alignas(64) float c[MROWS * WIDTH];
  const int64_t groups = w.k / w.group;
  for (int64_t m0 = 0; m0 < t; m0 += MROWS) {
    const int64_t rows = least(MROWS, t - m0);
    for (int64_t i = 0; i < rows * WIDTH; i++) c[i] = 0;
    for (int64_t segment = 0; segment < x.segments; segment++) {
      const int64_t k = segment * w.segment, g = k / w.group;
      const uint8_t* bytes[QK_NB];
      alignas(64) float s[WIDTH], shift[WIDTH];
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) {
        const int64_t panel = least(p + b, p1 - 1), index = (panel * groups + g) * LANES;
        bytes[b] = w.codes + panel * w.panel_bytes() + k * LANES * B / 8;
        f_store(s + b * LANES, scale_at(w, index));
        if (w.shift) f_store(shift + b * LANES, f_load(w.shift + index));
        if constexpr (B == 4) {
          for (int64_t i = 0; i < w.segment / 8; i++) {
            I v = i_load(bytes[b] + i * 64);
            i_store(unpacked[b] + i * 128, low4(v));
            i_store(unpacked[b] + i * 128 + 64, high4(v));
          }
          bytes[b] = unpacked[b];
        }
      }
      for (int64_t m = 0; m < rows; m += QK_MR)
        int_tiles<B, QK_MR>(least(QK_MR, rows - m), x.codes + (m0 + m) * w.k + k, w.k, x.sums + (m0 + m) * x.segments + segment, x.segments, bytes,
                            w.segment, s, w.shift ? shift : nullptr, c + m * WIDTH);
    }
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t i = 0; i < WIDTH; i++) c[m * WIDTH + i] *= x.scale[m0 + m];
      put(out, w.n, m0 + m, p * LANES, c + m * WIDTH, least(WIDTH, (p1 - p) * LANES));
    }
  }
}

template <int B>
static void int_rows(const Weight& w, const Inputs& x, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (t > QK_DIRECT) {
    for (int64_t p = p0; p < p1; p += QK_NB) int_buffered<B>(w, x, t, p, p1, out);
    return;
  }
  for (int64_t row = 0; row < t;) {
    if (t - row >= 2) {
      for (int64_t p = p0; p < p1; p += QK_NB) int_direct<B, 2, QK_NB>(w, x, row, p, p1, out);
      row += 2;
    } else {
      for (int64_t p = p0; p < p1; p += 2 * QK_NB) int_direct<B, 1, 2 * QK_NB>(w, x, row, p, p1, out);
      row += 1;
    }
  }
}

static void int_linear(const Weight& w, const int8_t* codes, const float* scale, const int32_t* sums, int64_t t, int64_t p0, int64_t p1, Output out) {
  const Inputs x = {codes, scale, sums, w.k / w.segment};
  if (w.bits == 4) int_rows<4>(w, x, t, p0, p1, out);
  else int_rows<8>(w, x, t, p0, p1, out);
}

// inputs ----------------------------------------------------------------------------------------------------------------------------------

static void to_float(const void* x, int type, int64_t count, float* out) {
  const uint16_t* h = (const uint16_t*)x;
  int64_t i = 0;
  if (type == FLOAT32) {
    for (; i < count; i++) out[i] = ((const float*)x)[i];
  } else if (type == FLOAT16) {
    for (; i + LANES <= count; i += LANES) f_store(out + i, f_from_half(h + i));
    for (; i < count; i++) out[i] = half_to_float(h[i]);
  } else {
    for (; i + LANES <= count; i += LANES) f_store(out + i, f_from_bfloat(h + i));
    for (; i < count; i++) out[i] = bfloat_to_float(h[i]);
  }
}

// One row, [K] float: codes = round(x / scale) to even, as torch rounds.
static bool quantize_row(const float* x, int64_t k, int64_t segment, float static_scale, int8_t* codes, float* scale, int32_t* sums) {
  // as integers, positive floats are ordered like their values, and negative ones, unsigned, by their size: both ends without float comparisons,
  // which compilers do not turn into vectors
  int32_t top = 0;
  uint32_t bottom = 0;
  for (int64_t i = 0; i < k; i++) {
    uint32_t u;
    __builtin_memcpy(&u, x + i, 4);
    top = (int32_t)u > top ? (int32_t)u : top;
    bottom = u > bottom ? u : bottom;
  }
  const uint32_t size = bottom & 0x80000000u ? bottom & 0x7fffffffu : 0;
  if (top >= 0x7f800000 || size >= 0x7f800000u) return false;
  const float high = float_of((uint32_t)top) / 127.0f, low = float_of(size) / 128.0f;
  float s = high > low ? high : low;
  if (static_scale > 0) s = static_scale;
  else if (top == 0 && size == 0) s = 1;
  *scale = s;
  const float divisor = s == 0 ? 1 : s, keep = s == 0 ? 0.0f : 1.0f;
  for (int64_t i = 0; i < k; i++) {
    float z = x[i] / divisor * keep;
    z = z < -128.0f ? -128.0f : z;
    z = z > 127.0f ? 127.0f : z;
    // 1.5 * 2^23: its neighbours are whole numbers, so the sum rounds to one of them, ties to even
    codes[i] = (int8_t)(int32_t)(bits_of(z + 12582912.0f) - bits_of(12582912.0f));
  }
  for (int64_t q = 0; q < k / segment; q++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < segment; i++) sum += codes[q * segment + i];
    sums[q] = sum;
  }
  return true;
}

static bool quantize(const void* x, int type, int64_t k, int64_t segment, float static_scale, int8_t* codes, float* scale, int32_t* sums, float* scratch) {
  if (type == FLOAT32) return quantize_row((const float*)x, k, segment, static_scale, codes, scale, sums);
  to_float(x, type, k, scratch);
  return quantize_row(scratch, k, segment, static_scale, codes, scale, sums);
}

}  // namespace
}  // namespace qk
