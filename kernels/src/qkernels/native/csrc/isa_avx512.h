// 16 lanes in one register; dot products by AVX-512-VNNI.

typedef __m512 F;
typedef __m512i I;
static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_set1(float a) { return _mm512_set1_ps(a); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F f_from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline F f_from_bfloat(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline I i_set1(int32_t a) { return _mm512_set1_epi32(a); }
static inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
static inline void i_store(void* p, I a) { _mm512_storeu_si512(p, a); }
static inline F i_to_f(I a) { return _mm512_cvtepi32_ps(a); }
static inline I low4(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline I high4(I a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// acc + the dot product of 4 unsigned weights with 4 signed inputs, in each lane
template <int BITS>
static inline I dot4(I acc, I w, I x) {
  // as _mm512_dpbusd_epi32, for which GCC 12 copies every sum from one register to another and back
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
// the signed code in bits 4j to 4j + 3 (8j to 8j + 7) of each lane
template <int J>
static inline F nibble(I v) {
  const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * J), table);  // reads the lowest four bits alone
}
template <int J>
static inline F byte(I v) {
  I flipped = _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(flipped, 24 - 8 * J), 24));
}
