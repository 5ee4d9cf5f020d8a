// Inputs as integers, D of them for each: one int8 code, or three digits of a 24-bit number (see `Inputs` in panels.h).
#include "common.inl"

namespace qk {
namespace {

QK_INLINE I inputs_at(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return i_set1(four);
}

QK_INLINE I start_at(const int32_t* p) { return i_set1(*p); }

// total + scale * what the sums of one segment stand for; starts: those of this row and segment, [D]
template <int B, int D>
QK_INLINE F scaled(F total, const I (&sum)[D], F s, const float* shift, const int32_t* starts, const float* step) {
  constexpr float UNRAISED = B == 4 ? -1.0f / 8 : -1.0f / 128;  // a start is the sum of the inputs, times what codes are raised by
  if constexpr (D == 1) {
    total = f_fma(i_to_f(sum[0]), s, total);
    if (shift) total = f_fma(f_load(shift), f_set1((float)starts[0] * UNRAISED), total);
  } else {
    const F base = f_set1(256), value = f_fma(f_fma(i_to_f(sum[2]), base, i_to_f(sum[1])), base, i_to_f(sum[0]));
    total = f_fma(value, f_mul(s, f_set1(*step)), total);
    if (shift) {
      const double inputs = ((double)starts[2] * 256 + starts[1]) * 256 + starts[0];
      total = f_fma(f_load(shift), f_set1((float)(inputs * UNRAISED * *step)), total);
    }
  }
  return total;
}

// MR rows from `row`, NB panels from p; those beyond p1 are computed twice and not written
template <int B, int D, int MR, int NB>
static void int_direct(const Weight& w, const Inputs& x, int64_t row, int64_t p, int64_t p1, Output out) {
  constexpr int64_t STEP = 32 / B, BLOCKS = STEP / 4;
  const int64_t groups = w.k / w.group, per_group = w.group / w.segment, steps = w.segment / STEP, segments = w.k / w.segment;
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
  const int8_t* at = x.codes + row * w.k * D;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t q = g * per_group; q < (g + 1) * per_group; q++) {
      const int32_t* starts = x.starts + (row * segments + q) * D;
      I sum[MR][NB][D];
      QK_UNROLL
      for (int m = 0; m < MR; m++)
        QK_UNROLL
        for (int b = 0; b < NB; b++)
          QK_UNROLL
          for (int d = 0; d < D; d++) sum[m][b][d] = start_at(starts + m * segments * D + d);
      for (int64_t i = 0; i < steps; i++, at += STEP * D) {
        I a[MR][BLOCKS][D];
        QK_UNROLL
        for (int m = 0; m < MR; m++)
          QK_UNROLL
          for (int j = 0; j < BLOCKS; j++)
            QK_UNROLL
            for (int d = 0; d < D; d++) a[m][j][d] = inputs_at(at + m * w.k * D + (j * D + d) * 4);
        QK_UNROLL
        for (int b = 0; b < NB; b++) {
          I v[2] = {i_load(codes[b])};
          __builtin_prefetch(codes[b] + ahead, 0, 2);
          codes[b] += 64;
          if constexpr (B == 4) v[1] = high4(v[0]), v[0] = low4(v[0]);
          QK_UNROLL
          for (int m = 0; m < MR; m++)
            QK_UNROLL
            for (int j = 0; j < BLOCKS; j++)
              QK_UNROLL
              for (int d = 0; d < D; d++) sum[m][b][d] = dot4<B>(sum[m][b][d], v[j], a[m][j][d]);
        }
      }
      QK_UNROLL
      for (int b = 0; b < NB; b++) {
        const int64_t index = scales[b] + g * LANES;
        const F s = scale_at(w, index);
        QK_UNROLL
        for (int m = 0; m < MR; m++) {
          const int64_t own = (row + m) * segments + q;
          total[m][b] = scaled<B, D>(total[m][b], sum[m][b], s, w.shift ? w.shift + index : nullptr, x.starts + own * D, x.steps + own);
        }
      }
    }
  alignas(64) float values[LANES];
  for (int b = 0; b < NB && p + b < p1; b++)
    QK_UNROLL
    for (int m = 0; m < MR; m++) {
      f_store(values, D == 1 ? f_mul(total[m][b], f_set1(x.scale[row + m])) : total[m][b]);
      put(out, w.n, row + m, (p + b) * LANES, values, LANES);
    }
}

// Some segments of MR rows with QK_NB panels of unpacked bytes, added to c; totals stay in registers from segment to segment.
//
// x: [K/4, MR, D, 4];  bytes: of each panel;  s, shift: [segment, WIDTH];  starts, steps: of the first row and segment
template <int B, int D, int MR>
static __attribute__((noinline)) void int_tile(const Weight& w, const int8_t* x, const int32_t* starts, const float* steps, const uint8_t* const* bytes,
                                               int64_t count, const float* s, const float* shift, float* c) {
  const int64_t segments = w.k / w.segment;
  F total[MR][QK_NB];
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) total[m][b] = f_load(c + m * WIDTH + b * LANES);
  const uint8_t* at[QK_NB];
  QK_UNROLL
  for (int b = 0; b < QK_NB; b++) at[b] = bytes[b];
  for (int64_t q = 0; q < count; q++) {
    I sum[MR][QK_NB][D];
    QK_UNROLL
    for (int m = 0; m < MR; m++)
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++)
        QK_UNROLL
        for (int d = 0; d < D; d++) sum[m][b][d] = start_at(starts + (m * segments + q) * D + d);
    for (int64_t k = 0; k < w.segment; k += 4, x += 4 * MR * D) {
      I v[QK_NB];
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) v[b] = i_load(at[b]), at[b] += 64;
      QK_UNROLL
      for (int m = 0; m < MR; m++)
        QK_UNROLL
        for (int d = 0; d < D; d++) {
          I a = inputs_at(x + (m * D + d) * 4);
          QK_UNROLL
          for (int b = 0; b < QK_NB; b++) sum[m][b][d] = dot4<B>(sum[m][b][d], v[b], a);
        }
    }
    QK_UNROLL
    for (int m = 0; m < MR; m++)
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++)
        total[m][b] = scaled<B, D>(total[m][b], sum[m][b], f_load(s + q * WIDTH + b * LANES), shift ? shift + q * WIDTH + b * LANES : nullptr,
                                   starts + (m * segments + q) * D, steps + m * segments + q);
  }
  QK_UNROLL
  for (int m = 0; m < MR; m++)
    QK_UNROLL
    for (int b = 0; b < QK_NB; b++) f_store(c + m * WIDTH + b * LANES, total[m][b]);
}

