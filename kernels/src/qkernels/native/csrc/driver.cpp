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
  int8_t* codes;
  float* scale;
  int32_t* sums;
  int finite;
};

void quantize_rows(void* p, int64_t begin, int64_t end) {
  IntJob& job = *(IntJob*)p;
  const Call& call = job.call;
  const int64_t k = call.weight.k, size = call.x_type == FLOAT32 ? 4 : 2, segments = k / call.weight.segment;
  Memory scratch(call.x_type == FLOAT32 ? 0 : sizeof(float) * k);
  for (int64_t row = begin; row < end; row++) {
    const char* x = (const char*)call.x + row * k * size;
    bool fine = scratch.p && call.ops->quantize(x, call.x_type, k, call.weight.segment, call.static_scale, job.codes + row * k, job.scale + row,
                                                job.sums + row * segments, (float*)scratch.p);
    if (!fine) __atomic_store_n(&job.finite, scratch.p ? 0 : -1, __ATOMIC_RELAXED);
  }
}

void int_panels(void* p, int64_t begin, int64_t end) {
  IntJob& job = *(IntJob*)p;
  job.call.ops->int_linear(job.call.weight, job.codes, job.scale, job.sums, job.call.t, begin, end, job.call.out);
}

constexpr int64_t GRAIN = 4;  // panels: what the kernels take at one time, at most

}  // namespace

bool use_openmp_of(const char* path) {
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  // dlsym on a handle searches its dependencies too
  parallel = handle ? (Parallel)dlsym(handle, "GOMP_parallel") : nullptr;
  return parallel != nullptr;
}

Status float_call(Call& call) {
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

Status int8_call(Call& call) {
  Weight& w = call.weight;
  w.segment = segment_of(w.group, w.bits);
  const int64_t segments = w.k / w.segment;
  // a tile of the matrix unit may read a little beyond the last row
  Memory codes(call.t * w.k + 64), scale(sizeof(float) * call.t), sums(sizeof(int32_t) * call.t * segments);
  if (!codes.p || !scale.p || !sums.p) return NO_MEMORY;
  IntJob job = {call, (int8_t*)codes.p, (float*)scale.p, (int32_t*)sums.p, 1};
  over(call.t, 1, useful_threads(call.threads, call.t * w.k), quantize_rows, &job);
  if (job.finite != 1) return job.finite ? NO_MEMORY : NOT_FINITE;
  over(w.panels(), GRAIN, useful_threads(call.threads, w.n * w.k * call.t), int_panels, &job);
  return OK;
}

Status quantize_call(const Ops* ops, const void* x, int type, int64_t t, int64_t k, float static_scale, int8_t* codes, float* scale, int threads) {
  Call call = {};
  call.ops = ops, call.x = x, call.x_type = type, call.t = t, call.static_scale = static_scale;
  call.weight.k = call.weight.segment = k;
  Memory sums(sizeof(int32_t) * t);
  if (!sums.p) return NO_MEMORY;
  IntJob job = {call, codes, scale, (int32_t*)sums.p, 1};
  over(t, 1, useful_threads(threads, t * k), quantize_rows, &job);
  return job.finite == 1 ? OK : job.finite ? NO_MEMORY : NOT_FINITE;
}

}  // namespace qk
