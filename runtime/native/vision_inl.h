// Every kernel of vision.h, once, over V and I; included inside an unnamed namespace after vec_<isa>.h and what only this
// file needs: dot_s16, vstore_s16 and the tile sizes kTileQ x kTileK and kTileP.
#include "vec_exp.h"

// 2^x for x <= 1, to 3e-6 of itself: 2^x = 2^n 2^f, |f| <= 1/2, and e^(f ln 2) by Taylor to degree 5, whose first dropped
// term (ln 2 / 2)^6 / 720 is 2.4e-6. A weight keeps 15 bits, so 1.5e-5 is what counts. Below 2^-126 it stays there.
static inline V vexp2(V x) {
  x = vmax(x, vset(-126.0f));
  const V n = vround(x), f = vsub(x, n);
  V p = vset(0x1.5d87fep-10f);               // ln(2)^5 / 120
  p = vfma(p, f, vset(0x1.3b2ab6p-7f));      // ln(2)^4 / 24
  p = vfma(p, f, vset(0x1.c6b08ep-5f));      // ln(2)^3 / 6
  p = vfma(p, f, vset(0x1.ebfbep-3f));       // ln(2)^2 / 2
  p = vfma(p, f, vset(0x1.62e43p-1f));       // ln(2)
  return vmul(vfma(p, f, vset(1.0f)), vpow2(n));
}

// A row's last vector may be shorter than sixteen: it is completed with zeros.
static inline V vload_up_to(const float* p, int n) {
  if (n >= 16) return vload(p);
  float v[16] = {0};
  for (int k = 0; k < n; ++k) v[k] = p[k];
  return vload(v);
}
static inline void vstore_up_to(float* p, V x, int n) {
  if (n >= 16) return vstore(p, x);
  float v[16];
  vstore(v, x);
  for (int k = 0; k < n; ++k) p[k] = v[k];
}
static inline V vzero_from(V x, int n) {
  float v[16];
  vstore(v, x);
  for (int k = n; k < 16; ++k) v[k] = 0.0f;
  return vload(v);
}
static void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  V sum = vset(0.0f), square = vset(0.0f);
  for (int k = 0; k < n; k += 16) sum = vadd(sum, vload_up_to(x + k, n - k));
  const V mean = vset(lane_sum(sum) / static_cast<float>(n));
  for (int k = 0; k < n; k += 16) {
    V d = vsub(vload_up_to(x + k, n - k), mean);
    if (n - k < 16) d = vzero_from(d, n - k);
    square = vfma(d, d, square);
  }
  const V r = vset(1.0f / __builtin_sqrtf(lane_sum(square) / static_cast<float>(n) + eps));
  for (int k = 0; k < n; k += 16) {
    const int m = n - k;
    const V d = vmul(vsub(vload_up_to(x + k, m), mean), r);
    vstore_up_to(out + k, vfma(d, vload_up_to(weight + k, m), vload_up_to(bias + k, m)), m);
  }
}

// tanh form: x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
// Exact form: x (1 + erf(x / sqrt 2)) / 2 with erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
static void gelu(const float* x, const float* bias, int n, bool exact, float* out) {
  for (int k = 0; k < n; k += 16) {
    const V z = vadd(vload_up_to(x + k, n - k), vload_up_to(bias + k, n - k));
    V y;
    if (exact) {
      const V a = vmul(vabs(z), vset(0.70710678118654752f));
      const V t = vdiv(vset(1.0f), vfma(a, vset(0.3275911f), vset(1.0f)));
      V p = vset(1.061405429f);
      p = vfma(p, t, vset(-1.453152027f));
      p = vfma(p, t, vset(1.421413741f));
      p = vfma(p, t, vset(-0.284496736f));
      p = vmul(vfma(p, t, vset(0.254829592f)), t);
      const V rest = vmul(p, vexp(vmul(vsub(vset(0.0f), a), a)));  // 1 - erf(|z| / sqrt 2)
      // z >= 0: z - z rest / 2;  z < 0: z rest / 2
      const V part = vmul(vmul(vabs(z), vset(0.5f)), rest);
      y = vsub(vmax(z, vset(0.0f)), part);
    } else {
      const V u = vmul(vset(-1.5957691216057308f), vfma(vmul(vmul(z, z), z), vset(0.044715f), z));
      y = vdiv(z, vadd(vset(1.0f), vexp(u)));
    }
    vstore_up_to(out + k, y, n - k);
  }
}

