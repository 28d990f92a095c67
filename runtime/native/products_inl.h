// Products of weights with quantized activations, over a vector V of some rows of a block's 16, as many integers I, and the
// line L of 4 channels of each. Included by kernels_inl.h in a namespace of its own.

// Sums stay in registers where loops over them are unrolled and one function holds all. Vectors that are arrays are in memory anyhow.
#ifdef KIMI_ARRAYS
#define KIMI_UNROLL
#define KIMI_INLINE static inline
#else
#define KIMI_UNROLL _Pragma("GCC unroll 8")
#define KIMI_INLINE [[gnu::always_inline]] static inline
#endif

// A form says how 16 rows are stored: where group g's run lies, its eight lines (line j is channels 4j..4j+3), and
// its scales, each from row r on. Stored values are unsigned, at most `most`, with a bias of 8 << shift (none if shift is
// negative), or signed bytes. Halves have a scale each; offsets are minima besides the scale.
// Signed weights of activations that are never negative, as a softmax's are, can be easier to multiply: `positive`.
struct Symmetric {
  static constexpr bool is_signed = false, positive = false, halves = false, offsets = false;
  static inline V offset(const uint8_t*, int, int) { return vset(0.0f); }
};

struct Q4 : Symmetric {
  static constexpr int shift = 0, bytes = kQ4Run, most = 15;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j>
  static inline L line(const uint8_t* run, int r) {
    const L two = lload(run + 64 * (j / 2) + 4 * r);
    return j % 2 ? lhigh(two) : llow(two);
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 256) + r); }
};

struct Q8 : Symmetric {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4, bytes = kQ8Run, most = 127;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j>
  static inline L line(const uint8_t* run, int r) { return lload(run + 64 * j + 4 * r); }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 512) + r); }
};

struct Q8Positive : Q8 {
  static constexpr bool positive = true;
};

struct Q5 : Symmetric {
  static constexpr int shift = 1, bytes = kQ5Run, most = 31;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j>
  static inline L line(const uint8_t* run, int r) {  // line j's fifth bits are the bits j of one line
    return lor(Q4::line<j>(run, r), lbit<j>(lload(run + 256 + 4 * r)));
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 320) + r); }
};

