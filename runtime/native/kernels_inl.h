// Every kernel, once, over the sixteen-float vector V, the sixteen-int vector I and the 64-byte weight line L.
// Included inside an unnamed namespace after a vec_<isa>.h, so nothing here is shared between instruction sets.

#include "vec_exp.h"

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

// A form says how 16 rows are stored: where group g's run lies, its four pairs of lines (channels 8p..8p+3 and
// 8p+4..8p+7), and its scales. Stored values are unsigned with a bias of 8 << shift (none if shift is negative), or
// signed bytes. Halves have a scale each; offsets are minima besides the scale.
struct Symmetric {
  static constexpr bool is_signed = false, halves = false, offsets = false;
  static inline V offset(const uint8_t*, int) { return vset(0.0f); }
};

struct Q4 : Symmetric {
  static constexpr int shift = 0, bytes = kQ4Run;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, L* a, L* b) {
    const L line = lload(run + 64 * p);
    *a = llow(line);
    *b = lhigh(line);
  }
  static inline V scale(const uint8_t* w, int g, int) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 256)); }
};

struct Q8 : Symmetric {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4, bytes = kQ8Run;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, L* a, L* b) {
    *a = lload(run + 128 * p);
    *b = lload(run + 128 * p + 64);
  }
  static inline V scale(const uint8_t* w, int g, int) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 512)); }
};

struct Q5 : Symmetric {
  static constexpr int shift = 1, bytes = kQ5Run;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, L* a, L* b) {  // line j's fifth bits are the bits j of one line
    const L bits = lload(run + 256);
    Q4::pair<p>(run, a, b);
    *a = lor(*a, lbit<2 * p>(bits));
    *b = lor(*b, lbit<2 * p + 1>(bits));
  }
  static inline V scale(const uint8_t* w, int g, int) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 320)); }
};

struct I4 : Q4 {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4;
  template <int p>
  static inline void pair(const uint8_t* run, L* a, L* b) {
    Q4::pair<p>(run, a, b);
    *a = lcode(*a);
    *b = lcode(*b);
  }
};

struct Q4K : Q4 {
  static constexpr bool offsets = true;
  static constexpr int shift = -1, bytes = kQ4KRun;
  static inline const uint8_t* head(const uint8_t* w, int g) { return w + static_cast<size_t>(g / 8) * (kQ4KHead + 8 * kQ4KRun); }
  static inline const uint8_t* run(const uint8_t* w, int g) { return head(w, g) + kQ4KHead + g % 8 * kQ4KRun; }
  static inline V scale(const uint8_t* w, int g, int) {
    return vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g))), load_uint8(run(w, g) + 256));
  }
  static inline V offset(const uint8_t* w, int g) {
    return vsub(vset(0.0f), vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g) + 32)), load_uint8(run(w, g) + 272)));
  }
};

struct Q6K : Q4 {
  static constexpr bool halves = true;
  static constexpr int shift = 2, bytes = kQ6KRun;
  static inline const uint8_t* head(const uint8_t* w, int g) { return w + static_cast<size_t>(g / 8) * (kQ6KHead + 8 * kQ6KRun); }
  static inline const uint8_t* run(const uint8_t* w, int g) { return head(w, g) + kQ6KHead + g % 8 * kQ6KRun; }
  template <int p>
  static inline void pair(const uint8_t* run, L* a, L* b) {  // line j's upper bits are the bit pairs j % 4 of line j / 4
    const L bits = lload(run + 256 + 64 * (p / 2));
    Q4::pair<p>(run, a, b);
    *a = lor(*a, ltwo<2 * p % 4>(bits));
    *b = lor(*b, ltwo<2 * p % 4 + 1>(bits));
  }
  static inline V scale(const uint8_t* w, int g, int half) {
    return vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g))), load_int8(run(w, g) + 384 + 16 * half));
  }
};

