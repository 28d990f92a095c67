// Every kernel, once, over the sixteen-float vector V, the sixteen-int vector I and the 64-byte weight line L.
// Included inside an unnamed namespace after a vec_<isa>.h, so nothing here is shared between instruction sets.

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

// One token's groups into a tile. The quotient is at most 127 (1 + 2^-23), so it never rounds to 128.
static void quantize(const float* x, int groups, uint8_t* tile, int W, int lane) {
  for (int g = 0; g < groups; ++g, x += kGroup, tile += W * kTokenGroup) {
    const V a = vload(x), b = vload(x + 16);
    const float absmax = lane_max(vmax(vabs(a), vabs(b)));
    const V inverse = vset(absmax > 0 ? 127.0f / absmax : 0.0f);
    int8_t* q = reinterpret_cast<int8_t*>(tile) + lane * kGroup;
    const int32_t low = -8 * store_int8(q, vround(vmul(a, inverse)));
    const int32_t whole = low - 8 * store_int8(q + 16, vround(vmul(b, inverse)));
    float* scales = reinterpret_cast<float*>(tile + W * kGroup);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + W);
    scales[lane] = absmax / 127.0f;
    sums[lane] = whole;
    sums[W + lane] = low;
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

// A form says how one group of 16 rows is stored: four pairs of lines, channels 8p..8p+3 and 8p+4..8p+7, and its scales.
// Stored values are unsigned with a bias of 8 << shift, or signed bytes; offsets are minima besides the scale.
struct Q4 {
  static constexpr bool is_signed = false, halves = false, offsets = false;
  static constexpr int shift = 0, bytes = kQ4Run;
  static inline void pair(const uint8_t* run, int p, L* a, L* b) {
    const L line = lload(run + 64 * p);
    *a = llow(line);
    *b = lhigh(line);
  }
  static inline V scale(const uint8_t* run, int) { return vhalf(reinterpret_cast<const uint16_t*>(run + 256)); }
  static inline V offset(const uint8_t*) { return vset(0.0f); }
};

struct Q8 {
  static constexpr bool is_signed = true, halves = false, offsets = false;
  static constexpr int shift = 4, bytes = kQ8Run;
  static inline void pair(const uint8_t* run, int p, L* a, L* b) {
    *a = lload(run + 128 * p);
    *b = lload(run + 128 * p + 64);
  }
  static inline V scale(const uint8_t* run, int) { return vhalf(reinterpret_cast<const uint16_t*>(run + 512)); }
  static inline V offset(const uint8_t*) { return vset(0.0f); }
};

template <bool kHalves, bool kOffsets>
struct Panel {
  static constexpr bool is_signed = true, halves = kHalves, offsets = kOffsets;
  static constexpr int shift = 4, bytes = sizeof(PanelRun);
  static inline void pair(const uint8_t* run, int p, L* a, L* b) { Q8::pair(run, p, a, b); }
  static inline V scale(const uint8_t* run, int half) { return vload(reinterpret_cast<const PanelRun*>(run)->scale[half]); }
  static inline V offset(const uint8_t* run) { return vload(reinterpret_cast<const PanelRun*>(run)->offset); }
};

// NT tokens of a tile of W, from lane `first`.
template <class F, int NT, int W>
static inline void tile_product(const uint8_t* run, const uint8_t* tile, int first, int groups, float* out, size_t stride) {
  constexpr bool biased = !F::is_signed || bias_s8 != 0;
  constexpr int chains = NT == 1 && !F::halves ? 2 : 1;  // a single token's products would wait for each other
  Sums<NT> sums;
  for (int g = 0; g < groups; ++g, run += F::bytes, tile += W * kTokenGroup) {
    const int8_t* x = reinterpret_cast<const int8_t*>(tile) + first * kGroup;
    const float* scale = reinterpret_cast<const float*>(tile + W * kGroup) + first;
    const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4)) + first;
    I low[NT], high[NT];  // of channels 0-15 and 16-31, or of odd and even lines, or low alone
    for (int t = 0; t < NT; ++t) {
      const int32_t whole = sum[t], part = sum[W + t];
      low[t] = biased ? ishl<F::shift>(iset(F::halves ? part : whole)) : izero();
      high[t] = biased && F::halves ? ishl<F::shift>(iset(whole - part)) : izero();
    }
    for (int p = 0; p < 4; ++p) {
      L a, b;
      F::pair(run, p, &a, &b);
      I* first_sum = F::halves && p >= 2 ? high : low;
      I* second_sum = F::halves ? first_sum : chains == 2 ? high : low;
      for (int t = 0; t < NT; ++t) {
        const int8_t* at = x + t * kGroup + 8 * p;
        first_sum[t] = F::is_signed ? dot_s8(first_sum[t], a, at) : dot_u7(first_sum[t], a, at);
        second_sum[t] = F::is_signed ? dot_s8(second_sum[t], b, at + 4) : dot_u7(second_sum[t], b, at + 4);
      }
    }
    const V ws = F::scale(run, 0);
    for (int t = 0; t < NT; ++t) {
      const V xs = vset(scale[t]);
      if (chains == 2) low[t] = iadd(low[t], high[t]);
      sums.acc[t] = vfma(itof(low[t]), vmul(ws, xs), sums.acc[t]);
      if (F::halves) sums.acc[t] = vfma(itof(high[t]), vmul(F::scale(run, 1), xs), sums.acc[t]);
      if (F::offsets)  // sum holds -8 times the sum
        sums.acc[t] = vfma(vset(-0.125f * static_cast<float>(sum[t])), vmul(F::offset(run), xs), sums.acc[t]);
    }
    sums.end_of_group(g, groups);
  }
  for (int t = 0; t < NT; ++t) vstore(out + t * stride, sums.total[t]);
}

