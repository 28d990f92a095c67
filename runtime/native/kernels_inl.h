// Every kernel, once, over the sixteen-float vector V, the sixteen-int vector I and the 64-byte weight line L.
// Included inside an unnamed namespace after a vec_<isa>.h, so nothing here is shared between instruction sets.

// Sum of the lanes in one fixed tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
static inline float lane_sum(V x) {
  float v[16];
  vstore(v, x);
  for (int half = 8; half; half /= 2)
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  return v[0];
}

static inline float lane_max(V x) {
  float v[16], m;
  vstore(v, x);
  m = v[0];
  for (int k = 1; k < 16; ++k) m = v[k] > m ? v[k] : m;
  return m;
}

// e^x to about one unit in the last place on [-87, 88], clamped outside: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial
// of degree 6 in r (Taylor, whose first dropped term r^7/5040 is below 2^-27), then 2^n. ln 2 is split in two so that
// n ln 2 is subtracted exactly.
static inline V vexp(V x) {
  x = vmin(vmax(x, vset(-87.0f)), vset(88.0f));
  const V n = vround(vmul(x, vset(1.44269504088896341f)));
  V r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.0f / 720);
  p = vfma(p, r, vset(1.0f / 120));
  p = vfma(p, r, vset(1.0f / 24));
  p = vfma(p, r, vset(1.0f / 6));
  p = vfma(p, r, vset(0.5f));
  p = vfma(p, r, vset(1.0f));
  p = vfma(p, r, vset(1.0f));
  return vmul(p, vpow2(n));
}

static inline V vsigmoid(V x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vset(0.0f), x)))); }

static void quantize_row(const float* x, int n, int8_t* q, float* scale, int32_t* sum) {
  for (int g = 0; g < n / kGroup; ++g, x += kGroup, q += kGroup) {
    const V a = vload(x), b = vload(x + 16);
    const float absmax = lane_max(vmax(vabs(a), vabs(b)));
    scale[g] = absmax / 127.0f;
    // Dividing by the stored scale could round to 128 only if the scale were too small by half a step in 127: it is
    // correctly rounded, so the quotient is at most 127 (1 + 2^-23).
    const V inverse = vset(absmax > 0 ? 127.0f / absmax : 0.0f);
    float v[32];
    vstore(v, vround(vmul(a, inverse)));
    vstore(v + 16, vround(vmul(b, inverse)));
    int32_t s = 0;
    for (int k = 0; k < kGroup; ++k) {
      q[k] = static_cast<int8_t>(v[k]);
      s += q[k];
    }
    sum[g] = s;
  }
}

// The running sums of NT tokens: total over finished chunks, acc inside the present one.
template <int NT>
struct Sums {
  V total[NT], acc[NT];
  Sums() { for (int t = 0; t < NT; ++t) total[t] = acc[t] = vset(0.0f); }
  void end_of_group(int g, int groups) {
    if (g % kChunk == kChunk - 1 || g == groups - 1)
      for (int t = 0; t < NT; ++t) {
        total[t] = vadd(total[t], acc[t]);
        acc[t] = vset(0.0f);
      }
  }
};

template <int NT>
static void q4_tile(const uint8_t* w, const Activations& a, const int32_t* tokens, float* out, size_t stride) {
  const int8_t* x[NT];
  const float* xs[NT];
  const int32_t* sum[NT];
  for (int t = 0; t < NT; ++t) {
    x[t] = a.q + static_cast<size_t>(tokens[t]) * a.groups * kGroup;
    xs[t] = a.scale + static_cast<size_t>(tokens[t]) * a.groups;
    sum[t] = a.sum + static_cast<size_t>(tokens[t]) * a.groups;
  }
  Sums<NT> sums;
  for (int g = 0; g < a.groups; ++g, w += kQ4Run) {
    I lo[NT], hi[NT];  // two chains, so that one token's products do not wait for each other
    for (int t = 0; t < NT; ++t) lo[t] = hi[t] = izero();
    for (int j = 0; j < 4; ++j) {
      const L line = lload(w + 64 * j), low = llow(line), high = lhigh(line);
      for (int t = 0; t < NT; ++t) {
        lo[t] = dot_u4(lo[t], low, x[t] + g * kGroup + 8 * j);
        hi[t] = dot_u4(hi[t], high, x[t] + g * kGroup + 8 * j + 4);
      }
    }
    const V ws = vhalf(reinterpret_cast<const uint16_t*>(w + 256));
    for (int t = 0; t < NT; ++t) {
      const V isum = itof(isubs(iadd(lo[t], hi[t]), 8 * sum[t][g]));
      sums.acc[t] = vfma(isum, vmul(ws, vset(xs[t][g])), sums.acc[t]);
    }
    sums.end_of_group(g, a.groups);
  }
  for (int t = 0; t < NT; ++t) vstore(out + t * stride, sums.total[t]);
}

