// AMX: Sapphire Rapids and later.
#include "numbers.h"
#include "panels.h"
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace {
// as the _tile_… intrinsics, which GCC has as macros that cannot take a template's number
inline void tile_configure(const void* config) { __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }
template <int T> inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// Intel's order is the reverse of AT&T's: tdpbsud sums, inputs (signed), weights (unsigned)
template <int C, int A, int B> inline void tile_dot() { __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }
inline const qk::Ops* small_ops() { return qk::avx512_ops(); }
}  // namespace
#include "linear_amx.inl"

namespace {
// the processor has tiles, and the kernel lets this process use them (they are many bytes of state, so they are asked for)
bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  return tiles && int8 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
}  // namespace

const qk::Ops* qk::amx_ops() {
  static const bool here = qk::avx512_ops() && may_use_tiles();
  static const Ops ops = here ? with_tiles(avx512_ops()) : Ops{};
  return here ? &ops : nullptr;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const qk::Ops* qk::amx_ops() { return nullptr; }
#endif
