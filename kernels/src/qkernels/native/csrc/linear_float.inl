// Inputs as floats; the weight is decoded to floats.
#include "common.inl"

namespace qk {
namespace {

constexpr int64_t STRETCH = 128;  // inputs that are decoded to floats at one time

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

}  // namespace
}  // namespace qk
