// Any processor.
#include "numbers.h"
#include "panels.h"
#define QK_NB 1
#define QK_MR 4
#define QK_IMR 4
#define QK_DIRECT 4
namespace qk {
namespace {
#include "isa_portable.h"
}
}  // namespace qk
#include "inputs.inl"
#include "linear_float.inl"
#include "linear_int.inl"

const qk::Ops* qk::portable_ops() {
  static const Ops ops = {float_linear, int_linear<1>, nullptr, together<1>, nullptr, quantize, nullptr, to_float};
  return &ops;
}
