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
// `once` asks for a line that is loaded once, however many lines are made of it: what one token wants, and costs two a tenth.
// Where odd lines are upper halves of bytes (`upper`), `line_above` leaves one there, 16 times as large.
struct Symmetric {
  static constexpr bool is_signed = false, positive = false, halves = false, offsets = false, upper = false;
  static inline V offset(const uint8_t*, int, int) { return vset(0.0f); }
};

struct Q4 : Symmetric {
  static constexpr bool upper = true;
  static constexpr int shift = 0, bytes = kQ4Run, most = 15;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) {
    const L two = lload<once>(run + 64 * (j / 2) + 4 * r);
    return j % 2 ? lhigh(two) : llow(two);
  }
  template <int j, bool once = false>
  static inline L line_above(const uint8_t* run, int r) { return land(lload<once>(run + 64 * (j / 2) + 4 * r), 0xf0); }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 256) + r); }
};

struct Q4B : Q4 {
  static constexpr int bytes = kQ4BRun;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  static inline V scale(const uint8_t* w, int g, int, int r) { return byte_scales(run(w, g) + 256 + r); }
};

// Stored values are even, so they are those of Q4B, of which three bits are kept: lines 2t and 2t + 1 in line t, and of lines 6
// and 7 a bit in each of the three.
struct Q3B : Q4B {
  static constexpr int bytes = kQ3BRun;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) {
    const L two = both<j, once>(run + 4 * r);
    return land(j % 2 ? lhigh(two) : two, 0x0e);
  }
  template <int j, bool once = false>
  static inline L line_above(const uint8_t* run, int r) { return land(both<j, once>(run + 4 * r), 0xe0); }
  template <int j, bool once = false>
  static inline L both(const uint8_t* at) {
    if constexpr (j < 6) return lload<once>(at + 64 * (j / 2));
    else return lthree(lload<once>(at), lload<once>(at + 64), lload<once>(at + 128));
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return byte_scales(run(w, g) + 192 + r); }
};

struct Q8 : Symmetric {
  static constexpr bool is_signed = true;
  static constexpr int shift = 4, bytes = kQ8Run, most = 127;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) { return lload<once>(run + 64 * j + 4 * r); }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 512) + r); }
};

struct Q8Positive : Q8 {
  static constexpr bool positive = true;
};

struct Q5 : Symmetric {
  static constexpr int shift = 1, bytes = kQ5Run, most = 31;
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) {  // line j's fifth bits are the bits j of one line
    return lor(Q4::line<j, once>(run, r), lbit<j>(lload<once>(run + 256 + 4 * r)));
  }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vhalf(reinterpret_cast<const uint16_t*>(run(w, g) + 320) + r); }
};

