// What products are written over with 16 registers of 256 bits: eight rows a vector, so that a block's two vectors of rows times
// four tokens, a line of weights, its mask and four products on their way fit.
using V = __m256;
using I = __m256i;
using L = __m256i;
static inline V vset(float x) { return _mm256_set1_ps(x); }
static inline V vload(const float* p) { return _mm256_loadu_ps(p); }
static inline void vstore(float* p, V x) { _mm256_storeu_ps(p, x); }
static inline V vadd(V x, V y) { return _mm256_add_ps(x, y); }
static inline V vsub(V x, V y) { return _mm256_sub_ps(x, y); }
static inline V vmul(V x, V y) { return _mm256_mul_ps(x, y); }
static inline V vscale(V x, V power) { return vmul(x, power); }
static inline V vfma(V x, V y, V z) { return _mm256_fmadd_ps(x, y, z); }
static inline V vhalf(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline __m128i eight_bytes(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
static inline V load_uint8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(p))); }
static inline V load_int8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p))); }
static inline V byte_scales(const uint8_t* p) {  // widened with its sign, whose copies are masked off
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepi8_epi32(eight_bytes(p)), 20);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(~0x78000000)), _mm256_set1_epi32(112 << 23)));
}
static inline I iset(int32_t x) { return _mm256_set1_epi32(x); }
static inline I isixteenth(I x) { return _mm256_srai_epi32(x, 4); }
template <int n> static inline I ishl(I x) { return _mm256_slli_epi32(x, n); }
static inline I izero() { return _mm256_setzero_si256(); }
static inline V itof(I x) { return _mm256_cvtepi32_ps(x); }
static inline I iadd(I x, I y) { return _mm256_add_epi32(x, y); }
template <bool = false> static inline L lload(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline void lstore(int8_t* p, L w) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), w); }
static inline L llow(L w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline L lhigh(L w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
static inline L land(L w, uint8_t mask) { return _mm256_and_si256(w, _mm256_set1_epi8(static_cast<char>(mask))); }
static inline L lthree(L a, L b, L c) {
  const L one = _mm256_and_si256(_mm256_slli_epi16(a, 1), _mm256_set1_epi8(0x22));
  const L two = _mm256_and_si256(_mm256_slli_epi16(b, 2), _mm256_set1_epi8(0x44));
  return _mm256_or_si256(_mm256_or_si256(one, two), _mm256_and_si256(_mm256_slli_epi16(c, 3), _mm256_set1_epi8(static_cast<char>(0x88))));
}
static inline L lor(L x, L y) { return _mm256_or_si256(x, y); }
// Shifts run over 16-bit lanes; the masks keep only bits that came from the same byte.
template <int j> static inline L lbit(L x) {
  return _mm256_and_si256(j < 4 ? _mm256_slli_epi16(x, j < 4 ? 4 - j : 0) : _mm256_srli_epi16(x, j < 4 ? 0 : j - 4), _mm256_set1_epi8(16));
}
template <int j> static inline L ltwo(L x) {
  return _mm256_and_si256(j < 2 ? _mm256_slli_epi16(x, j < 2 ? 4 - 2 * j : 0) : _mm256_srli_epi16(x, j < 2 ? 0 : 2 * j - 4), _mm256_set1_epi8(48));
}
static inline L lcode(L x) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kNonLinear))), x);
}
template <int c> static inline V lbyte(L x) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24 - 8 * c), 24));
}
static inline L four_channels(const int8_t* x) { int32_t r; __builtin_memcpy(&r, x, 4); return _mm256_set1_epi32(r); }
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
// VNNI at 256 bits: four byte products a lane and step. Newer processors without AVX-512 have it in one encoding, those
// with AVX-512 in another.
static inline I dpbusd(I acc, __m256i u, __m256i s) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
  return _mm256_dpbusd_epi32(acc, u, s);
#endif
}
static inline I dot_u7(I acc, L w, const int8_t* x) { return dpbusd(acc, w, four_channels(x)); }
// Unsigned weights are wanted: w + 128. The caller takes 128 * (sum of activations) off again, exactly.
static inline I dot_s8(I acc, L w, const int8_t* x) { return dot_u7(acc, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x); }
static inline I dot_s8_positive(I acc, L w, const int8_t* x) { return dpbusd(acc, four_channels(x), w); }
static constexpr int32_t bias_s8 = 128;
static constexpr bool kWholeBytes = true;
#else
// Products of small unsigned values may be added up in 16 bits, which saves the widening of each: 16 sums of 2 channels.
#define KIMI_SHORT_SUMS
static inline I short_dot(L w, const int8_t* x) { return _mm256_maddubs_epi16(w, four_channels(x)); }
// The order of additions is kept from compilers: they would add new products to each other first, for which registers are too few.
static inline I short_add(I x, I y) {
  I r = _mm256_add_epi16(x, y);
  asm("" : "+x"(r));
  return r;
}
static inline I widen_add(I acc, I x) { return _mm256_add_epi32(acc, _mm256_madd_epi16(x, _mm256_set1_epi16(1))); }
// Two products of at most 127 * 127 fit in int16, so maddubs cannot saturate: 32258 < 32767.
static inline I dot_u7(I acc, L w, const int8_t* x) { return widen_add(acc, short_dot(w, x)); }
// |w| as unsigned and w's sign moved onto x: 2 * 128 * 127 = 32512 < 32767, so maddubs cannot saturate.
static inline I dot_s8(I acc, L w, const int8_t* x) {
  return widen_add(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four_channels(x), w)));
}
// Activations that are unsigned as they are: signs take the ports of multiplications, which are what is scarce.
static inline I dot_s8_positive(I acc, L w, const int8_t* x) { return widen_add(acc, _mm256_maddubs_epi16(four_channels(x), w)); }
static constexpr int32_t bias_s8 = 0;
static constexpr bool kWholeBytes = false;  // two products of more would not fit in 16 bits
#endif
static constexpr int kBatch = 4;
static constexpr Reading kOfOne{2, 1024, 64, 3}, kOfPair = kOfOne, kOfFew{1, 4096, 64, 2};  // Zen 3; four streams spill sums
