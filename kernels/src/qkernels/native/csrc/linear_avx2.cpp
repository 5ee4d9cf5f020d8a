// AVX2 with FMA: Haswell, Zen and later.
#include "panels.h"
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define QK_NB 1
#define QK_MR 6
#define QK_IMR 3
#define QK_DIRECT 3
namespace qk {
namespace {
#include "isa_avx2.h"
}
}  // namespace qk
#include "inputs.inl"
#include "linear_float.inl"
#include "linear_int.inl"

const qk::Ops* qk::avx2_ops() {
  static const Ops ops = {float_linear, int_linear<1>, nullptr, together<1>, nullptr, quantize, nullptr, to_float};
  static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &ops : nullptr;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const qk::Ops* qk::avx2_ops() { return nullptr; }
#endif
