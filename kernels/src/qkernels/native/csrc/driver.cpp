#include "driver.h"

#include <dlfcn.h>
#include <stdlib.h>

namespace qk {
namespace {

// GOMP_parallel(function, argument, threads, flags): GCC's binary interface, which LLVM's and Intel's libraries offer too
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;

constexpr int64_t ENOUGH = 1 << 17;  // products that are worth another thread: some microseconds

struct Loop {
  void (*body)(void*, int64_t, int64_t);
  void* argument;
  int64_t count, step, next;
};

// Each thread takes what is next, so it does not matter how many come.
void work(void* p) {
  Loop* loop = (Loop*)p;
  for (;;) {
    int64_t begin = __atomic_fetch_add(&loop->next, loop->step, __ATOMIC_RELAXED);
    if (begin >= loop->count) return;
    int64_t end = begin + loop->step;
    loop->body(loop->argument, begin, end < loop->count ? end : loop->count);
  }
}

// body(argument, begin, end) for pieces of 0 … count, a multiple of `grain` long
void over(int64_t count, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* argument) {
  if (threads <= 1 || !parallel) return body(argument, 0, count);
  // some pieces for each thread, as they may not be equally fast
  int64_t step = (count + 4 * threads - 1) / (4 * threads);
  step = (step + grain - 1) / grain * grain;
  Loop loop = {body, argument, count, step, 0};
  parallel(work, &loop, (unsigned)threads, 0);
}

int useful_threads(int threads, int64_t products) {
  int64_t most = products / ENOUGH;
  return most < 1 ? 1 : most < threads ? (int)most : threads;
}

int64_t segment_of(int64_t group, int bits) {
  const int64_t step = 32 / bits;
  if (group <= SEGMENT) return group;
  for (int64_t s = SEGMENT / step * step; s > step; s -= step)
    if (group % s == 0) return s;
  return step;
}

struct Memory {
  void* p;
  explicit Memory(size_t bytes) : p(malloc(bytes ? bytes : 1)) {}
  ~Memory() { free(p); }
  Memory(const Memory&) = delete;
};

struct FloatJob {
  Call& call;
  const float* x;
  float* converted;
  float* sums;
};

void convert_rows(void* p, int64_t begin, int64_t end) {
  FloatJob& job = *(FloatJob*)p;
  const int64_t k = job.call.weight.k, group = job.call.weight.group;
  for (int64_t row = begin; row < end; row++) {
    if (job.converted) job.call.ops->to_float((const char*)job.call.x + row * k * 2, job.call.x_type, k, job.converted + row * k);
    if (!job.sums) continue;
    for (int64_t g = 0; g < k / group; g++) {
      double sum = 0;
      for (int64_t i = 0; i < group; i++) sum += job.x[row * k + g * group + i];
      job.sums[row * (k / group) + g] = (float)sum;
    }
  }
}

void float_panels(void* p, int64_t begin, int64_t end) {
  FloatJob& job = *(FloatJob*)p;
  job.call.ops->float_linear(job.call.weight, job.x, job.sums, job.call.t, begin, end, job.call.out);
}

struct IntJob {
  Call& call;
  int digits;  // of an input: 1 or 3
  int64_t together;
  int8_t* codes;
  float* scale;
  float* steps;
  int32_t* starts;
  int finite;
};

// [digits, K] of row r of R → its place in [K/4, R, digits, 4]
void interleave(const int8_t* from, int64_t k, int digits, int64_t rows, int64_t r, int8_t* to) {
  const int64_t stride = rows * digits * 4;
  to += r * digits * 4;
  for (int d = 0; d < digits; d++, from += k, to += 4)
    for (int64_t j = 0; j < k / 4; j++) __builtin_memcpy(to + j * stride, from + 4 * j, 4);
}

// blocks of rows that lie together
void prepare_rows(void* p, int64_t begin, int64_t end) {
  IntJob& job = *(IntJob*)p;
  const Call& call = job.call;
  const Weight& w = call.weight;
  const int64_t segments = w.k / w.segment;
  const bool narrow = call.x_type != FLOAT32, alone = job.digits == 1 && job.together == 1;
  Memory floats(narrow ? sizeof(float) * w.k : 0), planes(alone ? 0 : w.k * job.digits);
  if (!floats.p || !planes.p) return __atomic_store_n(&job.finite, -1, __ATOMIC_RELAXED);
  for (int64_t row = begin * job.together; row < end * job.together && row < call.t; row++) {
    const int64_t first = row / job.together * job.together, rows = call.t - first < job.together ? call.t - first : job.together;
    const float* x = (const float*)call.x + row * w.k;
    if (narrow) {
      call.ops->to_float((const uint16_t*)call.x + row * w.k, call.x_type, w.k, (float*)floats.p);
      x = (const float*)floats.p;
    }
    int8_t *block = job.codes + first * w.k * job.digits, *codes = alone ? block : (int8_t*)planes.p;
    int32_t* starts = job.starts + row * segments * job.digits;
    const bool fine = job.digits == 1 ? call.ops->quantize(x, w.k, w.segment, call.static_scale, codes, job.scale + row, starts)
                                      : call.ops->to_digits(x, w.k, w.segment, codes, job.steps + row * segments, starts);
    if (!fine) return __atomic_store_n(&job.finite, 0, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < segments * job.digits; i++) starts[i] *= w.bits == 4 ? -8 : -128;
    if (!alone) interleave(codes, w.k, job.digits, rows, row - first, block);
  }
}

void int_panels(void* p, int64_t begin, int64_t end) {
  IntJob& job = *(IntJob*)p;
  const Ops* ops = job.call.ops;
  const Inputs x = {job.codes, job.scale, job.steps, job.starts};
  (job.digits == 1 ? ops->int_linear : ops->digits_linear)(job.call.weight, x, job.call.t, begin, end, job.call.out);
}

constexpr int64_t GRAIN = 4;  // panels: what the kernels take at one time, at most

}  // namespace

bool use_openmp_of(const char* path) {
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  // dlsym on a handle searches its dependencies too
  parallel = handle ? (Parallel)dlsym(handle, "GOMP_parallel") : nullptr;
  return parallel != nullptr;
}

namespace {

Status integer_call(Call& call, int digits) {
  Weight& w = call.weight;
  w.segment = segment_of(w.group, w.bits);
  const int64_t segments = w.k / w.segment, together = (digits == 1 ? call.ops->int_together : call.ops->digits_together)(call.t);
  // a tile of the matrix unit may read a little beyond the last row
  Memory codes(call.t * w.k * digits + 64), scale(sizeof(float) * call.t), steps(digits == 1 ? 0 : sizeof(float) * call.t * segments),
      starts(sizeof(int32_t) * call.t * segments * digits);
  if (!codes.p || !scale.p || !steps.p || !starts.p) return NO_MEMORY;
  IntJob job = {call, digits, together, (int8_t*)codes.p, (float*)scale.p, (float*)steps.p, (int32_t*)starts.p, 1};
  over((call.t + together - 1) / together, 1, useful_threads(call.threads, call.t * w.k), prepare_rows, &job);
  if (job.finite != 1) return job.finite ? NO_MEMORY : NOT_FINITE;
  over(w.panels(), GRAIN, useful_threads(call.threads, w.n * w.k * call.t), int_panels, &job);
  return OK;
}

}  // namespace

Status float_call(Call& call) {
  // NaN and infinity have no digits
  Status status = call.ops->digits_linear ? integer_call(call, 3) : NOT_FINITE;
  if (status != NOT_FINITE) return status;
  Weight& w = call.weight;
  w.segment = w.group;
  const bool narrow = call.x_type != FLOAT32;
  Memory converted(narrow ? sizeof(float) * call.t * w.k : 0), sums(w.shift ? sizeof(float) * call.t * (w.k / w.group) : 0);
  if (!converted.p || !sums.p) return NO_MEMORY;
  FloatJob job = {call, narrow ? (const float*)converted.p : (const float*)call.x, narrow ? (float*)converted.p : nullptr,
                  w.shift ? (float*)sums.p : nullptr};
  if (narrow || w.shift) over(call.t, 1, useful_threads(call.threads, call.t * w.k), convert_rows, &job);
  over(w.panels(), GRAIN, useful_threads(call.threads, w.n * w.k * call.t), float_panels, &job);
  return OK;
}

Status int8_call(Call& call) { return integer_call(call, 1); }

Status quantize_call(const Ops* ops, const void* x, int type, int64_t t, int64_t k, float static_scale, int8_t* codes, float* scale, int threads) {
  Call call = {};
  call.ops = ops, call.x = x, call.x_type = type, call.t = t, call.static_scale = static_scale;
  call.weight.k = call.weight.segment = k;
  Memory sums(sizeof(int32_t) * t);
  if (!sums.p) return NO_MEMORY;
  IntJob job = {call, 1, 1, codes, scale, nullptr, (int32_t*)sums.p, 1};
  over(t, 1, useful_threads(threads, t * k), prepare_rows, &job);
  return job.finite == 1 ? OK : job.finite ? NO_MEMORY : NOT_FINITE;
}

}  // namespace qk
