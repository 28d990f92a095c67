// Products of weights with quantized activations, over a vector V of some rows of a block's 16, as many integers I, and the
// line L of 4 channels of each. Included by kernels_inl.h in a namespace of its own.

// The running sums of NT tokens: total over finished chunks, acc inside the present one.
template <int NT>
struct Sums {
  V total[NT], acc[NT];
  Sums() { for (int t = 0; t < NT; ++t) total[t] = acc[t] = vset(0.0f); }
  void end_of_group(int g, int groups) {
    if (g % kChunk == kChunk - 1 || g == groups - 1)
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) {
        total[t] = vadd(total[t], acc[t]);
        acc[t] = vset(0.0f);
      }
  }
};

// A form says how 16 rows are stored: where group g's run lies, its four pairs of lines (channels 8p..8p+3 and
// 8p+4..8p+7), and its scales, each from row r on. Stored values are unsigned, at most `most`, with a bias of 8 << shift
// (none if shift is negative), or signed bytes. Halves have a scale each; offsets are minima besides the scale.
// Signed weights of activations that are never negative, as a softmax's are, can be easier to multiply: `positive`.
struct Symmetric {
  static constexpr bool is_signed = false, positive = false, halves = false, offsets = false;
  static inline V offset(const uint8_t*, int, int) { return vset(0.0f); }
};

struct Q4 : Symmetric {
  static constexpr int shift = 0, bytes = kQ4Run, most = 15;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, int r, L* a, L* b) {
    const L line = lload(run + 64 * p + 4 * r);
    *a = llow(line);
    *b = lhigh(line);
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 256) + r); }
};

struct Q8 : Symmetric {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4, bytes = kQ8Run, most = 127;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, int r, L* a, L* b) {
    *a = lload(run + 128 * p + 4 * r);
    *b = lload(run + 128 * p + 64 + 4 * r);
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 512) + r); }
};

struct Q8Positive : Q8 {
  static constexpr bool positive = true;
};

struct Q5 : Symmetric {
  static constexpr int shift = 1, bytes = kQ5Run, most = 31;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int p>
  static inline void pair(const uint8_t* run, int r, L* a, L* b) {  // line j's fifth bits are the bits j of one line
    const L bits = lload(run + 256 + 4 * r);
    Q4::pair<p>(run, r, a, b);
    *a = lor(*a, lbit<2 * p>(bits));
    *b = lor(*b, lbit<2 * p + 1>(bits));
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 320) + r); }
};

struct I4 : Q4 {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4;
  template <int p>
  static inline void pair(const uint8_t* run, int r, L* a, L* b) {
    Q4::pair<p>(run, r, a, b);
    *a = lcode(*a);
    *b = lcode(*b);
  }
};

struct Q4K : Q4 {
  static constexpr bool offsets = true;
  static constexpr int shift = -1, bytes = kQ4KRun;
  static inline const uint8_t* head(const uint8_t* w, int g) { return w + static_cast<size_t>(g / 8) * (kQ4KHead + 8 * kQ4KRun); }
  static inline const uint8_t* run(const uint8_t* w, int g) { return head(w, g) + kQ4KHead + g % 8 * kQ4KRun; }
  static inline V scale(const uint8_t* w, int g, int, int r) {
    return vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g)) + r), load_uint8(run(w, g) + 256 + r));
  }
  static inline V offset(const uint8_t* w, int g, int r) {
    return vsub(vset(0.0f), vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g) + 32) + r), load_uint8(run(w, g) + 272 + r)));
  }
};

struct Q6K : Q4 {
  static constexpr bool halves = true;
  static constexpr int shift = 2, bytes = kQ6KRun, most = 63;
  static inline const uint8_t* head(const uint8_t* w, int g) { return w + static_cast<size_t>(g / 8) * (kQ6KHead + 8 * kQ6KRun); }
  static inline const uint8_t* run(const uint8_t* w, int g) { return head(w, g) + kQ6KHead + g % 8 * kQ6KRun; }
  template <int p>
  static inline void pair(const uint8_t* run, int r, L* a, L* b) {  // line j's upper bits are the bit pairs j % 4 of line j / 4
    const L bits = lload(run + 256 + 64 * (p / 2) + 4 * r);
    Q4::pair<p>(run, r, a, b);
    *a = lor(*a, ltwo<2 * p % 4>(bits));
    *b = lor(*b, ltwo<2 * p % 4 + 1>(bits));
  }
  static inline V scale(const uint8_t* w, int g, int half, int r) {
    return vmul(vhalf(reinterpret_cast<const uint16_t*>(head(w, g)) + r), load_int8(run(w, g) + 384 + 16 * half + r));
  }
};

