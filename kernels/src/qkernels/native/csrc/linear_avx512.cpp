// AVX-512 with VNNI: Ice Lake, Zen 4 and later.
#include "panels.h"
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define QK_NB 2
#define QK_IMR 6
#define QK_DIRECT 4
namespace qk {
namespace {
#include "isa_avx512.h"
}
}  // namespace qk
#include "inputs.inl"
#include "linear_int.inl"

const qk::Ops* qk::avx512_ops() {
  // float inputs are multiplied as digits; those that have none, NaN and infinity, are left to AVX2
  static const bool here = avx2_ops() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  static const Ops ops = {here ? avx2_ops()->float_linear : nullptr, int_linear<1>, int_linear<3>, together<1>, together<3>, quantize, to_digits, to_float};
  return here ? &ops : nullptr;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const qk::Ops* qk::avx512_ops() { return nullptr; }
#endif
