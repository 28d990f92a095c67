// Sixteen floats in one AVX-512 register; VNNI sums four byte products a lane and step.
#define KIMI_QUANTIZE_TILE "quantize_avx512.h"
using V = __m512;
using I = __m512i;
using L = __m512i;
static inline V vset(float x) { return _mm512_set1_ps(x); }
static inline V vload(const float* p) { return _mm512_loadu_ps(p); }
static inline void vstore(float* p, V x) { _mm512_storeu_ps(p, x); }
static inline V vadd(V x, V y) { return _mm512_add_ps(x, y); }
static inline V vsub(V x, V y) { return _mm512_sub_ps(x, y); }
static inline V vmul(V x, V y) { return _mm512_mul_ps(x, y); }
static inline V vdiv(V x, V y) { return _mm512_div_ps(x, y); }
static inline V vmax(V x, V y) { return _mm512_max_ps(x, y); }
static inline V vmin(V x, V y) { return _mm512_min_ps(x, y); }
static inline V vfma(V x, V y, V z) { return _mm512_fmadd_ps(x, y, z); }
#ifdef KIMI_ZEN4  // two of four units multiply, others scale; Intel's two do both, scaling in two steps
#define KIMI_EXPONENTS
static inline float kept(int32_t e) { return static_cast<float>(e); }
static inline __m256 kept(__m256i e) { return _mm256_cvtepi32_ps(e); }
static inline V vscale(V x, V power) { return _mm512_scalef_ps(x, power); }
#else
static inline __m256 kept(__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)); }
static inline V vscale(V x, V power) { return vmul(x, power); }
#endif
static inline V vabs(V x) { return _mm512_abs_ps(x); }
static inline V vround(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V vpow2(V n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline V vhalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_half(uint16_t* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Sum of the lanes in the scalar's tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
static inline float lane_sum(V x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float lane_max(V x) { return _mm512_reduce_max_ps(x); }
static inline int32_t store_int8(int8_t* p, V x) {  // their sum by VNNI, four bytes a lane
  const __m128i q = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), q);
  const __m128i four = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), q), two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}
static inline V byte_scales(const uint8_t* p) {  // widened with its sign, whose copies are masked off
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 20);
  const __m512i mask = _mm512_set1_epi32(~0x78000000), exponent = _mm512_set1_epi32(112 << 23);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits, mask, exponent, 0xea));  // bits & mask | exponent
}
static inline V load_uint8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline V load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline float half_value(const uint8_t* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(h))));
}
static inline void store_four(uint8_t* p, V a, V b, V c, V d) {
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i low = _mm512_or_si512(_mm512_and_si512(_mm512_cvtps_epi32(a), byte),
                                      _mm512_slli_epi32(_mm512_and_si512(_mm512_cvtps_epi32(b), byte), 8));
  const __m512i high = _mm512_or_si512(_mm512_and_si512(_mm512_cvtps_epi32(c), byte), _mm512_slli_epi32(_mm512_cvtps_epi32(d), 8));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
static inline I iset(int32_t x) { return _mm512_set1_epi32(x); }
static constexpr bool kWholeBytes = true;
static inline I isixteenth(I x) { return _mm512_srai_epi32(x, 4); }
template <int n> static inline I ishl(I x) { return _mm512_slli_epi32(x, n); }
static inline I izero() { return _mm512_setzero_si512(); }
static inline V itof(I x) { return _mm512_cvtepi32_ps(x); }
static inline I iadd(I x, I y) { return _mm512_add_epi32(x, y); }
// Compilers load a line anew for each use, and a run's lines cross those of the cache, so each load is two. The asm is a
// register's name; equal ones are one.
template <bool once = false> static inline L lload(const uint8_t* p) {
  L line = _mm512_loadu_si512(p);
  if (once) asm("" : "+v"(line));
  return line;
}
static inline L llow(L w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline L lhigh(L w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
static inline L land(L w, uint8_t mask) { return _mm512_and_si512(w, _mm512_set1_epi8(static_cast<char>(mask))); }
static inline L lthree(L a, L b, L c) {
  constexpr int choose = 0xca;  // of the second where the first has ones, else of the third
  const L two = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x22), _mm512_slli_epi16(a, 1), _mm512_slli_epi16(b, 2), choose);
  return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(0x88)), _mm512_slli_epi16(c, 3), two, choose);
}
static inline L lor(L a, L b) { return _mm512_or_si512(a, b); }
// Shifts run over 16-bit lanes; the masks keep only bits that came from the same byte.
template <int j> static inline L lbit(L a) {
  return _mm512_and_si512(j < 4 ? _mm512_slli_epi16(a, j < 4 ? 4 - j : 0) : _mm512_srli_epi16(a, j < 4 ? 0 : j - 4), _mm512_set1_epi8(16));
}
template <int j> static inline L ltwo(L a) {
  return _mm512_and_si512(j < 2 ? _mm512_slli_epi16(a, j < 2 ? 4 - 2 * j : 0) : _mm512_srli_epi16(a, j < 2 ? 0 : 2 * j - 4), _mm512_set1_epi8(48));
}
static inline L lcode(L a) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNonLinear))), a);
}
template <int c> static inline V lbyte(L a) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * c), 24));
}
static inline int32_t four(const int8_t* x) { int32_t r; __builtin_memcpy(&r, x, 4); return r; }
// Four bytes of activations, broadcast by the instruction that multiplies them. GCC would load them into a register first, and
// move products and the rounding of sums among each other, which costs Zen 4 four cycles of 86 for a group of eight tokens.
static inline I dot_u7(I acc, L w, const int8_t* x) {
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
  return acc;
}
static inline I dot_s8(I acc, L w, const int8_t* x) {
  // dpbusd wants unsigned weights: w + 128. The caller takes 128 * (sum of activations) off again, exactly.
  return dot_u7(acc, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x);
}
static inline I dot_s8_positive(I acc, L w, const int8_t* x) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four(x)), w); }
static constexpr int32_t bias_s8 = 128;
static constexpr int kDots = 4;
static constexpr int kBatch = 8;  // 8 x (total, acc, integer sum) and a line: 28 of 32 registers
static constexpr Reading kOfFew{2, 4096, 64, 2}, kOfPair = kOfFew;
#ifdef KIMI_ZEN4
static constexpr Reading kOfOne{1, 4096, 128, 2};
#else
static constexpr Reading kOfOne{8, 4096, 64, 2};  // measured on Emerald Rapids
#endif