// kBatch tokens at once is what an instruction set's registers hold.
template <class F>
static void block(const void* w, const uint8_t* tile, int groups, int W, float* out, size_t stride) {
  const auto* run = static_cast<const uint8_t*>(w);
  if (W == 8)
    for (int first = 0; first < 8; first += kBatch)
      tile_product<F, kBatch, 8>(run, tile, first, groups, out + first * stride, stride);
  else if (W == 4) tile_product<F, 4, 4>(run, tile, 0, groups, out, stride);
  else if (W == 2) tile_product<F, 2, 2>(run, tile, 0, groups, out, stride);
  else tile_product<F, 1, 1>(run, tile, 0, groups, out, stride);
}

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

static void float_to_half(const float* x, int n, uint16_t* out) {
  for (int k = 0; k < n; k += 16) store_half(out + k, vload(x + k));
}

// Scores of H heads against P cached rows, and their sums over the rows with weights: a cached row is converted once for
// all heads, and H x P (or H x 4) chains hide each other's latency.
template <int H, int P>
static inline void scores(const float* q, const float* qr, const uint16_t* cache, const uint16_t* rope, int C, int R,
                          float scale, float (*score)[kBlock], int j) {
  V acc[H][P];
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < P; ++i) acc[h][i] = vset(0.0f);
  for (int k = 0; k < C; k += 16) {
    V c[P];
    for (int i = 0; i < P; ++i) c[i] = vhalf(cache + static_cast<size_t>(i) * C + k);
    for (int h = 0; h < H; ++h) {
      const V qk = vload(q + static_cast<size_t>(h) * C + k);
      for (int i = 0; i < P; ++i) acc[h][i] = vfma(qk, c[i], acc[h][i]);
    }
  }
  for (int k = 0; k < R; k += 16) {
    V c[P];
    for (int i = 0; i < P; ++i) c[i] = vhalf(rope + static_cast<size_t>(i) * R + k);
    for (int h = 0; h < H; ++h) {
      const V qk = vload(qr + static_cast<size_t>(h) * R + k);
      for (int i = 0; i < P; ++i) acc[h][i] = vfma(qk, c[i], acc[h][i]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int i = 0; i < P; ++i) score[h][j + i] = scale * lane_sum(acc[h][i]);
}

template <int H>
static inline void attend_heads(const float* q, const float* qr, const uint16_t* cache, const uint16_t* rope, int m, int C,
                                int R, float scale, float* top, float* total, float* u) {
  for (int h = 0; h < H; ++h) {
    top[h] = -INFINITY;
    total[h] = 0.0f;
    for (int k = 0; k < C; k += 16) vstore(u + static_cast<size_t>(h) * C + k, vset(0.0f));
  }
  // Online softmax over blocks of kBlock positions counted from position 0, so that the bits depend on the position
  // alone and not on how the prompt was cut.
  for (int start = 0; start < m; start += kBlock, cache += static_cast<size_t>(kBlock) * C, rope += static_cast<size_t>(kBlock) * R) {
    const int n = m - start < kBlock ? m - start : kBlock;
    float score[H][kBlock], keep[H][16];
    int j = 0;
    for (; j + 4 <= n; j += 4)
      scores<H, 4>(q, qr, cache + static_cast<size_t>(j) * C, rope + static_cast<size_t>(j) * R, C, R, scale, score, j);
    for (; j < n; ++j)
      scores<H, 1>(q, qr, cache + static_cast<size_t>(j) * C, rope + static_cast<size_t>(j) * R, C, R, scale, score, j);
    for (int h = 0; h < H; ++h) {
      float block_top = top[h];
      for (int i = 0; i < n; ++i) block_top = score[h][i] > block_top ? score[h][i] : block_top;
      for (int i = n; i < kBlock; ++i) score[h][i] = -INFINITY;
      for (int i = 0; i < kBlock; i += 16) vstore(score[h] + i, vexp(vsub(vload(score[h] + i), vset(block_top))));
      float block_total = 0.0f;
      for (int i = 0; i < n; ++i) block_total += score[h][i];
      vstore(keep[h], vexp(vset(top[h] - block_top)));  // 1 when the top stays; the first block keeps nothing of nothing
      total[h] = __builtin_fmaf(total[h], keep[h][0], block_total);
      top[h] = block_top;
    }
    for (int k = 0; k < C; k += 64) {
      const int vectors = C - k < 64 ? (C - k) / 16 : 4;
      V acc[H][4];
      for (int h = 0; h < H; ++h)
        for (int v = 0; v < vectors; ++v)
          acc[h][v] = vmul(vload(u + static_cast<size_t>(h) * C + k + 16 * v), vset(keep[h][0]));
      if (vectors == 4) {
        for (int i = 0; i < n; ++i) {
          V c[4];
          for (int v = 0; v < 4; ++v) c[v] = vhalf(cache + static_cast<size_t>(i) * C + k + 16 * v);
          for (int h = 0; h < H; ++h) {
            const V weight = vset(score[h][i]);
            for (int v = 0; v < 4; ++v) acc[h][v] = vfma(weight, c[v], acc[h][v]);
          }
        }
      } else {
        for (int i = 0; i < n; ++i)
          for (int v = 0; v < vectors; ++v) {
            const V c = vhalf(cache + static_cast<size_t>(i) * C + k + 16 * v);
            for (int h = 0; h < H; ++h) acc[h][v] = vfma(vset(score[h][i]), c, acc[h][v]);
          }
      }
      for (int h = 0; h < H; ++h)
        for (int v = 0; v < vectors; ++v) vstore(u + static_cast<size_t>(h) * C + k + 16 * v, acc[h][v]);
    }
  }
}

static void attend(const float* q, const float* qr, int heads, const uint16_t* cache, const uint16_t* rope, int m, int C,
                   int R, float scale, float* top, float* total, float* u) {
  if (heads == 4) return attend_heads<4>(q, qr, cache, rope, m, C, R, scale, top, total, u);
  for (int h = 0; h < heads; ++h)
    attend_heads<1>(q + static_cast<size_t>(h) * C, qr + static_cast<size_t>(h) * R, cache, rope, m, C, R, scale, top + h,
                    total + h, u + static_cast<size_t>(h) * C);
}

static void attend_join(float* top, float* total, float* u, float later_top, float later_total, const float* later_u, int C) {
  const float most = *top > later_top ? *top : later_top;
  float keep[16], take[16];
  vstore(keep, vexp(vset(*top - most)));
  vstore(take, vexp(vset(later_top - most)));
  *top = most;
  *total = __builtin_fmaf(later_total, take[0], *total * keep[0]);
  for (int k = 0; k < C; k += 16)
    vstore(u + k, vfma(vset(take[0]), vload(later_u + k), vmul(vset(keep[0]), vload(u + k))));
}

#define KIMI_TABLE(name, runs_here)                                                                                   \
  {name, runs_here, {block<Q4>, block<Q8>, block<Panel<false, false>>, block<Panel<true, false>>, block<Panel<false, true>>}, \
   quantize, dot, half_to_float, float_to_half, rms_norm, silu_mul, sigmoid, axpy, attend, attend_join}