template <int NT>
static void q8_tile(const uint8_t* w, const Activations& a, const int32_t* tokens, float* out, size_t stride) {
  Sums<NT> sums;
  for (int g = 0; g < a.groups; ++g, w += kQ8Run) {
    I isum[NT];
    for (int t = 0; t < NT; ++t) isum[t] = izero();
    for (int j = 0; j < 8; ++j) {
      const L line = lload(w + 64 * j);
      for (int t = 0; t < NT; ++t)
        isum[t] = dot_s8(isum[t], line, a.q + (static_cast<size_t>(tokens[t]) * a.groups + g) * kGroup + 4 * j);
    }
    const V ws = vhalf(reinterpret_cast<const uint16_t*>(w + 512));
    for (int t = 0; t < NT; ++t) {
      const size_t at = static_cast<size_t>(tokens[t]) * a.groups + g;
      sums.acc[t] = vfma(itof(isubs(isum[t], bias_s8 * a.sum[at])), vmul(ws, vset(a.scale[at])), sums.acc[t]);
    }
    sums.end_of_group(g, a.groups);
  }
  for (int t = 0; t < NT; ++t) vstore(out + t * stride, sums.total[t]);
}

template <int NT>
static void panel_tile(const PanelRun* w, bool halves, bool offsets, const Activations& a, const int32_t* tokens,
                       float* out, size_t stride) {
  Sums<NT> sums;
  for (int g = 0; g < a.groups; ++g, ++w) {
    I isum[2][NT];
    for (int t = 0; t < NT; ++t) isum[0][t] = isum[1][t] = izero();
    for (int j = 0; j < 8; ++j) {
      const L line = lload(reinterpret_cast<const uint8_t*>(w->q) + 64 * j);
      for (int t = 0; t < NT; ++t)
        isum[j / 4][t] =
            dot_s8(isum[j / 4][t], line, a.q + (static_cast<size_t>(tokens[t]) * a.groups + g) * kGroup + 4 * j);
    }
    for (int t = 0; t < NT; ++t) {
      const size_t at = static_cast<size_t>(tokens[t]) * a.groups + g;
      const V xs = vset(a.scale[at]);
      if (halves) {
        int32_t first = 0;
        if (bias_s8)
          for (int k = 0; k < 16; ++k) first += a.q[at * kGroup + k];
        const I low = isubs(isum[0][t], bias_s8 * first), high = isubs(isum[1][t], bias_s8 * (a.sum[at] - first));
        sums.acc[t] = vfma(itof(low), vmul(vload(w->scale[0]), xs), sums.acc[t]);
        sums.acc[t] = vfma(itof(high), vmul(vload(w->scale[1]), xs), sums.acc[t]);
      } else {
        const I whole = isubs(iadd(isum[0][t], isum[1][t]), bias_s8 * a.sum[at]);
        sums.acc[t] = vfma(itof(whole), vmul(vload(w->scale[0]), xs), sums.acc[t]);
      }
      if (offsets) sums.acc[t] = vfma(vset(static_cast<float>(a.sum[at])), vmul(vload(w->offset), xs), sums.acc[t]);
    }
    sums.end_of_group(g, a.groups);
  }
  for (int t = 0; t < NT; ++t) vstore(out + t * stride, sums.total[t]);
}

// Tiles of 8, then 4, 2, 1 tokens: a weight line is unpacked once a tile. Eight tokens keep 8 x (total, acc, two
// integer sums) = 32 vectors alive, which is what AVX-512 has; AVX2 spills the totals, touched once in 8 groups.
#define TILES(call)                                        \
  for (; n >= 8; n -= 8, tokens += 8, out += 8 * stride) call(8); \
  if (n >= 4) { call(4); n -= 4; tokens += 4; out += 4 * stride; } \
  if (n >= 2) { call(2); n -= 2; tokens += 2; out += 2 * stride; } \
  if (n) call(1);

static void q4_block(const uint8_t* w, const Activations& a, const int32_t* tokens, int n, float* out, size_t stride) {
#define CALL(NT) q4_tile<NT>(w, a, tokens, out, stride)
  TILES(CALL)
#undef CALL
}

static void q8_block(const uint8_t* w, const Activations& a, const int32_t* tokens, int n, float* out, size_t stride) {
#define CALL(NT) q8_tile<NT>(w, a, tokens, out, stride)
  TILES(CALL)
#undef CALL
}

