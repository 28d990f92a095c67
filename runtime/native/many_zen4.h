// Products of many tokens, where products of bytes and of floats share two of four units, which is what a prompt is short of.
// Included by kernels_inl.h after products_inl.h, for kernels_zen4.cpp.
//
// A scale of one byte is a whole number, 8 to 15, times a power of two, and a weight of four bits times such a number fits in a
// byte. So weights take their scale's number and sign: a group's sum is exact as before, what is left of the scale is an
// exponent, and idle units put it in together with the activations' (vscalefps). That is 64 instructions on the two units for
// a group of 16 rows and eight tokens instead of 72, and the same bits. Making such weights takes as long as 0.4 of their products
// with one tile. So a span of two chunks is unpacked once and meets tile after tile, while it is in the first cache.

struct Unpacked {              // a group of 16 rows
  uint8_t line[8][64];         // 128 + weight * number of its scale, as products take them
  float exponent[kRows];
};

// Entry 16 m + q is 128 + (q - 8) (8 + m).
struct Numbers {
  alignas(64) uint8_t entry[128];
  constexpr Numbers() : entry() {
    for (int m = 0; m < 8; ++m)
      for (int q = 0; q < 16; ++q) entry[16 * m + q] = static_cast<uint8_t>(128 + (q - 8) * (8 + m));
  }
};
inline constexpr Numbers kNumbers;

template <class F>
static inline void unpack(const uint8_t* w, int groups, Unpacked* out) {
  const __m512i low = _mm512_load_si512(kNumbers.entry), high = _mm512_load_si512(kNumbers.entry + 64);
  const __m512i four_times = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                                              0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
  for (int g = 0; g < groups; ++g, ++out) {
    const uint8_t* run = F::run(w, g);
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run + F::bytes - kRows));
    const __m512i of_bytes = _mm512_permutexvar_epi8(four_times, _mm512_castsi128_si512(scales));
    const __mmask64 negative = _mm512_movepi8_mask(of_bytes);
    const __m512i number = _mm512_and_si512(_mm512_slli_epi16(of_bytes, 4), _mm512_set1_epi8(0x70));
    const auto put = [&](int j, L line) {
      const __m512i w = _mm512_permutex2var_epi8(low, lor(line, number), high);
      _mm512_store_si512(out->line[j], _mm512_mask_sub_epi8(w, negative, _mm512_setzero_si512(), w));  // 256 - (128 + n)
    };
    put(0, F::template line<0, true>(run, 0)), put(1, F::template line<1, true>(run, 0));
    put(2, F::template line<2, true>(run, 0)), put(3, F::template line<3, true>(run, 0));
    put(4, F::template line<4, true>(run, 0)), put(5, F::template line<5, true>(run, 0));
    put(6, F::template line<6, true>(run, 0)), put(7, F::template line<7, true>(run, 0));
    const __m512i e = _mm512_and_si512(_mm512_srli_epi32(_mm512_cvtepu8_epi32(scales), 3), _mm512_set1_epi32(15));
    _mm512_store_ps(out->exponent, vsub(itof(e), vset(18.0f)));
  }
}

struct Totals {  // 16 floats a token
  float* at;
  size_t stride;
  Totals from(int token) const { return {at + token * stride, stride}; }
};

constexpr int kSpan = 2 * kChunk;  // groups that are unpacked at a time: with a tile's and the next tile's they fill the first cache
constexpr int kHints = 6;          // a tile of eight has 352 bytes a group

