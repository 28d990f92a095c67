// Products of many tokens with vectors of 256 bits, where unpacking a line of weights costs as much as two of its products: eight
// groups of 16 rows are unpacked into the first cache, once, and all tokens meet them there. Their scales become floats on the way.
// Included by kernels_inl.h after products_inl.h.
//
// The loop is that of products_inl.h, and so are the bits: eight groups are a chunk, after which sums are rounded into the total.

template <class F>
struct Unpacked : Symmetric {
  static constexpr bool is_signed = F::is_signed, offsets = F::offsets;
  static constexpr int shift = F::shift, bytes = sizeof(PanelRun), most = F::most;
  static_assert(!F::halves, "in a tile for many, other sums stand where those of halves do");
  static inline const uint8_t* run(const uint8_t* w, int g) { return w + static_cast<size_t>(g) * bytes; }
  static inline const PanelRun* panel(const uint8_t* w, int g) { return reinterpret_cast<const PanelRun*>(run(w, g)); }
  template <int j, bool once = false>
  static inline L line(const uint8_t* run, int r) { return lload(run + 64 * j + 4 * r); }
  static inline V scale(const uint8_t* w, int g, int, int r) { return vload(panel(w, g)->scale[0] + r); }
  static inline V offset(const uint8_t* w, int g, int r) { return vload(panel(w, g)->offset + r); }
};

template <class F, int... j>
KIMI_INLINE void unpack(const uint8_t* w, int g, PanelRun& to) {
  for (int r = 0; r < kRows; r += kLanes) {
    const uint8_t* run = F::run(w, g);
    (lstore(to.q + 64 * j + 4 * r, F::template line<j>(run, r)), ...);
    vstore(to.scale[0] + r, F::scale(w, g, 0, r));
    if (F::offsets) vstore(to.offset + r, F::offset(w, g, r));
  }
}

constexpr int kManyFrom = 16;
constexpr int kTokensAtOnce = 64;  // whose activations for a chunk, 22 kB, stay in the first cache beside its weights

// A chunk times a tile of W tokens, its groups `step` bytes apart; added to sum, 16 floats a token.
template <class F, int W>
static inline void chunk_times_tile(const PanelRun* chunk, int count, const uint8_t* tile, size_t step, float* sum) {
  constexpr int NT = kBatch < W ? kBatch : W, n = Integers<NT, 1>::n;
  const uint8_t* const w[1] = {reinterpret_cast<const uint8_t*>(chunk)};
  for (int first = 0; first < W; first += NT) {
    V acc[n];
    KIMI_UNROLL
    for (int i = 0; i < n; ++i) acc[i] = vset(0.0f);
    for (int g = 0; g < count; ++g) {
      const uint8_t* const run[1] = {Unpacked<F>::run(w[0], g)};
      group_into<Unpacked<F>, NT, W, 1>(w, run, g, tile + g * step, first, acc);
    }
    KIMI_UNROLL
    for (int i = 0; i < n; ++i, sum += kLanes) vstore(sum, vadd(vload(sum), acc[i]));
  }
}

template <class F>
static void many_blocks(const void* const* w, const void* const* next, int n, const uint8_t* tiles, size_t step, int groups, int tokens,
                        float* const* out, size_t stride) {
  alignas(64) PanelRun chunk[kChunk];
  alignas(64) float sum[kPair][kTokensAtOnce * kRows];
  for (int s = 0; s < n; ++s) __builtin_memset(sum[s], 0, tokens * kRows * sizeof(float));
  for (int from = 0; from < groups; from += kChunk, tiles += kChunk * step) {
    const int count = groups - from < kChunk ? groups - from : kChunk;
    for (int s = 0; s < n; ++s) {
      const auto* block = static_cast<const uint8_t*>(w[s]);
      for (int g = from; g < from + count; ++g) {
        const uint8_t* soon = g + kChunk < groups ? F::run(block, g + kChunk) : F::run(static_cast<const uint8_t*>(next[s]), g + kChunk - groups);
        for (int i = 0; i < F::bytes / 64 + 1; ++i) __builtin_prefetch(soon + 64 * i);
        unpack<F, 0, 1, 2, 3, 4, 5, 6, 7>(block, g, chunk[g - from]);
      }
      const uint8_t* tile = tiles;
      float* to = sum[s];
      const auto times = [&]<int W>() {
        chunk_times_tile<F, W>(chunk, count, tile, step, to);
        tile += W * kTokenGroup, to += W * kRows;
      };
      for (int left = tokens; left >= kTile; left -= kTile) times.template operator()<kTile>();
      if (tokens & 4) times.template operator()<4>();
      if (tokens & 2) times.template operator()<2>();
      if (tokens & 1) times.template operator()<1>();
    }
  }
  for (int s = 0; s < n; ++s)
    for (int t = 0; t < tokens; ++t) __builtin_memcpy(out[s] + t * stride, sum[s] + t * kRows, kRows * sizeof(float));
}

template <class F>
static void many(const void* const* w, const void* const* next, int n, const uint8_t* tiles, int groups, int tokens, float* const* out,
                 size_t stride) {
  for (int from = 0, count; from < tokens; from += count) {
    count = part_of(tokens - from, kTokensAtOnce);
    float* to[kPair];
    for (int s = 0; s < n; ++s) to[s] = out[s] + from * stride;
    many_blocks<F>(w, from + count < tokens ? w : next, n, tiles + static_cast<size_t>(from) * kTokenGroup,
                   static_cast<size_t>(tokens) * kTokenGroup, groups, count, to, stride);
  }
}

#define KIMI_MANY_FORMS {products::many<products::Q4>, products::many<products::Q4B>, products::many<products::Q3B>}
