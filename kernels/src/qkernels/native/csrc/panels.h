// The shared vocabulary of the native kernels: how a weight lies in memory, and what each instruction set offers.
//
// A weight [N, K] is cut into panels of 16 output channels, one per lane of a vector.  32 bits of a panel hold consecutive inputs of one channel:
//
//   8 bits:  4 inputs, codes + 128 as unsigned bytes                         panel: [K/4][16 channels][4 bytes]
//   4 bits:  8 inputs, codes + 8;  byte b: low nibble = input b,             panel: [K/8][16 channels][4 bytes]
//            high nibble = input b + 4
//
// so one 64-byte load serves 16 channels, sums need no horizontal step, and the unpacked bytes are at once the operand of VNNI's dot product and
// the rows of an AMX tile.  Scales (and float32 shifts) lie as [panel][K/G][16].  A weight's value is code * scale + shift.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qk {

constexpr int64_t LANES = 16;     // channels of a panel
constexpr int64_t SEGMENT = 512;  // at most so many products are added as integers before they are scaled: 512 * 255 * 128 < 2^31
constexpr int64_t MROWS = 192;    // rows whose sums are alive at one time

enum Type : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

struct Weight {
  const uint8_t* codes;
  const void* scale;
  const float* shift;  // null: none
  int64_t n, k, group, segment;
  int bits, scale_type;
  int64_t panels() const { return (n + LANES - 1) / LANES; }
  int64_t panel_bytes() const { return LANES * k * bits / 8; }
};

struct Output {
  void* y;  // [T, N]
  int type;
};

// Inputs as integers.  D = 1: int8 codes with one scale a row.  D = 3: digits of 24-bit numbers with one step a segment,
//
//   x = step * (digit0 + 256 * digit1 + 65536 * digit2), digits from -128 to 127, step a power of two
//
// so that float inputs too are multiplied as bytes.  A segment's largest input takes all 24 bits, or 23: the others are off by at most 2^-23 of it.
struct Inputs {
  const int8_t* codes;    // [T / R, K/4, R, D, 4]: R rows lie together (the last ones are fewer)
  const float* scale;     // [T], of D = 1
  const float* steps;     // [T, K / segment], of D = 3
  const int32_t* starts;  // [T, K / segment, D], where sums start: -8 (4 bits) or -128 (8 bits), what stored codes are raised by, times the inputs' sum
};

// What one instruction set offers.  Panels p0 to p1 of the output are written.
struct Ops {
  // x: [T, K];  sums: [T, K / group], of the inputs of each group; read only where there are shifts
  void (*float_linear)(const Weight&, const float* x, const float* sums, int64_t t, int64_t p0, int64_t p1, Output);
  void (*int_linear)(const Weight&, const Inputs&, int64_t t, int64_t p0, int64_t p1, Output);
  void (*digits_linear)(const Weight&, const Inputs&, int64_t t, int64_t p0, int64_t p1, Output);  // null: float_linear is faster
  // R of `Inputs`, of t rows
  int64_t (*int_together)(int64_t t);
  int64_t (*digits_together)(int64_t t);
  // One row.  static_scale 0: one scale that lets both ends of the row fit.  sums: [K / segment], of the codes.  false: a value is NaN or infinite
  bool (*quantize)(const float* x, int64_t k, int64_t segment, float static_scale, int8_t* codes, float* scale, int32_t* sums);
  // One row.  codes: [3, K];  steps: [K / segment];  sums: [K / segment, 3], of the digits.  false: a value is NaN or infinite
  bool (*to_digits)(const float* x, int64_t k, int64_t segment, int8_t* codes, float* steps, int32_t* sums);
  void (*to_float)(const void* x, int type, int64_t count, float* out);
};

const Ops* avx512_ops();  // null where this build or this processor has none
const Ops* avx2_ops();
const Ops* portable_ops();
const Ops* amx_ops();
const Ops* amx_emulated_ops();

}  // namespace qk
