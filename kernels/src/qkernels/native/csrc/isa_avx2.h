// 16 lanes in two registers; dot products by 16-bit multiplications, so that nothing saturates.

struct F { __m256 a, b; };
struct I { __m256i a, b; };
static inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F f_set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F a) { _mm256_storeu_ps(p, a.a); _mm256_storeu_ps(p + 8, a.b); }
static inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F f_from_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline __m256 bfloat8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F f_from_bfloat(const uint16_t* p) { return {bfloat8(p), bfloat8(p + 8)}; }
static inline I i_set1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
static inline I i_load(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
static inline void i_store(void* p, I a) { _mm256_storeu_si256((__m256i*)p, a.a); _mm256_storeu_si256((__m256i*)p + 1, a.b); }
static inline F i_to_f(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I low4(I x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline I high4(I x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
// 4 bits: a pair of products is at most 2 * 15 * 128, far from where the 16-bit sums of maddubs saturate; 8 bits would reach it
template <int BITS>
static inline __m256i dot4_half(__m256i acc, __m256i w, __m256i x) {
  if (BITS == 4) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
template <int BITS>
static inline I dot4(I acc, I w, I x) { return {dot4_half<BITS>(acc.a, w.a, x.a), dot4_half<BITS>(acc.b, w.b, x.b)}; }
template <int J>
static inline __m256 nibble_half(__m256i v) {
  __m256i code = _mm256_and_si256(_mm256_srli_epi32(v, 4 * J), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(8)));
}
template <int J>
static inline F nibble(I v) { return {nibble_half<J>(v.a), nibble_half<J>(v.b)}; }
template <int J>
static inline __m256 byte_half(__m256i v) {
  __m256i flipped = _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(flipped, 24 - 8 * J), 24));
}
template <int J>
static inline F byte(I v) { return {byte_half<J>(v.a), byte_half<J>(v.b)}; }