template <int B, int D, int MR>
QK_INLINE void int_tiles(int64_t rows, const Weight& w, const int8_t* x, const int32_t* starts, const float* steps, const uint8_t* const* bytes,
                         int64_t count, const float* s, const float* shift, float* c) {
  if (rows == MR) return int_tile<B, D, MR>(w, x, starts, steps, bytes, count, s, shift, c);
  if constexpr (MR > 1) int_tiles<B, D, MR - 1>(rows, w, x, starts, steps, bytes, count, s, shift, c);
}

template <int D> constexpr int64_t TOGETHER = D == 1 ? QK_IMR : (QK_IMR + 1) / 2;  // rows of a tile

template <int B, int D>
static void int_buffered(const Weight& w, const Inputs& x, int64_t t, int64_t p, int64_t p1, Output out) {
  constexpr int64_t MR = TOGETHER<D>, ROWS = MROWS / MR * MR, MOST = SEGMENT / (32 / B);
  alignas(64) uint8_t unpacked[QK_NB][SEGMENT * LANES];
  alignas(64) float c[MROWS * WIDTH], s[MOST * WIDTH], shift[MOST * WIDTH];
  const int64_t groups = w.k / w.group, per_group = w.group / w.segment, segments = w.k / w.segment;
  const int64_t stretch = SEGMENT / w.segment;  // segments that are unpacked at one time
  for (int64_t m0 = 0; m0 < t; m0 += ROWS) {
    const int64_t rows = least(ROWS, t - m0);
    for (int64_t i = 0; i < rows * WIDTH; i++) c[i] = 0;
    for (int64_t q0 = 0; q0 < segments; q0 += stretch) {
      const int64_t count = least(stretch, segments - q0), k = q0 * w.segment;
      const uint8_t* bytes[QK_NB];
      QK_UNROLL
      for (int b = 0; b < QK_NB; b++) {
        const int64_t panel = least(p + b, p1 - 1);
        for (int64_t q = 0; q < count; q++) {
          const int64_t index = (panel * groups + (q0 + q) / per_group) * LANES;
          f_store(s + q * WIDTH + b * LANES, scale_at(w, index));
          if (w.shift) f_store(shift + q * WIDTH + b * LANES, f_load(w.shift + index));
        }
        bytes[b] = w.codes + panel * w.panel_bytes() + k * LANES * B / 8;
        if constexpr (B == 4) {
          for (int64_t i = 0; i < count * w.segment / 8; i++) {
            I v = i_load(bytes[b] + i * 64);
            i_store(unpacked[b] + i * 128, low4(v));
            i_store(unpacked[b] + i * 128 + 64, high4(v));
          }
          bytes[b] = unpacked[b];
        }
      }
      for (int64_t m = 0; m < rows; m += MR) {
        const int64_t row = m0 + m, here = least(MR, rows - m), own = row * segments + q0;
        int_tiles<B, D, MR>(here, w, x.codes + (row * w.k + here * k) * D, x.starts + own * D, x.steps + own, bytes, count, s,
                            w.shift ? shift : nullptr, c + m * WIDTH);
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      if constexpr (D == 1)
        for (int64_t i = 0; i < WIDTH; i++) c[m * WIDTH + i] *= x.scale[m0 + m];
      put(out, w.n, m0 + m, p * LANES, c + m * WIDTH, least(WIDTH, (p1 - p) * LANES));
    }
  }
}

template <int B, int D>
static void int_rows(const Weight& w, const Inputs& x, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (t > QK_DIRECT) {
    for (int64_t p = p0; p < p1; p += QK_NB) int_buffered<B, D>(w, x, t, p, p1, out);
    return;
  }
  for (int64_t row = 0; row < t;) {
    if (t - row >= 2) {
      for (int64_t p = p0; p < p1; p += QK_NB) int_direct<B, D, 2, QK_NB>(w, x, row, p, p1, out);
      row += 2;
    } else {
      for (int64_t p = p0; p < p1; p += 2 * QK_NB) int_direct<B, D, 1, 2 * QK_NB>(w, x, row, p, p1, out);
      row += 1;
    }
  }
}

template <int D>
static void int_linear(const Weight& w, const Inputs& x, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (w.bits == 4) int_rows<4, D>(w, x, t, p0, p1, out);
  else int_rows<8, D>(w, x, t, p0, p1, out);
}

// rows of inputs that lie together, of t rows in all
template <int D>
static int64_t together(int64_t t) { return t > QK_DIRECT ? TOGETHER<D> : 1; }

}  // namespace
}  // namespace qk
