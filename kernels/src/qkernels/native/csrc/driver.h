// One call: inputs are converted or quantized, then every panel is multiplied, by the threads of torch's own OpenMP pool.
#pragma once
#include "panels.h"

namespace qk {

enum Status : int { OK = 0, NOT_FINITE = 1, NO_MEMORY = 2 };

// Threads come from the OpenMP library that is already loaded under `path`, as a dependency of it; false where it has none we can call.
bool use_openmp_of(const char* path);

struct Call {
  const Ops* ops;
  Weight weight;
  const void* x;  // [T, K]
  int x_type;
  int64_t t;
  Output out;
  int threads;
  float static_scale;  // of int8 inputs; 0: one a row
};

Status float_call(Call&);
Status int8_call(Call&);
Status quantize_call(const Ops*, const void* x, int type, int64_t t, int64_t k, float static_scale, int8_t* codes, float* scale, int threads);

}  // namespace qk
