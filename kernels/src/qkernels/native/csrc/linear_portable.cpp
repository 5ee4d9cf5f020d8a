// Any processor.
#include "numbers.h"
#include "panels.h"
#define QK_NB 1
#define QK_MR 4
#define QK_DIRECT 2
namespace qk {
namespace {
#include "isa_portable.h"
}
}  // namespace qk
#include "linear.inl"

const qk::Ops* qk::portable_ops() {
  static const Ops ops = {float_linear, int_linear, quantize, to_float};
  return &ops;
}