struct I4 : Q4 {
  static constexpr bool is_signed = true, upper = false;
  static constexpr int shift = 4;
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) { return lcode(Q4::line<j, once>(run, r)); }
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
  static constexpr bool halves = true, upper = false;
  static constexpr int shift = 2, bytes = kQ6KRun, most = 63;
  static inline const uint8_t* head(const uint8_t* w, int g) { return w + static_cast<size_t>(g / 8) * (kQ6KHead + 8 * kQ6KRun); }
  static inline const uint8_t* run(const uint8_t* w, int g) { return head(w, g) + kQ6KHead + g % 8 * kQ6KRun; }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) {  // line j's upper bits are the bit pairs j % 4 of line j / 4
    return lor(Q4::line<j, once>(run, r), ltwo<j % 4>(lload<once>(run + 256 + 64 * (j / 4) + 4 * r)));
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

// A group's integer sums for NT tokens and S row blocks, token t's k-th vector of rows being number t * vectors + k: of channels
// 0-15 in low and 16-31 in high where halves have scales of their own; of even and odd lines where there are so few that products
// would wait for each other; else all in low.
template <int NT, int S>
struct Integers {
  static constexpr int vectors = S * kVectors, n = NT * vectors;
  I low[n], high[n], part[n];
};
template <class F, int NT, int S>
constexpr bool in_turn = !F::halves && kShortLines<F> == 0 && NT * S <= 2;
// There odd lines need not be moved down, if products take weights of up to 240: their sum is, once.
template <class F, int NT, int S>
constexpr bool above = kWholeBytes && F::upper && in_turn<F, NT, S>;

// Line j of S row blocks times NT tokens. All rows meet a token's four channels at once, which are broadcast once for them.
template <class F, int NT, int S, int j>
KIMI_INLINE void line_product(const uint8_t* const (&run)[S], const int8_t* x, Integers<NT, S>& sums) {
  constexpr bool in_high = F::halves ? j >= 4 : in_turn<F, NT, S> && j % 2;
  constexpr int vectors = Integers<NT, S>::vectors;
  L w[vectors];
  KIMI_UNROLL
  for (int k = 0; k < vectors; ++k) {
    const uint8_t* of = run[k / kVectors];
    const int r = k % kVectors * kLanes;
    if constexpr (above<F, NT, S> && j % 2) w[k] = F::template line_above<j, NT == 1>(of, r);
    else w[k] = F::template line<j, NT == 1>(of, r);
  }
  KIMI_UNROLL
  for (int i = 0; i < sums.n; ++i) {
    const int8_t* at = x + i / vectors * kGroup + 4 * j;
    I& sum = in_high ? sums.high[i] : sums.low[i];
#ifdef KIMI_SHORT_SUMS
    if constexpr (kShortLines<F> > 0) {
      const I dot = short_dot(w[i % vectors], at);
      sums.part[i] = j % kShortLines<F> ? short_add(sums.part[i], dot) : dot;
      if (j % kShortLines<F> == kShortLines<F> - 1) sum = widen_add(sum, sums.part[i]);
    } else
#endif
      sum = dot_line<F>(sum, w[i % vectors], at);
  }
}

template <class F, int NT, int S>
KIMI_INLINE void group_product(const uint8_t* const (&run)[S], const int8_t* x, Integers<NT, S>& sums) {
  line_product<F, NT, S, 0>(run, x, sums);
  line_product<F, NT, S, 1>(run, x, sums);
  line_product<F, NT, S, 2>(run, x, sums);
  line_product<F, NT, S, 3>(run, x, sums);
  line_product<F, NT, S, 4>(run, x, sums);
  line_product<F, NT, S, 5>(run, x, sums);
  line_product<F, NT, S, 6>(run, x, sums);
  line_product<F, NT, S, 7>(run, x, sums);
}

// Group g of S row blocks, whose runs are given, times NT tokens of a tile of W, from lane `first` on: added to acc, of token t's k-th
// vector of rows number t * vectors + k.
template <class F, int NT, int W, int S>
KIMI_INLINE void group_into(const uint8_t* const (&w)[S], const uint8_t* const (&run)[S], int g, const uint8_t* tile, int first,
                            V (&acc)[Integers<NT, S>::n]) {
  constexpr int vectors = Integers<NT, S>::vectors, n = Integers<NT, S>::n;
  constexpr bool biased = F::is_signed ? bias_s8 != 0 && !F::positive : F::shift >= 0;
  constexpr int shift = F::shift >= 0 ? F::shift : 0;
  const int8_t* x = reinterpret_cast<const int8_t*>(tile) + first * kGroup;
  const float* scale = reinterpret_cast<const float*>(tile + W * kGroup) + first;
  const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4)) + first;
  Integers<NT, S> sums;
  auto bias = [&](int i) {  // sums hold -8 times the activations'
    const int32_t whole = sum[i / vectors], half = sum[W + i / vectors];
    sums.low[i] = iadd(sums.low[i], ishl<shift>(iset(F::halves ? half : whole)));
    if (F::halves) sums.high[i] = iadd(sums.high[i], ishl<shift>(iset(whole - half)));
  };
  KIMI_UNROLL
  for (int i = 0; i < n; ++i) {
    sums.low[i] = sums.high[i] = izero();
    if (biased && !kShortLines<F>) bias(i);
  }
  group_product<F, NT, S>(run, x, sums);
  KIMI_UNROLL
  for (int i = 0; i < n; ++i)  // sums that begin in 16 bits: until they are widened, the bias would only hold registers
    if (biased && kShortLines<F>) bias(i);
  V ws[vectors];
  KIMI_UNROLL
  for (int k = 0; k < vectors; ++k) ws[k] = F::scale(w[k / kVectors], g, 0, k % kVectors * kLanes);
  KIMI_UNROLL
  for (int i = 0; i < n; ++i) {
    const int t = i / vectors, k = i % vectors, r = k % kVectors * kLanes;
    const V xs = vset(scale[t]);
    if (in_turn<F, NT, S>) sums.low[i] = iadd(sums.low[i], above<F, NT, S> ? isixteenth(sums.high[i]) : sums.high[i]);
    acc[i] = vfma(itof(sums.low[i]), vscale(ws[k], xs), acc[i]);
    if (F::halves) acc[i] = vfma(itof(sums.high[i]), vscale(F::scale(w[k / kVectors], g, 1, r), xs), acc[i]);
    if (F::offsets)
      acc[i] = vfma(vset(-0.125f * static_cast<float>(sum[t])), vscale(F::offset(w[k / kVectors], g, r), xs), acc[i]);
  }
}

