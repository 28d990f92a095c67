// Sixteen floats as four NEON registers; the dot-product extension sums four signed byte products a lane and step.
struct V { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct L { uint8x16_t v[4]; };
#define EACH for (int k = 0; k < 4; ++k)
static inline V vset(float x) { V r; EACH r.v[k] = vdupq_n_f32(x); return r; }
static inline V vload(const float* p) { V r; EACH r.v[k] = vld1q_f32(p + 4 * k); return r; }
static inline void vstore(float* p, V a) { EACH vst1q_f32(p + 4 * k, a.v[k]); }
static inline V vadd(V a, V b) { EACH a.v[k] = vaddq_f32(a.v[k], b.v[k]); return a; }
static inline V vsub(V a, V b) { EACH a.v[k] = vsubq_f32(a.v[k], b.v[k]); return a; }
static inline V vmul(V a, V b) { EACH a.v[k] = vmulq_f32(a.v[k], b.v[k]); return a; }
static inline V vscale(V a, V power) { return vmul(a, power); }
static inline V vdiv(V a, V b) { EACH a.v[k] = vdivq_f32(a.v[k], b.v[k]); return a; }
static inline V vfma(V a, V b, V c) { EACH c.v[k] = vfmaq_f32(c.v[k], a.v[k], b.v[k]); return c; }
// a > b ? a : b, as the other instruction sets have it; NEON's own maximum treats what is not a number otherwise.
static inline V vmax(V a, V b) { EACH a.v[k] = vbslq_f32(vcgtq_f32(a.v[k], b.v[k]), a.v[k], b.v[k]); return a; }
static inline V vmin(V a, V b) { EACH a.v[k] = vbslq_f32(vcltq_f32(a.v[k], b.v[k]), a.v[k], b.v[k]); return a; }
static inline V vabs(V a) { EACH a.v[k] = vabsq_f32(a.v[k]); return a; }
static inline V vround(V a) { EACH a.v[k] = vrndnq_f32(a.v[k]); return a; }
static inline V vpow2(V n) {
  EACH n.v[k] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[k]), vdupq_n_s32(127)), 23));
  return n;
}
static inline V vhalf(const uint16_t* p) {
  V r;
  EACH r.v[k] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * k)));
  return r;
}
static inline void store_half(uint16_t* p, V a) { EACH vst1_u16(p + 4 * k, vreinterpret_u16_f16(vcvt_f16_f32(a.v[k]))); }
static inline float half_value(const uint8_t* p) {
  __fp16 h;
  __builtin_memcpy(&h, p, 2);
  return static_cast<float>(h);
}
// Sum of the lanes in the scalar's tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
static inline float lane_sum(V x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
static inline float lane_max(V x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
static inline int8x16_t narrow(V a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[0])), vmovn_s32(vcvtq_s32_f32(a.v[1])));
  const int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[2])), vmovn_s32(vcvtq_s32_f32(a.v[3])));
  return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
}
static inline int32_t store_int8(int8_t* p, V a) {
  const int8x16_t bytes = narrow(a);
  vst1q_s8(p, bytes);
  return vaddlvq_s8(bytes);
}
static inline V widen(int16x8_t low, int16x8_t high) {
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
static inline V load_int8(const uint8_t* p) {
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  return widen(vmovl_s8(vget_low_s8(x)), vmovl_s8(vget_high_s8(x)));
}
static inline V load_uint8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  return widen(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(x))));
}
static inline V byte_scales(const uint8_t* p) {  // widened with its sign, whose copies are masked off
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
  const int32x4_t wide[4] = {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
  V r;
  EACH r.v[k] = vreinterpretq_f32_s32(vorrq_s32(vandq_s32(vshlq_n_s32(wide[k], 20), vdupq_n_s32(~0x78000000)), vdupq_n_s32(112 << 23)));
  return r;
}
static inline void store_four(uint8_t* p, V a, V b, V c, V d) {
  const int8x16x4_t bytes = {{narrow(a), narrow(b), narrow(c), narrow(d)}};
  vst4q_s8(reinterpret_cast<int8_t*>(p), bytes);
}
static inline I iset(int32_t x) { I r; EACH r.v[k] = vdupq_n_s32(x); return r; }
static constexpr bool kWholeBytes = false;  // weights are signed bytes to a product
static inline I isixteenth(I a) { return a; }
template <int n> static inline I ishl(I a) { EACH a.v[k] = vshlq_n_s32(a.v[k], n); return a; }
static inline I izero() { return iset(0); }
static inline V itof(I a) { V r; EACH r.v[k] = vcvtq_f32_s32(a.v[k]); return r; }
static inline I iadd(I a, I b) { EACH a.v[k] = vaddq_s32(a.v[k], b.v[k]); return a; }
template <bool = false> static inline L lload(const uint8_t* p) { L r; EACH r.v[k] = vld1q_u8(p + 16 * k); return r; }
static inline L llow(L a) { EACH a.v[k] = vandq_u8(a.v[k], vdupq_n_u8(15)); return a; }
static inline L lhigh(L a) { EACH a.v[k] = vshrq_n_u8(a.v[k], 4); return a; }
static inline L land(L a, uint8_t mask) { EACH a.v[k] = vandq_u8(a.v[k], vdupq_n_u8(mask)); return a; }
static inline L lthree(L a, L b, L c) {
  EACH {
    const uint8x16_t two = vbslq_u8(vdupq_n_u8(0x22), vshlq_n_u8(a.v[k], 1), vshlq_n_u8(b.v[k], 2));
    a.v[k] = vbslq_u8(vdupq_n_u8(0x88), vshlq_n_u8(c.v[k], 3), two);
  }
  return a;
}
static inline L lor(L a, L b) { EACH a.v[k] = vorrq_u8(a.v[k], b.v[k]); return a; }
template <int j> static inline L lbit(L a) {
  EACH a.v[k] = vandq_u8(vshlq_u8(a.v[k], vdupq_n_s8(4 - j)), vdupq_n_u8(16));
  return a;
}
template <int j> static inline L ltwo(L a) {
  EACH a.v[k] = vandq_u8(vshlq_u8(a.v[k], vdupq_n_s8(4 - 2 * j)), vdupq_n_u8(48));
  return a;
}
static inline L lcode(L a) {
  const int8x16_t codes = vld1q_s8(kNonLinear);
  EACH a.v[k] = vreinterpretq_u8_s8(vqtbl1q_s8(codes, a.v[k]));
  return a;
}
template <int c> static inline V lbyte(L a) {
  V r;
  EACH r.v[k] = vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u8(a.v[k]), 24 - 8 * c), 24));
  return r;
}
static inline I dot_s8(I acc, L w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(four));
  EACH acc.v[k] = vdotq_s32(acc.v[k], vreinterpretq_s8_u8(w.v[k]), b);
  return acc;
}
static inline I dot_u7(I acc, L w, const int8_t* x) { return dot_s8(acc, w, x); }  // at most 127: signed all the same
static inline I dot_s8_positive(I acc, L w, const int8_t* x) { return dot_s8(acc, w, x); }
static constexpr int32_t bias_s8 = 0;
static constexpr int kDots = 2;
static constexpr int kBatch = 4;  // a vector is four registers, of which there are 32
static constexpr Reading kOfOne{2, 1024, 64, 3}, kOfPair = kOfOne, kOfFew{1, 4096, 64, 2};  // not measured
#undef EACH