template <bool kHalves, bool kOffsets>
struct Panel : Q8 {
  static constexpr bool halves = kHalves, offsets = kOffsets;
  static constexpr int bytes = sizeof(PanelRun);
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  static inline const PanelRun* panel(const uint8_t* w, int g) { return reinterpret_cast<const PanelRun*>(run(w, g)); }
  static inline V scale(const uint8_t* w, int g, int half) { return vload(panel(w, g)->scale[half]); }
  static inline V offset(const uint8_t* w, int g) { return vload(panel(w, g)->offset); }
};

// A single token is as fast as memory: its weights are asked for this many bytes ahead, across the ends of pages, where
// the processor's own prefetching stops. They are used once, so they should not push everything else out of the caches.
constexpr int kAhead = 4096;

// Two lines of one group times NT tokens. Sums: channels 0-15 in low and 16-31 in high where halves have scales of
// their own; one token's even and odd lines, so that its products do not wait for each other; else all in low.
template <class F, int NT, int p>
static inline void pair_product(const uint8_t* run, const int8_t* x, I* low, I* high) {
  L a, b;
  F::template pair<p>(run, &a, &b);
  I* first = F::halves && p >= 2 ? high : low;
  I* second = F::halves ? first : NT == 1 ? high : low;
  for (int t = 0; t < NT; ++t) {
    const int8_t* at = x + t * kGroup + 8 * p;
    first[t] = F::is_signed ? dot_s8(first[t], a, at) : dot_u7(first[t], a, at);
    second[t] = F::is_signed ? dot_s8(second[t], b, at + 4) : dot_u7(second[t], b, at + 4);
  }
}

// NT tokens of a tile of W, from lane `first`.
template <class F, int NT, int W>
static inline void tile_product(const uint8_t* w, const uint8_t* tile, int first, int groups, float* out, size_t stride) {
  constexpr bool biased = F::is_signed ? bias_s8 != 0 : F::shift >= 0;
  constexpr int shift = F::shift >= 0 ? F::shift : 0;
  Sums<NT> sums;
  for (int g = 0; g < groups; ++g, tile += W * kTokenGroup) {
    const uint8_t* run = F::run(w, g);
    const int8_t* x = reinterpret_cast<const int8_t*>(tile) + first * kGroup;
    const float* scale = reinterpret_cast<const float*>(tile + W * kGroup) + first;
    const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4)) + first;
    if (NT == 1)
      for (int line = 0; line < F::bytes; line += 64) __builtin_prefetch(run + kAhead + line, 0, 0);
    I low[NT], high[NT];
    for (int t = 0; t < NT; ++t) {
      const int32_t whole = sum[t], part = sum[W + t];  // -8 times the sums
      low[t] = biased ? ishl<shift>(iset(F::halves ? part : whole)) : izero();
      high[t] = biased && F::halves ? ishl<shift>(iset(whole - part)) : izero();
    }
    pair_product<F, NT, 0>(run, x, low, high);
    pair_product<F, NT, 1>(run, x, low, high);
    pair_product<F, NT, 2>(run, x, low, high);
    pair_product<F, NT, 3>(run, x, low, high);
    const V ws = F::scale(w, g, 0);
    for (int t = 0; t < NT; ++t) {
      const V xs = vset(scale[t]);
      if (NT == 1 && !F::halves) low[t] = iadd(low[t], high[t]);
      sums.acc[t] = vfma(itof(low[t]), vmul(ws, xs), sums.acc[t]);
      if (F::halves) sums.acc[t] = vfma(itof(high[t]), vmul(F::scale(w, g, 1), xs), sums.acc[t]);
      if (F::offsets) sums.acc[t] = vfma(vset(-0.125f * static_cast<float>(sum[t])), vmul(F::offset(w, g), xs), sums.acc[t]);
    }
    sums.end_of_group(g, groups);
  }
  for (int t = 0; t < NT; ++t) vstore(out + t * stride, sums.total[t]);
}

