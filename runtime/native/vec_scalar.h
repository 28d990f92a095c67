// Sixteen floats in plain C++: the oracle that the other vector headers must match bit for bit.
#define KIMI_ARRAYS  // that is what these vectors are
struct V { float v[16]; };
struct I { int32_t v[16]; };
#define EACH for (int k = 0; k < 16; ++k)
static inline V vset(float x) { V r; EACH r.v[k] = x; return r; }
static inline V vload(const float* p) { V r; EACH r.v[k] = p[k]; return r; }
static inline void vstore(float* p, V a) { EACH p[k] = a.v[k]; }
static inline V vadd(V a, V b) { EACH a.v[k] += b.v[k]; return a; }
static inline V vsub(V a, V b) { EACH a.v[k] -= b.v[k]; return a; }
static inline V vmul(V a, V b) { EACH a.v[k] *= b.v[k]; return a; }
static inline V vdiv(V a, V b) { EACH a.v[k] /= b.v[k]; return a; }
static inline V vscale(V a, V power) { return vmul(a, power); }  // by a power of two, as a tile keeps it
static inline V vfma(V a, V b, V c) { EACH c.v[k] = __builtin_fmaf(a.v[k], b.v[k], c.v[k]); return c; }
static inline V vmax(V a, V b) { EACH a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k]; return a; }
static inline V vmin(V a, V b) { EACH a.v[k] = a.v[k] < b.v[k] ? a.v[k] : b.v[k]; return a; }
static inline V vabs(V a) { EACH a.v[k] = __builtin_fabsf(a.v[k]); return a; }
static inline V vround(V a) { EACH a.v[k] = __builtin_rintf(a.v[k]); return a; }  // to nearest, ties to even
static inline V vpow2(V n) {  // 2^n for whole n in [-126, 127]
  EACH { int32_t bits = (static_cast<int32_t>(n.v[k]) + 127) << 23; __builtin_memcpy(&n.v[k], &bits, 4); }
  return n;
}
static inline float half_value_of(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) bits = sign | 0x7f800000u | (mantissa << 13);
  else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  else {  // subnormal: mantissa * 2^-24, exact in float32
    float f = static_cast<float>(mantissa) * 0x1p-24f;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
static inline float half_value(const uint8_t* p) { uint16_t h; __builtin_memcpy(&h, p, 2); return half_value_of(h); }
static inline V vhalf(const uint16_t* p) { V r; EACH r.v[k] = half_value_of(p[k]); return r; }
static inline void store_half(uint16_t* p, V a) {  // to nearest, ties to even
  EACH {
    uint32_t bits;
    __builtin_memcpy(&bits, &a.v[k], 4);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t h;
    if (magnitude > 0x7f800000u) h = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // not a number stays one
    else if (magnitude >= 0x477ff000u) h = 0x7c00u;                          // rounds beyond 65504
    else if (magnitude < 0x38800000u) {                                      // subnormal: a whole multiple of 2^-24
      float f;
      __builtin_memcpy(&f, &magnitude, 4);
      h = static_cast<uint32_t>(__builtin_rintf(f * 0x1p24f));
    } else {
      h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    p[k] = static_cast<uint16_t>(sign | h);
  }
}
// Sum of the lanes in one fixed tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
static inline float lane_sum(V x) {
  for (int half = 8; half; half /= 2)
    for (int k = 0; k < half; ++k) x.v[k] += x.v[k + half];
  return x.v[0];
}
static inline float lane_max(V x) {
  float m = x.v[0];
  for (int k = 1; k < 16; ++k) m = x.v[k] > m ? x.v[k] : m;
  return m;
}
// Stores whole numbers in [-127, 127] as bytes and returns their sum.
static inline int32_t store_int8(int8_t* p, V a) {
  int32_t sum = 0;
  EACH { p[k] = static_cast<int8_t>(a.v[k]); sum += p[k]; }
  return sum;
}
// Scales of one byte each: sign and exponent and mantissa go where a float has them, and 112 is added to the exponent.
static inline V byte_scales(const uint8_t* p) {
  V r;
  EACH {
    const uint32_t bits = static_cast<uint32_t>(p[k] & 128) << 24 | static_cast<uint32_t>(p[k] & 127) << 20 | 112u << 23;
    __builtin_memcpy(&r.v[k], &bits, 4);
  }
  return r;
}
static inline V load_uint8(const uint8_t* p) { V r; EACH r.v[k] = static_cast<float>(p[k]); return r; }
static inline V load_int8(const uint8_t* p) { V r; EACH r.v[k] = static_cast<float>(static_cast<int8_t>(p[k])); return r; }
// Lane k's four whole numbers as bytes 4k..4k+3.
static inline void store_four(uint8_t* p, V a, V b, V c, V d) {
  EACH {
    p[4 * k] = static_cast<uint8_t>(static_cast<int8_t>(a.v[k]));
    p[4 * k + 1] = static_cast<uint8_t>(static_cast<int8_t>(b.v[k]));
    p[4 * k + 2] = static_cast<uint8_t>(static_cast<int8_t>(c.v[k]));
    p[4 * k + 3] = static_cast<uint8_t>(static_cast<int8_t>(d.v[k]));
  }
}
static inline I iset(int32_t x) { I r; EACH r.v[k] = x; return r; }
static constexpr bool kWholeBytes = false;  // products of weights above 127, whose sums `isixteenth` divides
static inline I isixteenth(I a) { return a; }
template <int n> static inline I ishl(I a) { EACH a.v[k] = static_cast<int32_t>(static_cast<uint32_t>(a.v[k]) << n); return a; }
static inline I izero() { I r; EACH r.v[k] = 0; return r; }
static inline V itof(I a) { V r; EACH r.v[k] = static_cast<float>(a.v[k]); return r; }
static inline I iadd(I a, I b) { EACH a.v[k] += b.v[k]; return a; }
// A line of 64 weight bytes: 16 rows of 4 channels. `low` and `high` are a line's nibbles.
struct L { uint8_t b[64]; };
template <bool = false> static inline L lload(const uint8_t* p) { L r; __builtin_memcpy(r.b, p, 64); return r; }
static inline L llow(L a) { for (int k = 0; k < 64; ++k) a.b[k] &= 15; return a; }
static inline L lhigh(L a) { for (int k = 0; k < 64; ++k) a.b[k] >>= 4; return a; }
static inline L land(L a, uint8_t mask) { for (int k = 0; k < 64; ++k) a.b[k] &= mask; return a; }
// Bits 0 of three, lowest first, in bits 1-3, and bits 4 in bits 5-7; the others are anything.
static inline L lthree(L a, L b, L c) {
  for (int k = 0; k < 64; ++k)
    a.b[k] = static_cast<uint8_t>((a.b[k] << 1 & 0x22) | (b.b[k] << 2 & 0x44) | (c.b[k] << 3 & 0x88));
  return a;
}
static inline L lor(L a, L b) { for (int k = 0; k < 64; ++k) a.b[k] |= b.b[k]; return a; }
// Bit j of every byte, moved to bit 4; bits 2j and 2j + 1, moved to bits 4 and 5; what a code of IQ4_NL stands for.
template <int j> static inline L lbit(L a) { for (int k = 0; k < 64; ++k) a.b[k] = static_cast<uint8_t>((a.b[k] >> j & 1) << 4); return a; }
template <int j> static inline L ltwo(L a) { for (int k = 0; k < 64; ++k) a.b[k] = static_cast<uint8_t>((a.b[k] >> 2 * j & 3) << 4); return a; }
static inline L lcode(L a) { for (int k = 0; k < 64; ++k) a.b[k] = static_cast<uint8_t>(kNonLinear[a.b[k]]); return a; }
// Byte c of each row's four, as a signed number.
template <int c> static inline V lbyte(L a) { V r; EACH r.v[k] = static_cast<float>(static_cast<int8_t>(a.b[4 * k + c])); return r; }
// acc[row] += dot of the row's 4 weights (unsigned, at most 127) and the 4 activations at x.
static inline I dot_u7(I acc, L w, const int8_t* x) {
  EACH for (int c = 0; c < 4; ++c) acc.v[k] += static_cast<int32_t>(w.b[4 * k + c]) * x[c];
  return acc;
}
// The same for signed weights; see `bias_s8`.
static inline I dot_s8(I acc, L w, const int8_t* x) {
  EACH for (int c = 0; c < 4; ++c) acc.v[k] += static_cast<int32_t>(static_cast<int8_t>(w.b[4 * k + c])) * x[c];
  return acc;
}
// The same where no activation is negative, without that bias.
static inline I dot_s8_positive(I acc, L w, const int8_t* x) { return dot_s8(acc, w, x); }
static constexpr int32_t bias_s8 = 0;  // dot_s8 gives the sum plus bias_s8 * (sum of the activations)
static constexpr int kBatch = 1;  // sums are in memory anyhow: eight at once are 1.02 to 1.04 times as fast, and take 65 s to compile instead of 25
static constexpr int kDots = 2;
static constexpr Reading kOfOne{1, 1024, 64, 3}, kOfPair = kOfOne, kOfFew{1, 4096, 64, 2};
#undef EACH