template <bool kHalves, bool kOffsets>
struct Panel : Q8 {
  static constexpr bool halves = kHalves, offsets = kOffsets;
  static constexpr int bytes = sizeof(PanelRun);
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  static inline const PanelRun* panel(const uint8_t* w, int g) { return reinterpret_cast<const PanelRun*>(run(w, g)); }
  static inline V scale(const uint8_t* w, int g, int half, int r) { return vload(panel(w, g)->scale[half] + r); }
  static inline V offset(const uint8_t* w, int g, int r) { return vload(panel(w, g)->offset + r); }
};

constexpr int kLanes = sizeof(V) / sizeof(float);  // rows that a vector holds, of the 16 of a block

// Weights are asked for this many bytes ahead, across the ends of pages, where the processor's own prefetching stops: a
// single token's into the first cache, those of several into the second. Measured on Zen 3, Zen 4 and Emerald Rapids. (Past
// the outer caches, as weights that are used once might be brought, is half as fast on Intel and no faster elsewhere.)
constexpr int kAhead = 4096, kAheadOfOne = 1024;

template <class F>
static inline I dot_line(I acc, L w, const int8_t* x) {
  if constexpr (F::positive) return dot_s8_positive(acc, w, x);
  else if constexpr (F::is_signed) return dot_s8(acc, w, x);
  else return dot_u7(acc, w, x);
}

// One group's lines times NT tokens, from row r on. Sums: channels 0-15 in low and 16-31 in high where halves have
// scales of their own; one token's even and odd lines, so that its products do not wait for each other; else all in low.
template <class F, int NT, int p>
static inline void pair_product(const uint8_t* run, int r, const int8_t* x, I* low, I* high) {
  L a, b;
  F::template pair<p>(run, r, &a, &b);
  I* first = F::halves && p >= 2 ? high : low;
  I* second = F::halves ? first : NT == 1 ? high : low;
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    const int8_t* at = x + t * kGroup + 8 * p;
    first[t] = dot_line<F>(first[t], a, at);
    second[t] = dot_line<F>(second[t], b, at + 4);
  }
}

#ifdef KIMI_SHORT_SUMS
// The same through 16-bit sums of as many pairs of lines as cannot overflow: each line adds two products of at most
// most * 127. Four pairs of Q4 reach 8 * 2 * 15 * 127 = 30480 of 32767, two of Q5 31496, one of Q6_K 32004.
template <class F>
constexpr int kShortPairs = F::is_signed ? 0 : F::most == 15 ? 4 : 32767 / (4 * 127 * F::most);

template <class F, int NT, int p>
static inline void short_pair_product(const uint8_t* run, int r, const int8_t* x, I* part, I* low, I* high) {
  static_assert(kShortPairs<F> * 4 * 127 * F::most <= 32767);
  L a, b;
  F::template pair<p>(run, r, &a, &b);
  I* sum = F::halves && p >= 2 ? high : low;
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    const int8_t* at = x + t * kGroup + 8 * p;
    const I dot = short_dot(a, at);
    part[t] = short_add(p % kShortPairs<F> ? short_add(part[t], dot) : dot, short_dot(b, at + 4));
    if (p % kShortPairs<F> == kShortPairs<F> - 1) sum[t] = widen_add(sum[t], part[t]);
  }
}
#endif

// Where sums begin in 16 bits, the bias would only hold registers until they are widened.
#ifdef KIMI_SHORT_SUMS
template <class F>
constexpr bool kBiasLast = kShortPairs<F> > 0;
#else
template <class F>
constexpr bool kBiasLast = false;
#endif

template <class F, int NT>
static inline void group_product(const uint8_t* run, int r, const int8_t* x, I* low, I* high) {
#ifdef KIMI_SHORT_SUMS
  if constexpr (kShortPairs<F> > 0) {
    I part[NT];
    short_pair_product<F, NT, 0>(run, r, x, part, low, high);
    short_pair_product<F, NT, 1>(run, r, x, part, low, high);
    short_pair_product<F, NT, 2>(run, r, x, part, low, high);
    short_pair_product<F, NT, 3>(run, r, x, part, low, high);
    return;
  }
#endif
  pair_product<F, NT, 0>(run, r, x, low, high);
  pair_product<F, NT, 1>(run, r, x, low, high);
  pair_product<F, NT, 2>(run, r, x, low, high);
  pair_product<F, NT, 3>(run, r, x, low, high);
}