// NT tokens of a tile of W, from lane `first` on, times S row blocks side by side; when the end of one is near, its `next` is
// asked for. Token t's sums go to out[s] + t * stride.
template <class F, int NT, int W, int S, Reading kReading>
static inline void tile_product(const uint8_t* const (&w)[S], const uint8_t* const (&next)[S], const uint8_t* tile, int first,
                                int groups, float* const (&out)[S], size_t stride) {
  constexpr int vectors = Integers<NT, S>::vectors, n = Integers<NT, S>::n;
  constexpr int groups_ahead = kReading.ahead / F::bytes + 1;
  constexpr int lines = (F::bytes + 63) / kReading.step;  // runs begin amid a line; where each is asked for, none is left out
  V total[n], acc[n];  // over finished chunks, and inside the present one
  for (int i = 0; i < n; ++i) total[i] = vset(0.0f);
  for (int g = 0; g < groups;) {
    const int end = g + kChunk < groups ? g + kChunk : groups;
    KIMI_UNROLL
    for (int i = 0; i < n; ++i) acc[i] = vset(0.0f);
    for (; g < end; ++g, tile += W * kTokenGroup) {
      const bool near_end = g + groups_ahead >= groups;
      const uint8_t* run[S];
      KIMI_UNROLL
      for (int s = 0; s < S; ++s) {
        run[s] = F::run(w[s], g);
        if (first > 0) continue;
        const uint8_t* ahead = near_end ? next[s] + (g + groups_ahead - groups) * F::bytes : run[s] + groups_ahead * F::bytes;
        if constexpr (kReading.step > 64) ahead += -reinterpret_cast<uintptr_t>(ahead) % kReading.step;
        for (int i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * kReading.step, 0, kReading.level);
      }
      group_into<F, NT, W, S>(w, run, g, tile, first, acc);
    }
    KIMI_UNROLL
    for (int i = 0; i < n; ++i) total[i] = vadd(total[i], acc[i]);
  }
  for (int i = 0; i < n; ++i) {
    const int k = i % vectors;
    vstore(out[k / kVectors] + i / vectors * stride + k % kVectors * kLanes, total[i]);
  }
}

