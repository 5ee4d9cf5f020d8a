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
#define QK_MR 12
#define QK_DIRECT 4
namespace qk {
namespace {
#include "isa_avx512.h"
}
}  // namespace qk
#include "linear.inl"

const qk::Ops* qk::avx512_ops() {
  static const Ops ops = {float_linear, int_linear, quantize, to_float};
  static const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  return here ? &ops : nullptr;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const qk::Ops* qk::avx512_ops() { return nullptr; }
#endif
