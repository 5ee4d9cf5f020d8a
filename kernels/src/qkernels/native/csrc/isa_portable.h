// 16 lanes in an array, for any processor; the compiler makes of it what it can.

struct F { float v[16]; };
struct I { int32_t v[16]; };
#define QK_EACH(type, expression) type r; for (int i = 0; i < 16; i++) r.v[i] = expression; return r
static inline F f_set1(float a) { QK_EACH(F, a); }
static inline F f_zero() { return f_set1(0); }
static inline F f_load(const float* p) { QK_EACH(F, p[i]); }
static inline void f_store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
static inline F f_add(F a, F b) { QK_EACH(F, a.v[i] + b.v[i]); }
static inline F f_mul(F a, F b) { QK_EACH(F, a.v[i] * b.v[i]); }
static inline F f_fma(F a, F b, F c) { QK_EACH(F, a.v[i] * b.v[i] + c.v[i]); }
static inline F f_from_half(const uint16_t* p) { QK_EACH(F, half_to_float(p[i])); }
static inline F f_from_bfloat(const uint16_t* p) { QK_EACH(F, bfloat_to_float(p[i])); }
static inline I i_set1(int32_t a) { QK_EACH(I, a); }
static inline I i_load(const void* p) { I r; memcpy(r.v, p, sizeof r.v); return r; }
static inline void i_store(void* p, I a) { memcpy(p, a.v, sizeof a.v); }
static inline F i_to_f(I a) { QK_EACH(F, (float)a.v[i]); }
static inline I low4(I a) { QK_EACH(I, a.v[i] & 0x0f0f0f0f); }
static inline I high4(I a) { QK_EACH(I, (int32_t)(((uint32_t)a.v[i] >> 4) & 0x0f0f0f0f)); }
static inline int32_t dot4_lane(int32_t w, int32_t x) {
  int32_t sum = 0;
  for (int b = 0; b < 4; b++) sum += (int32_t)(((uint32_t)w >> (8 * b)) & 255) * (int8_t)((uint32_t)x >> (8 * b));
  return sum;
}
template <int BITS>
static inline I dot4(I acc, I w, I x) { QK_EACH(I, acc.v[i] + dot4_lane(w.v[i], x.v[i])); }
template <int J>
static inline F nibble(I v) { QK_EACH(F, (float)((int32_t)(((uint32_t)v.v[i] >> (4 * J)) & 15) - 8)); }
template <int J>
static inline F byte(I v) { QK_EACH(F, (float)((int32_t)(((uint32_t)v.v[i] >> (8 * J)) & 255) - 128)); }
