// Inputs on their way to the kernels.
#include "common.inl"

namespace qk {
namespace {

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
static bool quantize(const float* x, int64_t k, int64_t segment, float static_scale, int8_t* codes, float* scale, int32_t* sums) {
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

// One row, [K] float, to three digits an input.
static bool to_digits(const float* x, int64_t k, int64_t segment, int8_t* codes, float* steps, int32_t* sums) {
  constexpr float MOST = 8355711;  // 127 * (1 + 256 + 65536)
  int8_t *low = codes, *middle = codes + k, *high = codes + 2 * k;
  for (int64_t q = 0; q < k / segment; q++, x += segment, low += segment, middle += segment, high += segment, sums += 3) {
    int32_t top = 0;  // positive floats are ordered like their bits
    for (int64_t i = 0; i < segment; i++) {
      int32_t u;
      __builtin_memcpy(&u, x + i, 4);
      u &= 0x7fffffff;
      top = u > top ? u : top;
    }
    if (top >= 0x7f800000) return false;
    // the smallest power of two of which the largest input has at most MOST, and 2^-126 at least, whose inverse is finite
    int32_t exponent = (top >> 23) - 22;
    exponent = exponent < 1 ? 1 : exponent;
    float step = float_of((uint32_t)exponent << 23);
    if (float_of((uint32_t)top) > MOST * step) step *= 2;
    const float inverse = 1 / step;
    int32_t sum[3] = {};
    for (int64_t i = 0; i < segment; i++) {
      const int32_t value = (int32_t)__builtin_rintf(x[i] * inverse);
      const int32_t d0 = (int8_t)value, rest = (value - d0) >> 8, d1 = (int8_t)rest, d2 = (rest - d1) >> 8;
      low[i] = (int8_t)d0, middle[i] = (int8_t)d1, high[i] = (int8_t)d2;
      sum[0] += d0, sum[1] += d1, sum[2] += d2;
    }
    steps[q] = step;
    for (int d = 0; d < 3; d++) sums[d] = sum[d];
  }
  return true;
}

}  // namespace
}  // namespace qk
