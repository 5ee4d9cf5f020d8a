#include "panels.h"
const qk::Ops* qk::amx_ops() { return nullptr; }
const qk::Ops* qk::amx_emulated_ops() { return nullptr; }