// S row blocks at a time, then what is left by halves of S, each with as many tokens at once as registers hold: kBatch with one
// block. What follows a block is the one S further on, of `w` and then of `next`.
template <class F, int W, Reading kReading, int S = kReading.streams>
static void side_by_side(const void* const* w, const void* const* next, int n, const uint8_t* tile, int groups, float* const* out,
                         size_t stride) {
  constexpr int at_once = kBatch / S < 1 ? 1 : kBatch / S, NT = at_once < W ? at_once : W;
  int i = 0;
  for (; i + S <= n; i += S) {
    const uint8_t *these[S], *following[S];
    for (int s = 0; s < S; ++s) {
      these[s] = static_cast<const uint8_t*>(w[i + s]);
      following[s] = static_cast<const uint8_t*>(i + S + s < n ? w[i + S + s] : next[i + S + s - n]);
    }
    for (int first = 0; first < W; first += NT) {
      float* to[S];
      for (int s = 0; s < S; ++s) to[s] = out[i + s] + first * stride;
      tile_product<F, NT, W, S, kReading>(these, following, tile, first, groups, to, stride);
    }
  }
  if constexpr (S > 1)
    if (i < n) side_by_side<F, W, kReading, S / 2>(w + i, next, n - i, tile, groups, out + i, stride);
}

// Where all eight tokens' sums are in registers at once, as many fewer can be.
constexpr bool kEveryWidth = kBatch == kTile;

// Five tokens or more have enough of one block: what two blocks read in turn, the first cache would not hold.
template <class F>
static void blocks(const void* const* w, const void* const* next, int n, const uint8_t* tile, int groups, int W, float* const* out,
                   size_t stride) {
  if (W == 8) return side_by_side<F, 8, kOfFew, 1>(w, next, n, tile, groups, out, stride);
  if constexpr (kEveryWidth) {
    if (W == 7) return side_by_side<F, 7, kOfFew, 1>(w, next, n, tile, groups, out, stride);
    if (W == 6) return side_by_side<F, 6, kOfFew, 1>(w, next, n, tile, groups, out, stride);
    if (W == 5) return side_by_side<F, 5, kOfFew, 1>(w, next, n, tile, groups, out, stride);
    if (W == 3) return side_by_side<F, 3, kOfFew>(w, next, n, tile, groups, out, stride);
  }
  if (W == 4) side_by_side<F, 4, kOfFew>(w, next, n, tile, groups, out, stride);
  else if (W == 2) side_by_side<F, 2, kOfFew>(w, next, n, tile, groups, out, stride);
  else if (n > kPair) side_by_side<F, 1, kOfOne>(w, next, n, tile, groups, out, stride);
  else side_by_side<F, 1, kOfPair>(w, next, n, tile, groups, out, stride);
}

template <class F, int j>
static inline void turned_line(const uint8_t* run, int r, const V (&scale)[2], V offset, float* out, size_t stride) {
  const L line = F::template line<j>(run, r);
  const V bias = vset(F::is_signed || F::shift < 0 ? 0.0f : static_cast<float>(8 << (F::shift < 0 ? 0 : F::shift)));
  const auto put = [&](int c, V q) {
    const V w = vmul(scale[F::halves && j >= 4], vsub(q, bias));
    vstore(out + (4 * j + c) * stride + r, F::offsets ? vadd(w, offset) : w);
  };
  put(0, lbyte<0>(line)), put(1, lbyte<1>(line)), put(2, lbyte<2>(line)), put(3, lbyte<3>(line));
}

template <class F>
static void turned(const uint8_t* w, int groups, float* out, size_t stride) {
  for (int g = 0; g < groups; ++g, out += kGroup * stride)
    for (int r = 0; r < kRows; r += kLanes) {
      const uint8_t* run = F::run(w, g);
      const V scale[2] = {F::scale(w, g, 0, r), F::scale(w, g, F::halves, r)}, offset = F::offset(w, g, r);
      turned_line<F, 0>(run, r, scale, offset, out, stride);
      turned_line<F, 1>(run, r, scale, offset, out, stride);
      turned_line<F, 2>(run, r, scale, offset, out, stride);
      turned_line<F, 3>(run, r, scale, offset, out, stride);
      turned_line<F, 4>(run, r, scale, offset, out, stride);
      turned_line<F, 5>(run, r, scale, offset, out, stride);
      turned_line<F, 6>(run, r, scale, offset, out, stride);
      turned_line<F, 7>(run, r, scale, offset, out, stride);
    }
}