static void add(const float* y, const float* bias, int n, float* x) {
  for (int k = 0; k < n; k += 16)
    vstore_up_to(x + k, vadd(vload_up_to(x + k, n - k), vadd(vload_up_to(y + k, n - k), vload_up_to(bias + k, n - k))), n - k);
}

// Bias, rotation and rounding of one row of q or k: int16 [K], and the scale.
static inline float place_row(const float* x, const float* bias, const float* cos, const float* sin, int K, int16_t* out) {
  alignas(64) float turned[kMaxHead] = {0};
  for (int j = 0; j < K / 2; ++j) {
    const float even = x[2 * j] + bias[2 * j], odd = x[2 * j + 1] + bias[2 * j + 1];
    turned[2 * j] = even * cos[j] - odd * sin[j];
    turned[2 * j + 1] = even * sin[j] + odd * cos[j];
  }
  V top = vset(0.0f);
  for (int k = 0; k < K; k += 16) top = vmax(top, vabs(vload(turned + k)));
  const float most = lane_max(top);
  const V inverse = vset(most > 1e-30f ? static_cast<float>(kQkLimit) / most : 0.0f);
  alignas(64) int16_t whole[kMaxHead];
  for (int k = 0; k < K; k += 16) vstore_s16(whole + k, vmul(vload(turned + k), inverse));
  __builtin_memcpy(out, whole, sizeof(int16_t) * static_cast<size_t>(K));
  return most / static_cast<float>(kQkLimit);
}

static void place(Patches& s, int head, int first, int n, const float* qkv, size_t stride, const float* bias,
                  const float* cos, const float* sin) {
  const int K = s.K, W = s.H * K;
  const float factor = 1.44269504088896341f / __builtin_sqrtf(static_cast<float>(K));
  qkv += head * K;
  bias += head * K;
  int16_t row[kMaxHead];
  for (int i = 0; i < n; ++i) {
    const int at = first + i;
    const float *c = cos + static_cast<size_t>(i) * (K / 2), *si = sin + static_cast<size_t>(i) * (K / 2);
    const float* x = qkv + i * stride;
    const size_t q_row = static_cast<size_t>(head) * s.N + at;
    s.q_scale[q_row] = factor * place_row(x, bias, c, si, K, s.q + q_row * K);
    s.k_scale[static_cast<size_t>(head) * s.Np + at] = place_row(x + W, bias + W, c, si, K, row);
    int16_t* k = s.k + (static_cast<size_t>(head) * s.Np + at / 16 * 16) * K + 2 * (at % 16);
    for (int j = 0; j < K / 2; ++j) {
      k[32 * j] = row[2 * j];
      k[32 * j + 1] = row[2 * j + 1];
    }
  }
  // v: the largest of each channel over the block, then pairs of keys side by side; a missing key is zero.
  alignas(64) float value[2][kMaxHead], most[kMaxHead] = {0}, inverse[kMaxHead];
  qkv += 2 * W;
  bias += 2 * W;
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < K; ++k) {
      const float x = __builtin_fabsf(qkv[i * stride + k] + bias[k]);
      most[k] = x > most[k] ? x : most[k];
    }
  float* scale = s.v_scale + (static_cast<size_t>(head) * (s.Np / kKeys) + first / kKeys) * s.Kp;
  for (int k = 0; k < s.Kp; ++k) {
    inverse[k] = most[k] > 1e-30f ? static_cast<float>(kVLimit) / most[k] : 0.0f;
    scale[k] = most[k] / static_cast<float>(kVLimit * kWeightLimit);
  }
  for (int pair = 0; pair < kKeys / 2; ++pair) {
    int16_t* out = s.v + (static_cast<size_t>(head) * (s.Np / 2) + first / 2 + pair) * 2 * s.Kp;
    alignas(64) int16_t whole[2][kMaxHead];
    for (int side = 0; side < 2; ++side) {
      const int i = 2 * pair + side;
      for (int k = 0; k < s.Kp; ++k) value[side][k] = i < n && k < K ? (qkv[i * stride + k] + bias[k]) * inverse[k] : 0.0f;
      for (int k = 0; k < s.Kp; k += 16) vstore_s16(whole[side] + k, vload(value[side] + k));
    }
    for (int k = 0; k < s.Kp; ++k) {
      out[2 * k] = whole[0][k];
      out[2 * k + 1] = whole[1][k];
    }
  }
}