// kBatch tokens at once is what an instruction set's registers hold.
template <class F>
static void block(const void* w, const uint8_t* tile, int groups, int W, float* out, size_t stride) {
  const auto* run = static_cast<const uint8_t*>(w);  // the row block's first
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

static void residual(const float* x, const uint8_t* tile, int W, int lane, float* out) {
  const V scale = vset(-reinterpret_cast<const float*>(tile + W * kGroup)[lane]);
  for (int k = 0; k < kGroup; k += 16) vstore(out + k, vfma(scale, load_int8(tile + lane * kGroup + k), vload(x + k)));
}

static float softmax(float* s, int n, float scale) {
  const int padded = (n + kGroup - 1) / kGroup * kGroup;
  for (int k = n; k < padded; ++k) s[k] = -INFINITY;
  V top = vload(s);
  for (int k = 16; k < padded; k += 16) top = vmax(top, vload(s + k));
  const V most = vset(lane_max(top)), by = vset(scale);
  for (int k = 0; k < padded; k += 16) vstore(s + k, vexp(vmul(by, vsub(vload(s + k), most))));
  for (int k = n; k < padded; ++k) s[k] = 0.0f;
  V total = vset(0.0f);
  for (int k = 0; k < padded; k += 16) total = vadd(total, vload(s + k));
  return lane_sum(total);
}

// Scale in float16, and the factor that takes a value to its step; a group of zeros, or of values too small for a
// float16 scale, is stored as zeros.
static inline V step_of(V absmax, uint16_t* halves) {
  store_half(halves, vmul(absmax, vset(1.0f / 127.0f)));
  return vdiv(vset(1.0f), vmax(vhalf(halves), vset(1e-30f)));
}
static inline V to_step(V x, V inverse) { return vround(vmax(vmin(vmul(x, inverse), vset(127.0f)), vset(-127.0f))); }

static void store_row(const float* x, int groups, uint8_t* block, int r) {
  for (int g = 0; g < groups; ++g, x += kGroup, block += kQ8Run) {
    const V a = vload(x), b = vload(x + 16);
    uint16_t halves[16];
    const V inverse = step_of(vset(lane_max(vmax(vabs(a), vabs(b)))), halves);
    int8_t q[kGroup];
    store_int8(q, to_step(a, inverse));
    store_int8(q + 16, to_step(b, inverse));
    for (int j = 0; j < 8; ++j) __builtin_memcpy(block + 64 * j + 4 * r, q + 4 * j, 4);
    __builtin_memcpy(block + 512 + 2 * r, halves, 2);
  }
}

static void turn_rows(const uint8_t* rows, size_t block_stride, int first, int n, int C, uint8_t* out, size_t out_stride) {
  for (int b = 0; b < C / kRows; ++b, out += out_stride) {
    V value[kGroup], absmax = vset(0.0f);
    for (int i = 0; i < n; ++i) {
      const uint8_t* run = rows + (first + i) / kRows * block_stride + static_cast<size_t>(b / 2) * kQ8Run;
      const int r = (first + i) % kRows;
      uint8_t bytes[16];
      for (int j = 0; j < 4; ++j) __builtin_memcpy(bytes + 4 * j, run + 64 * (b % 2 * 4 + j) + 4 * r, 4);
      value[i] = vmul(vset(half_value(run + 512 + 2 * r)), load_int8(bytes));
      absmax = vmax(absmax, vabs(value[i]));
    }
    for (int i = n; i < kGroup; ++i) value[i] = vset(0.0f);
    uint16_t halves[16];
    const V inverse = step_of(absmax, halves);
    for (int j = 0; j < 8; ++j)
      store_four(out + 64 * j, to_step(value[4 * j], inverse), to_step(value[4 * j + 1], inverse),
                 to_step(value[4 * j + 2], inverse), to_step(value[4 * j + 3], inverse));
    __builtin_memcpy(out + 512, halves, 32);
  }
}

#define KIMI_TABLE(name, runs_here)                                                                                   \
  {name, runs_here, {block<Q4>, block<Q8>, block<Q5>, block<I4>, block<Q4K>, block<Q6K>, block<Panel<false, false>>, block<Panel<true, false>>, block<Panel<false, true>>}, \
   quantize, dot, half_to_float, rms_norm, silu_mul, sigmoid, axpy, residual, softmax, store_row, turn_rows}