// NT tokens of a tile of W, from lane `first`, times R vectors of rows from row `row` on, of S row blocks side by side. Of
// several blocks, each goes on `step` bytes behind its beginning.
template <class F, int NT, int W, int R, int S = 1>
static inline void tile_product(const uint8_t* const (&w)[S], size_t step, const uint8_t* tile, int first, int row, int groups,
                                float* const (&out)[S], size_t stride) {
  constexpr bool biased = F::is_signed ? bias_s8 != 0 && !F::positive : F::shift >= 0;
  constexpr int shift = F::shift >= 0 ? F::shift : 0;
  constexpr int groups_ahead = (NT == 1 ? kAheadOfOne : kAhead) / F::bytes + 1;
  Sums<NT> sums[S * R];
  for (int g = 0; g < groups; ++g, tile += W * kTokenGroup) {
    const int8_t* x = reinterpret_cast<const int8_t*>(tile) + first * kGroup;
    const float* scale = reinterpret_cast<const float*>(tile + W * kGroup) + first;
    const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4)) + first;
    const size_t behind_end = S > 1 && g + groups_ahead >= groups ? step - static_cast<size_t>(groups) * F::bytes : 0;
    for (int part = 0; part < S * R; ++part) {
      const uint8_t* block = w[part / R];
      const uint8_t* run = F::run(block, g);
      if (row == 0 && part % R == 0)
        for (int line = 0; line < F::bytes; line += 64) __builtin_prefetch(run + groups_ahead * F::bytes + behind_end + line, 0, NT == 1 ? 3 : 2);
      const int r = part % R * kLanes;
      I low[NT], high[NT];
      auto bias = [&](int t) {  // sums hold -8 times the activations'
        const int32_t whole = sum[t], half = sum[W + t];
        low[t] = iadd(low[t], ishl<shift>(iset(F::halves ? half : whole)));
        if (F::halves) high[t] = iadd(high[t], ishl<shift>(iset(whole - half)));
      };
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) {
        low[t] = high[t] = izero();
        if (biased && !kBiasLast<F>) bias(t);
      }
      group_product<F, NT>(run, row + r, x, low, high);
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t)
        if (biased && kBiasLast<F>) bias(t);
      const V ws = F::scale(block, g, 0, row + r);
      V* acc = sums[part].acc;
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) {
        const V xs = vset(scale[t]);
        if (NT == 1 && !F::halves) low[t] = iadd(low[t], high[t]);
        acc[t] = vfma(itof(low[t]), vmul(ws, xs), acc[t]);
        if (F::halves) acc[t] = vfma(itof(high[t]), vmul(F::scale(block, g, 1, row + r), xs), acc[t]);
        if (F::offsets) acc[t] = vfma(vset(-0.125f * static_cast<float>(sum[t])), vmul(F::offset(block, g, row + r), xs), acc[t]);
      }
      sums[part].end_of_group(g, groups);
    }
  }
  for (int part = 0; part < S * R; ++part)
    for (int t = 0; t < NT; ++t) vstore(out[part / R] + t * stride + row + part % R * kLanes, sums[part].total[t]);
}

// kBatch tokens at once is what an instruction set's registers hold; few tokens leave room for all rows of the block.
template <class F, int NT, int W>
static inline void rows_product(const uint8_t* w, const uint8_t* tile, int first, int groups, float* out, size_t stride) {
  constexpr int R = NT > 2 ? 1 : kRows / kLanes;
  for (int row = 0; row < kRows; row += R * kLanes) tile_product<F, NT, W, R>({w}, 0, tile, first, row, groups, {out}, stride);
}

template <class F>
static void block(const void* w, const uint8_t* tile, int groups, int W, float* out, size_t stride) {
  const auto* run = static_cast<const uint8_t*>(w);  // the row block's first
  if (W == 8)
    for (int first = 0; first < 8; first += kBatch)
      rows_product<F, kBatch, 8>(run, tile, first, groups, out + first * stride, stride);
  else if (W == 4) rows_product<F, 4, 4>(run, tile, 0, groups, out, stride);
  else if (W == 2) rows_product<F, 2, 2>(run, tile, 0, groups, out, stride);
  else rows_product<F, 1, 1>(run, tile, 0, groups, out, stride);
}

template <class F>
static void two_blocks(const void* const (&w)[2], size_t step, const uint8_t* tile, int groups, float* const (&out)[2]) {
  const uint8_t* const runs[2] = {static_cast<const uint8_t*>(w[0]), static_cast<const uint8_t*>(w[1])};
  tile_product<F, 1, 1, kRows / kLanes, 2>(runs, step, tile, 0, 0, groups, out, 0);
}