// A span of a row block times a tile of W tokens: after = before + its chunks' sums. Of the tile that is multiplied next, a few
// lines a group are asked for on the way.
template <int W>
static void span_product(const Unpacked* w, const uint8_t* tile, int groups, const uint8_t* next, Totals before, Totals after) {
  V total[W], acc[W];
  KIMI_UNROLL
  for (int i = 0; i < W; ++i) total[i] = vload(before.from(i).at);
  for (int g = 0; g < groups;) {
    const int end = g + kChunk < groups ? g + kChunk : groups;
    KIMI_UNROLL
    for (int i = 0; i < W; ++i) acc[i] = vset(0.0f);
    for (; g < end; ++g, ++w, tile += W * kTokenGroup, next += 64 * kHints) {
      const int8_t* x = reinterpret_cast<const int8_t*>(tile);
      const float* exponent = reinterpret_cast<const float*>(tile + W * kGroup);
      const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 4));
      I sums[W];
      KIMI_UNROLL
      for (int i = 0; i < W; ++i)  // -128 times the activations' sum: sixteen times what the tile has
        asm("vpslld $4, %1%{1to16%}, %0" : "=v"(sums[i]) : "m"(sum[i]));
      KIMI_UNROLL
      for (int j = 0; j < 8; ++j) {
        const L line = lload<true>(w->line[j]);
        KIMI_UNROLL
        for (int i = 0; i < W; ++i) sums[i] = dot_u7(sums[i], line, x + i * kGroup + 4 * j);
      }
      for (int i = 0; i < kHints; ++i) __builtin_prefetch(next + 64 * i);
      const V row = vload(w->exponent);
      KIMI_UNROLL
      for (int i = 0; i < W; ++i) acc[i] = vadd(acc[i], vscale(itof(sums[i]), vadd(row, vset(exponent[i]))));
    }
    KIMI_UNROLL
    for (int i = 0; i < W; ++i) total[i] = vadd(total[i], acc[i]);
  }
  KIMI_UNROLL
  for (int i = 0; i < W; ++i) vstore(after.from(i).at, total[i]);
}

using SpanProduct = void (*)(const Unpacked* w, const uint8_t* tile, int groups, const uint8_t* next, Totals before, Totals after);
constexpr SpanProduct kSpanProducts[kTile] = {span_product<1>, span_product<2>, span_product<3>, span_product<4>,
                                              span_product<5>, span_product<6>, span_product<7>, span_product<8>};

constexpr int kManyFrom = 24;
constexpr int kTokensAtOnce = 256;  // that meet an unpacked span; their tiles stay in the second cache

template <class F>
static void many(const void* const* w, const void* const* next, int n, const uint8_t* tiles, int groups, int tokens, float* const* out,
                 size_t stride) {
  alignas(64) Unpacked unpacked[kSpan];
  alignas(64) float total[kTokensAtOnce * kRows], none[kRows] = {};
  constexpr int lines = kSpan * F::bytes / 64 + 1;
  const auto block = [](const void* w) { return static_cast<const uint8_t*>(w); };
  for (int from = 0, count; from < tokens; from += count) {  // as few parts as can be, all about as long
    const int left = (tokens - from + kTile - 1) / kTile * kTile, parts = (left + kTokensAtOnce - 1) / kTokensAtOnce;
    count = (left / kTile + parts - 1) / parts * kTile;
    if (count > tokens - from) count = tokens - from;
    const int share = (lines * kTile + count - 1) / count;
    const auto width = [&](int i) { return count - i < kTile ? count - i : kTile; };
    const auto tile_at = [&](int i, int g) { return tiles + (static_cast<size_t>(from + i) * groups + g * width(i)) * kTokenGroup; };
    for (int s = 0; s < n; ++s) {
      const void* following = s + 1 < n ? w[s + 1] : from + count < tokens ? w[0] : next[0];
      for (int g = 0, size; g < groups; g += size) {
        size = groups - g < kSpan ? groups - g : kSpan;
        unpack<F>(F::run(block(w[s]), g), size, unpacked);
        const bool last = g + size == groups;
        const uint8_t* ahead = last ? block(following) : F::run(block(w[s]), g + size);
        // The last span's go where they belong: a pass of its own for them waited nine cycles a token for its stores.
        const Totals kept{total, kRows}, before = g ? kept : Totals{none, 0}, after = last ? Totals{out[s] + from * stride, stride} : kept;
        for (int i = 0, W, line = 0; i < count; i += W) {
          W = width(i);
          for (const int end = line + share < lines ? line + share : lines; line < end; ++line) __builtin_prefetch(ahead + 64 * line);
          const uint8_t* then = i + W < count ? tile_at(i + W, g) : tile_at(0, last ? 0 : g + size);
          kSpanProducts[W - 1](unpacked, tile_at(i, g), size, then, before.from(i), after.from(i));
        }
      }
    }
  }
}