static void panel_block(const PanelRun* w, bool halves, bool offsets, const Activations& a, const int32_t* tokens,
                        int n, float* out, size_t stride) {
#define CALL(NT) panel_tile<NT>(w, halves, offsets, a, tokens, out, stride)
  TILES(CALL)
#undef CALL
}
#undef TILES

static float dot(const float* a, const float* b, int n) {
  V acc = vset(0.0f);
  for (int k = 0; k < n; k += 16) acc = vfma(vload(a + k), vload(b + k), acc);
  return lane_sum(acc);
}

static void half_to_float(const uint16_t* x, int n, float* out) {
  for (int k = 0; k < n; k += 16) vstore(out + k, vhalf(x + k));
}

static void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const V r = vset(1.0f / __builtin_sqrtf(mean + eps));
  for (int k = 0; k < n; k += 16) vstore(out + k, vmul(vmul(vload(x + k), r), vload(weight + k)));
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
  for (int k = 0; k < n; k += 16) {
    const V g = vload(gate + k);
    vstore(out + k, vmul(vmul(g, vsigmoid(g)), vload(up + k)));
  }
}

static void sigmoid(const float* x, int n, float* out) {
  for (int k = 0; k < n; k += 16) vstore(out + k, vsigmoid(vload(x + k)));
}

static void axpy(float a, const float* x, int n, float* y) {
  for (int k = 0; k < n; k += 16) vstore(y + k, vfma(vset(a), vload(x + k), vload(y + k)));
}

// Online softmax over blocks of 64 positions counted from position 0, so the bits depend on the position alone and not
// on how the prompt was cut.
static void attend(const float* q, const float* qr, const uint16_t* cache, const uint16_t* rope, int n, int C, int R,
                   float scale, float* u) {
  constexpr int kBlock = 64;
  float total = 0.0f, top = -INFINITY;
  for (int k = 0; k < C; k += 16) vstore(u + k, vset(0.0f));
  for (int start = 0; start < n; start += kBlock) {
    const int m = n - start < kBlock ? n - start : kBlock;
    float score[kBlock];
    for (int j = 0; j < m; j += 4) {  // four rows at once hide the latency of one row's chain
      V acc[4];
      const uint16_t *c[4], *r[4];
      for (int i = 0; i < 4; ++i) {
        const size_t row = static_cast<size_t>(start) + (j + i < m ? j + i : m - 1);
        c[i] = cache + row * C;
        r[i] = rope + row * R;
        acc[i] = vset(0.0f);
      }
      for (int k = 0; k < C; k += 16) {
        const V qk = vload(q + k);
        for (int i = 0; i < 4; ++i) acc[i] = vfma(qk, vhalf(c[i] + k), acc[i]);
      }
      for (int k = 0; k < R; k += 16) {
        const V qk = vload(qr + k);
        for (int i = 0; i < 4; ++i) acc[i] = vfma(qk, vhalf(r[i] + k), acc[i]);
      }
      for (int i = 0; i < 4 && j + i < m; ++i) score[j + i] = scale * lane_sum(acc[i]);
    }
    float block_top = top;
    for (int j = 0; j < m; ++j) block_top = score[j] > block_top ? score[j] : block_top;
    for (int j = m; j < kBlock; ++j) score[j] = -INFINITY;
    float weight[kBlock];
    for (int j = 0; j < kBlock; j += 16) vstore(weight + j, vexp(vsub(vload(score + j), vset(block_top))));
    float block_total = 0.0f;
    for (int j = 0; j < m; ++j) block_total += weight[j];
    float keep[16];
    vstore(keep, vexp(vset(top - block_top)));  // 1 when the top stays; the first block keeps nothing of nothing
    total = __builtin_fmaf(total, keep[0], block_total);
    for (int k = 0; k < C; k += 16) {
      V acc = vmul(vload(u + k), vset(keep[0]));
      for (int j = 0; j < m; ++j) acc = vfma(vset(weight[j]), vhalf(cache + (static_cast<size_t>(start) + j) * C + k), acc);
      vstore(u + k, acc);
    }
    top = block_top;
  }
  const V inverse = vset(1.0f / total);
  for (int k = 0; k < C; k += 16) vstore(u + k, vmul(vload(u + k), inverse));
}

#define KIMI_TABLE(name, runs_here)                                                                                  \
  {name, runs_here, quantize_row, q4_block, q8_block, panel_block, dot, half_to_float, rms_norm, silu_mul, sigmoid, \
   axpy, attend}
