// int8 inputs by tiles of 16 × 64 bytes.  The rows of an unpacked panel are as a tile wants them: 16 channels × 4 inputs in 64 bytes, 16 such rows are
// 64 inputs.  Few rows, and float inputs, are left to AVX-512.
//
// The including file gives tile_configure, tile_zero<T>, tile_load<T>, tile_store<T>, tile_dot<C, A, B> (signed A times unsigned B), tile_release.
#include "panels.h"

namespace qk {
namespace {

constexpr int64_t TILE = 16;  // rows of a tile

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// the longest stretch of a segment that fills a tile's 64 bytes, without a rest
int64_t tile_inputs(int64_t segment) {
  int64_t k = 64;
  while (segment % k) k -= 4;
  return k;
}

// tiles: 0 … 3 sums of two blocks of rows × two panels, 4 and 5 inputs, 6 and 7 weights
void configure(int64_t inputs) {
  TileConfig config;
  for (int i = 0; i < 4; i++) config.rows[i] = TILE, config.bytes[i] = 64;
  for (int i = 4; i < 6; i++) config.rows[i] = TILE, config.bytes[i] = (uint16_t)inputs;
  for (int i = 6; i < 8; i++) config.rows[i] = (uint8_t)(inputs / 4), config.bytes[i] = 64;
  tile_configure(&config);
}

float scale_of(const Weight& w, int64_t index) {
  if (w.scale_type == FLOAT32) return ((const float*)w.scale)[index];
  uint16_t h = ((const uint16_t*)w.scale)[index];
  return w.scale_type == FLOAT16 ? half_to_float(h) : bfloat_to_float(h);
}

// 32 rows from m0 (those beyond t read the last one again, and are not written), panels p and p + 1
template <int B>
void tiles_of_panels(const Weight& w, const Inputs& inputs_of, int64_t t, int64_t p, int64_t p1, Output out) {
  constexpr float UNRAISED = B == 4 ? -1.0f / 8 : -1.0f / 128;  // a start is the sum of the inputs, times what codes are raised by
  const int8_t* x = inputs_of.codes;
  const int64_t segments = w.k / w.segment, groups = w.k / w.group, inputs = tile_inputs(w.segment);
  alignas(64) uint8_t unpacked[2][SEGMENT * LANES];
  alignas(64) int32_t products[4][TILE * LANES];
  alignas(64) float c[MROWS][2 * LANES];
  alignas(64) int8_t tail[2 * TILE * SEGMENT];
  for (int64_t m0 = 0; m0 < t; m0 += MROWS) {
    const int64_t rows = least_of(MROWS, t - m0);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i < 2 * LANES; i++) c[m][i] = 0;
    for (int64_t q = 0; q < segments; q++) {
      const int64_t k = q * w.segment, g = k / w.group;
      const uint8_t* bytes[2];
      float s[2 * LANES], shift[2 * LANES];
      for (int b = 0; b < 2; b++) {
        const int64_t panel = least_of(p + b, p1 - 1), index = (panel * groups + g) * LANES;
        bytes[b] = w.codes + panel * w.panel_bytes() + k * LANES * B / 8;
        for (int64_t i = 0; i < LANES; i++) {
          s[b * LANES + i] = scale_of(w, index + i);
          shift[b * LANES + i] = w.shift ? w.shift[index + i] : 0;
        }
        if (B == 4) {
          for (int64_t i = 0; i < w.segment / 8; i++)
            for (int64_t j = 0; j < 64; j++) {
              unpacked[b][i * 128 + j] = bytes[b][i * 64 + j] & 15;
              unpacked[b][i * 128 + 64 + j] = bytes[b][i * 64 + j] >> 4;
            }
          bytes[b] = unpacked[b];
        }
      }
      for (int64_t m = 0; m < rows; m += 2 * TILE) {
        const int64_t here = least_of(2 * TILE, rows - m);
        const int8_t* from = x + (m0 + m) * w.k + k;
        int64_t stride = w.k;
        if (here < 2 * TILE) {
          // the last rows, filled up, so that no tile reads beyond the matrix
          stride = w.segment;
          for (int64_t r = 0; r < 2 * TILE; r++) __builtin_memcpy(tail + r * stride, from + least_of(r, here - 1) * w.k, w.segment);
          from = tail;
        }
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t i = 0; i < w.segment; i += inputs) {
          tile_load<4>(from + i, stride);
          tile_load<5>(from + TILE * stride + i, stride);
          tile_load<6>(bytes[0] + i * LANES, 64);
          tile_load<7>(bytes[1] + i * LANES, 64);
          tile_dot<0, 4, 6>();
          tile_dot<1, 4, 7>();
          tile_dot<2, 5, 6>();
          tile_dot<3, 5, 7>();
        }
        tile_store<0>(products[0], 64);
        tile_store<1>(products[1], 64);
        tile_store<2>(products[2], 64);
        tile_store<3>(products[3], 64);
        for (int64_t r = 0; r < here; r++) {
          const int32_t start = inputs_of.starts[(m0 + m + r) * segments + q];
          for (int b = 0; b < 2; b++) {
            const int32_t* product = products[r / TILE * 2 + b] + r % TILE * LANES;
            float* to = c[m + r] + b * LANES;
            for (int64_t i = 0; i < LANES; i++)
              to[i] += s[b * LANES + i] * (float)(product[i] + start) + shift[b * LANES + i] * (float)start * UNRAISED;
          }
        }
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      const int64_t row = m0 + m, count = least_of(least_of(2, p1 - p) * LANES, w.n - p * LANES);
      for (int64_t i = 0; i < count; i++) {
        const int64_t at = row * w.n + p * LANES + i;
        const float y = c[m][i] * inputs_of.scale[row];
        if (out.type == FLOAT32) ((float*)out.y)[at] = y;
        else ((uint16_t*)out.y)[at] = out.type == FLOAT16 ? float_to_half(y) : float_to_bfloat(y);
      }
    }
  }
}

constexpr int64_t DIRECT = 4;  // rows for which AVX-512 reads the codes faster

void int_linear(const Weight& w, const Inputs& x, int64_t t, int64_t p0, int64_t p1, Output out) {
  if (t <= DIRECT) return small_ops()->int_linear(w, x, t, p0, p1, out);
  configure(tile_inputs(w.segment));
  for (int64_t p = p0; p < p1; p += 2) {
    if (w.bits == 4) tiles_of_panels<4>(w, x, t, p, p1, out);
    else tiles_of_panels<8>(w, x, t, p, p1, out);
  }
  tile_release();
}

int64_t int_together(int64_t) { return 1; }

// all of `small`, but for many rows of int8
Ops with_tiles(const Ops* small) {
  Ops ops = *small;
  ops.int_linear = int_linear, ops.int_together = int_together;
  return ops;
}

}  // namespace
}  // namespace qk
