// What the tile instructions do, in plain C++: so that the layout and the loops of the AMX kernel are tested on processors that have none.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TILELOADD, TDPBSUD, TILESTORED.
#include "numbers.h"
#include "panels.h"

namespace {
struct Tiles {
  uint8_t rows[8];
  uint16_t bytes[8];
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

void tile_configure(const void* config) {
  const uint8_t* c = (const uint8_t*)config;
  for (int i = 0; i < 8; i++) {
    __builtin_memcpy(&tiles.bytes[i], c + 16 + 2 * i, 2);
    tiles.rows[i] = c[48 + i];
  }
}
void tile_release() {}
template <int T> void tile_zero() { __builtin_memset(tiles.data[T], 0, sizeof tiles.data[T]); }
template <int T> void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tiles.rows[T]; r++) __builtin_memcpy(tiles.data[T][r], (const char*)from + r * stride, tiles.bytes[T]);
}
template <int T> void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < tiles.rows[T]; r++) __builtin_memcpy((char*)to + r * stride, tiles.data[T][r], tiles.bytes[T]);
}
template <int C, int A, int B> void tile_dot() {
  for (int m = 0; m < tiles.rows[C]; m++)
    for (int k = 0; k < tiles.bytes[A] / 4; k++)
      for (int n = 0; n < tiles.bytes[C] / 4; n++) {
        int32_t sum;
        __builtin_memcpy(&sum, &tiles.data[C][m][4 * n], 4);
        for (int i = 0; i < 4; i++) sum += (int8_t)tiles.data[A][m][4 * k + i] * (int32_t)tiles.data[B][k][4 * n + i];
        __builtin_memcpy(&tiles.data[C][m][4 * n], &sum, 4);
      }
}
const qk::Ops* small_ops() { return qk::portable_ops(); }
}  // namespace
#include "linear_amx.inl"

const qk::Ops* qk::amx_emulated_ops() {
  static const Ops ops = with_tiles(portable_ops());
  return &ops;
}
