// Sixteen floats as two AVX2 registers; FMA and F16C come with every AVX2 processor that the dispatcher admits.
struct V { __m256 a, b; };
struct I { __m256i a, b; };
#define TWO(f, x, y) V{f(x.a, y.a), f(x.b, y.b)}
static inline V vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vstore(float* p, V x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline V vadd(V x, V y) { return TWO(_mm256_add_ps, x, y); }
static inline V vsub(V x, V y) { return TWO(_mm256_sub_ps, x, y); }
static inline V vmul(V x, V y) { return TWO(_mm256_mul_ps, x, y); }
static inline V vdiv(V x, V y) { return TWO(_mm256_div_ps, x, y); }
static inline V vmax(V x, V y) { return TWO(_mm256_max_ps, x, y); }
static inline V vmin(V x, V y) { return TWO(_mm256_min_ps, x, y); }
static inline V vscale(V x, V power) { return vmul(x, power); }
static inline V vfma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline V vabs(V x) { return TWO(_mm256_andnot_ps, vset(-0.0f), x); }
static inline V vround(V x) {
  constexpr int even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, even), _mm256_round_ps(x.b, even)};
}
static inline __m256 pow2_8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V vpow2(V n) { return {pow2_8(n.a), pow2_8(n.b)}; }
static inline V vhalf(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline void store_half(uint16_t* p, V x) {
  constexpr int even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, even));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, even));
}
// Sum of the lanes in the scalar's tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
static inline float lane_sum(V x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
static inline float lane_max(V x) {
  const __m256 a = _mm256_max_ps(x.a, x.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
static inline int32_t store_int8(int8_t* p, V x) {
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  const __m256i pairs = _mm256_add_epi32(a, b);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
static inline V load_uint8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline V load_int8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
static inline float half_value(const uint8_t* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
static inline __m256i four_8(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i low = _mm256_or_si256(_mm256_and_si256(_mm256_cvtps_epi32(a), byte),
                                      _mm256_slli_epi32(_mm256_and_si256(_mm256_cvtps_epi32(b), byte), 8));
  const __m256i high = _mm256_or_si256(_mm256_and_si256(_mm256_cvtps_epi32(c), byte), _mm256_slli_epi32(_mm256_cvtps_epi32(d), 8));
  return _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
}
static inline void store_four(uint8_t* p, V a, V b, V c, V d) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), four_8(a.a, b.a, c.a, d.a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), four_8(a.b, b.b, c.b, d.b));
}
static inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline V itof(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
using L = I;
static inline L lload(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
static constexpr int kDots = 2;
#define KIMI_PRODUCT_VECTOR "vec_avx2_products.h"
#undef TWO