struct I4 : Q4 {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4;
  template <int j>
  static inline L line(const uint8_t* run, int r) { return lcode(Q4::line<j>(run, r)); }
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
  template <int j>
  static inline L line(const uint8_t* run, int r) {  // line j's upper bits are the bit pairs j % 4 of line j / 4
    return lor(Q4::line<j>(run, r), ltwo<j % 4>(lload(run + 256 + 64 * (j / 4) + 4 * r)));
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

constexpr int kLanes = sizeof(V) / sizeof(float);  // rows that a vector holds
constexpr int kVectors = kRows / kLanes;           // vectors that hold a block's rows

// Weights of several tokens are asked for this many bytes ahead, into the second cache and across the ends of pages, where the
// processor's own prefetching stops; those of one by kAheadOfOne, into the cache kLevelOfOne (3 is the first, 2 the second).
constexpr int kAhead = 4096;

template <class F>
static inline I dot_line(I acc, L w, const int8_t* x) {
  if constexpr (F::positive) return dot_s8_positive(acc, w, x);
  else if constexpr (F::is_signed) return dot_s8(acc, w, x);
  else return dot_u7(acc, w, x);
}

// Lines whose products fit in 16 bits together, where there are short sums: each adds two products of at most most * 127 to a
// sum. Eight lines of Q4 reach 8 * 2 * 15 * 127 = 30480 of 32767, four of Q5 31496, two of Q6_K 32004.
#ifdef KIMI_SHORT_SUMS
template <class F>
constexpr int kShortLines = F::is_signed ? 0 : F::most == 15 ? 8 : 32767 / (2 * 127 * F::most);
#else
template <class F>
constexpr int kShortLines = 0;
#endif

// A group's integer sums for NT tokens, token t's k-th vector of rows being number t * kVectors + k: of channels 0-15 in low
// and 16-31 in high where halves have scales of their own; one token's even and odd lines, so that its products do not wait
// for each other; else all in low.
template <int NT>
struct Integers {
  static constexpr int n = NT * kVectors;
  I low[n], high[n], part[n];
};

// Line j times NT tokens. All rows of the block meet a token's four channels at once, which are broadcast once for them.
template <class F, int NT, int j>
KIMI_INLINE void line_product(const uint8_t* run, const int8_t* x, Integers<NT>& sums) {
  constexpr bool in_high = F::halves ? j >= 4 : kShortLines<F> == 0 && NT == 1 && j % 2;
  L w[kVectors];
  KIMI_UNROLL
  for (int k = 0; k < kVectors; ++k) w[k] = F::template line<j>(run, k * kLanes);
  KIMI_UNROLL
  for (int i = 0; i < sums.n; ++i) {
    const int8_t* at = x + i / kVectors * kGroup + 4 * j;
    I& sum = in_high ? sums.high[i] : sums.low[i];
#ifdef KIMI_SHORT_SUMS
    if constexpr (kShortLines<F> > 0) {
      const I dot = short_dot(w[i % kVectors], at);
      sums.part[i] = j % kShortLines<F> ? short_add(sums.part[i], dot) : dot;
      if (j % kShortLines<F> == kShortLines<F> - 1) sum = widen_add(sum, sums.part[i]);
    } else
#endif
      sum = dot_line<F>(sum, w[i % kVectors], at);
  }
}

template <class F, int NT>
KIMI_INLINE void group_product(const uint8_t* run, const int8_t* x, Integers<NT>& sums) {
  line_product<F, NT, 0>(run, x, sums);
  line_product<F, NT, 1>(run, x, sums);
  line_product<F, NT, 2>(run, x, sums);
  line_product<F, NT, 3>(run, x, sums);
  line_product<F, NT, 4>(run, x, sums);
  line_product<F, NT, 5>(run, x, sums);
  line_product<F, NT, 6>(run, x, sums);
  line_product<F, NT, 7>(run, x, sums);
}

// NT tokens of a tile of W, from lane `first` on, times S row blocks side by side; when the end of one is near, its `next` is
// asked for.
template <class F, int NT, int W, int S>
static inline void tile_product(const uint8_t* const (&w)[S], const uint8_t* const (&next)[S], const uint8_t* tile, int first,
                                int groups, float* const (&out)[S], size_t stride) {
  constexpr int n = Integers<NT>::n;
  constexpr bool biased = F::is_signed ? bias_s8 != 0 && !F::positive : F::shift >= 0;
  constexpr int shift = F::shift >= 0 ? F::shift : 0;
  constexpr int groups_ahead = (NT == 1 ? kAheadOfOne : kAhead) / F::bytes + 1, level = NT == 1 ? kLevelOfOne : 2;
  V total[S * n], acc[S * n];  // over finished chunks, and inside the present one
  for (int i = 0; i < S * n; ++i) total[i] = vset(0.0f);
  for (int g = 0; g < groups;) {
    const int end = g + kChunk < groups ? g + kChunk : groups;
    KIMI_UNROLL
    for (int i = 0; i < S * n; ++i) acc[i] = vset(0.0f);
    for (; g < end; ++g, tile += W * kTokenGroup) {
      const int8_t* x = reinterpret_cast<const int8_t*>(tile) + first * kGroup;
      const float* scale = reinterpret_cast<const float*>(tile + W * kGroup) + first;
      const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4)) + first;
      const bool near_end = g + groups_ahead >= groups;
      KIMI_UNROLL
      for (int s = 0; s < S; ++s) {
        const uint8_t* block = w[s];
        const uint8_t* run = F::run(block, g);
        if (first == 0) {
          const uint8_t* ahead = near_end ? next[s] + (g + groups_ahead - groups) * F::bytes : run + groups_ahead * F::bytes;
          for (int line = 0; line < F::bytes; line += 64) __builtin_prefetch(ahead + line, 0, level);
        }
        Integers<NT> sums;
        auto bias = [&](int i) {  // sums hold -8 times the activations'
          const int32_t whole = sum[i / kVectors], half = sum[W + i / kVectors];
          sums.low[i] = iadd(sums.low[i], ishl<shift>(iset(F::halves ? half : whole)));
          if (F::halves) sums.high[i] = iadd(sums.high[i], ishl<shift>(iset(whole - half)));
        };
        KIMI_UNROLL
        for (int i = 0; i < n; ++i) {
          sums.low[i] = sums.high[i] = izero();
          if (biased && !kShortLines<F>) bias(i);
        }
        group_product<F, NT>(run, x, sums);
        KIMI_UNROLL
        for (int i = 0; i < n; ++i)  // sums that begin in 16 bits: until they are widened, the bias would only hold registers
          if (biased && kShortLines<F>) bias(i);
        V ws[kVectors];
        KIMI_UNROLL
        for (int k = 0; k < kVectors; ++k) ws[k] = F::scale(block, g, 0, k * kLanes);
        KIMI_UNROLL
        for (int i = 0; i < n; ++i) {
          const int t = i / kVectors, k = i % kVectors;
          const V xs = vset(scale[t]);
          V& a = acc[s * n + i];
          if (NT == 1 && !F::halves) sums.low[i] = iadd(sums.low[i], sums.high[i]);
          a = vfma(itof(sums.low[i]), vmul(ws[k], xs), a);
          if (F::halves) a = vfma(itof(sums.high[i]), vmul(F::scale(block, g, 1, k * kLanes), xs), a);
          if (F::offsets) a = vfma(vset(-0.125f * static_cast<float>(sum[t])), vmul(F::offset(block, g, k * kLanes), xs), a);
        }
      }
    }
    KIMI_UNROLL
    for (int i = 0; i < S * n; ++i) total[i] = vadd(total[i], acc[i]);
  }
  for (int s = 0; s < S; ++s)
    for (int i = 0; i < n; ++i) vstore(out[s] + i / kVectors * stride + i % kVectors * kLanes, total[s * n + i]);
}