// Scores of kTileQ queries against kTileK x 16 keys, in powers of two.
static inline void score_tile(const Patches& s, const int16_t* const* q, const float* q_scale, const int16_t* k,
                              const float* k_scale, float (*out)[kKeys]) {
  I acc[kTileQ][kTileK];
  for (int i = 0; i < kTileQ; ++i)
    for (int j = 0; j < kTileK; ++j) acc[i][j] = izero();
  const int pairs = s.K / 2;
  for (int c = 0; c < pairs; ++c) {
    L line[kTileK];
    for (int j = 0; j < kTileK; ++j) line[j] = lload(reinterpret_cast<const uint8_t*>(k + (static_cast<size_t>(j) * pairs + c) * 32));
    for (int i = 0; i < kTileQ; ++i)
      for (int j = 0; j < kTileK; ++j) acc[i][j] = dot_s16(acc[i][j], line[j], q[i] + 2 * c);
  }
  for (int i = 0; i < kTileQ; ++i)
    for (int j = 0; j < kTileK; ++j)
      vstore(out[i] + 16 * j, vmul(itof(acc[i][j]), vmul(vload(k_scale + 16 * j), vset(q_scale[i]))));
}

// out[i] = out[i] * keep[i] + (weights i . v) * scale * gain[i], for kTileP queries and NV vectors of channels.
template <int NV>
static inline void value_tile(const int16_t (*weight)[kKeys], const int16_t* v, int Kp, const float* scale, const float* keep,
                              const float* gain, float (*out)[kMaxHead]) {
  I acc[kTileP][NV];
  for (int i = 0; i < kTileP; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = izero();
  for (int pair = 0; pair < kKeys / 2; ++pair)
    for (int j = 0; j < NV; ++j) {
      const L line = lload(reinterpret_cast<const uint8_t*>(v + (static_cast<size_t>(pair) * Kp + 16 * j) * 2));
      for (int i = 0; i < kTileP; ++i) acc[i][j] = dot_s16(acc[i][j], line, weight[i] + 2 * pair);
    }
  for (int i = 0; i < kTileP; ++i)
    for (int j = 0; j < NV; ++j) {
      const V part = vmul(itof(acc[i][j]), vmul(vload(scale + 16 * j), vset(gain[i])));
      vstore(out[i] + 16 * j, vfma(vload(out[i] + 16 * j), vset(keep[i]), part));
    }
}

static void attend(const Patches& s, int head, int first, int n, float* out, size_t stride) {
  constexpr int kRoom = 32;  // kQueries in whole vectors
  static_assert(kQueries % kTileQ == 0 && kQueries % kTileP == 0 && kKeys % (16 * kTileK) == 0, "tiles fill the block");
  alignas(64) float o[kQueries][kMaxHead], score[kTileQ][kKeys];
  alignas(64) int16_t weight[kQueries][kKeys];
  alignas(64) float top[kRoom], block_top[kRoom], keep[kRoom], gain[kRoom];
  V total[kQueries], block_total[kQueries];
  const int16_t* q[kQueries];
  float q_scale[kQueries];
  for (int i = 0; i < kRoom; ++i) top[i] = block_top[i] = -INFINITY;
  for (int i = 0; i < kQueries; ++i) {
    // Past the last query the last one is computed again, and not stored.
    const size_t row = static_cast<size_t>(head) * s.N + first + (i < n ? i : n - 1);
    q[i] = s.q + row * s.K;
    q_scale[i] = s.q_scale[row];
    total[i] = vset(0.0f);
    for (int k = 0; k < s.Kp; ++k) o[i][k] = 0.0f;
  }
  const int needed = (n + kTileQ - 1) / kTileQ * kTileQ;  // whole tiles of both kinds: kTileP divides kQueries too
  for (int key = 0; key < s.Np; key += kKeys) {
    const int16_t* k = s.k + (static_cast<size_t>(head) * s.Np + key) * s.K;
    const float* k_scale = s.k_scale + static_cast<size_t>(head) * s.Np + key;
    const int present = s.N - key;
    for (int i = 0; i < needed; i += kTileQ) {
      for (int j = 0; j < kKeys; j += 16 * kTileK)
        score_tile(s, q + i, q_scale + i, k + static_cast<size_t>(j) * s.K, k_scale + j, reinterpret_cast<float(*)[kKeys]>(&score[0][j]));
      for (int r = 0; r < kTileQ; ++r) {
        for (int j = present; j < kKeys; ++j) score[r][j] = -INFINITY;
        V most = vload(score[r]);
        for (int j = 16; j < kKeys; j += 16) most = vmax(most, vload(score[r] + j));
        block_top[i + r] = lane_max(most);
        const V above = vset(block_top[i + r]);
        V sum = vset(0.0f);
        for (int j = 0; j < kKeys; j += 16) {
          const V e = vexp2(vsub(vload(score[r] + j), above));
          sum = vadd(sum, e);
          vstore_s16(weight[i + r] + j, vmul(e, vset(static_cast<float>(kWeightLimit))));
        }
        block_total[i + r] = sum;
      }
    }
    for (int i = 0; i < kRoom; i += 16) {
      const V old = vload(top + i), here = vload(block_top + i), now = vmax(old, here);
      vstore(keep + i, vexp2(vsub(old, now)));
      vstore(gain + i, vexp2(vsub(here, now)));
      vstore(top + i, now);
    }
    for (int i = 0; i < needed; ++i) total[i] = vfma(total[i], vset(keep[i]), vmul(block_total[i], vset(gain[i])));
    const int16_t* v = s.v + (static_cast<size_t>(head) * s.Np + key) * s.Kp;
    const float* scale = s.v_scale + (static_cast<size_t>(head) * (s.Np / kKeys) + key / kKeys) * s.Kp;
    for (int i = 0; i < needed; i += kTileP)
      for (int c = 0; c < s.Kp; c += 80) {
        float(*to)[kMaxHead] = reinterpret_cast<float(*)[kMaxHead]>(&o[i][c]);
        switch (s.Kp - c) {
          case 16: value_tile<1>(weight + i, v + 2 * c, s.Kp, scale + c, keep + i, gain + i, to); break;
          case 32: value_tile<2>(weight + i, v + 2 * c, s.Kp, scale + c, keep + i, gain + i, to); break;
          case 48: value_tile<3>(weight + i, v + 2 * c, s.Kp, scale + c, keep + i, gain + i, to); break;
          case 64: value_tile<4>(weight + i, v + 2 * c, s.Kp, scale + c, keep + i, gain + i, to); break;
          default: value_tile<5>(weight + i, v + 2 * c, s.Kp, scale + c, keep + i, gain + i, to); break;
        }
      }
  }
  for (int i = 0; i < n; ++i) {
    const V inverse = vset(1.0f / lane_sum(total[i]));
    for (int k = 0; k < s.Kp; k += 16) vstore_up_to(out + i * stride + k, vmul(vload(o[i] + k), inverse), s.K - k);
  }
}

#define KIMI_VISION_TABLE(name) {name, layer_norm, gelu, add, place, attend}