// kBatch tokens at once is what an instruction set's registers hold.
template <class F>
static void block(const void* w, const uint8_t* tile, int groups, int W, float* out, size_t stride) {
  const auto* run = static_cast<const uint8_t*>(w);  // the row block's first
  const uint8_t* next = run + static_cast<size_t>(groups) * F::bytes;
  if (W == 8)
    for (int first = 0; first < 8; first += kBatch)
      tile_product<F, kBatch, 8, 1>({run}, {next}, tile, first, groups, {out + first * stride}, stride);
  else if (W == 4) tile_product<F, 4, 4, 1>({run}, {next}, tile, 0, groups, {out}, stride);
  else if (W == 2) tile_product<F, 2, 2, 1>({run}, {next}, tile, 0, groups, {out}, stride);
  else tile_product<F, 1, 1, 1>({run}, {next}, tile, 0, groups, {out}, stride);
}

// S at a time, then what is left by halves of S. What follows a block is the one S further on, of `w` and then of `next`.
template <class F, int S = kStreams>
static void one_token(const void* const* w, const void* const* next, int n, const uint8_t* tile, int groups, float* const* out) {
  int i = 0;
  for (; i + S <= n; i += S) {
    const uint8_t *these[S], *following[S];
    float* to[S];
    for (int s = 0; s < S; ++s) {
      these[s] = static_cast<const uint8_t*>(w[i + s]);
      following[s] = static_cast<const uint8_t*>(i + S + s < n ? w[i + S + s] : next[i + S + s - n]);
      to[s] = out[i + s];
    }
    tile_product<F, 1, 1, S>(these, following, tile, 0, groups, to, 0);
  }
  if constexpr (S > 1)
    if (i < n) one_token<F, S / 2>(w + i, next, n - i, tile, groups, out + i);
}
