// Products of many tokens, where products of bytes and of floats share two of four units, which is what a prompt is short of.
// Included by kernels_inl.h after products_inl.h, for kernels_zen4.cpp.
//
// A scale of one byte is a whole number, 8 to 15, times a power of two, and a weight of four bits times such a number fits in a
// byte. So weights take their scale's number and sign: a group's sum is exact as before, what is left of the scale is an
// exponent, and idle units put it in together with the activations' (vscalefps). That is 64 instructions on the two units for
// a group of 16 rows and eight tokens instead of 72, and the same bits. Such weights stay in registers while all tokens meet them,
// and are made beside the last tile's products, by units that these leave idle. So all tokens of a group stand side by side.

// Entry 16 m + q is 128 + (q - 8) (8 + m).
struct Numbers {
  alignas(64) uint8_t entry[128];
  constexpr Numbers() : entry() {
    for (int m = 0; m < 8; ++m)
      for (int q = 0; q < 16; ++q) entry[16 * m + q] = static_cast<uint8_t>(128 + (q - 8) * (8 + m));
  }
};
inline constexpr Numbers kNumbers;

// A group of 16 rows as it lies in memory, and its scales.
template <class F>
struct Packed {
  const uint8_t* run;
  L number;            // 16 m, in each byte of a row
  __mmask64 negative;
  V exponent;

  KIMI_INLINE Packed of(const uint8_t* run) {
    const __m512i four_times = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                                                0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run + F::bytes - kRows));
    const __m512i of_bytes = _mm512_permutexvar_epi8(four_times, _mm512_castsi128_si512(scales));
    const __m512i e = _mm512_and_si512(_mm512_srli_epi32(_mm512_cvtepu8_epi32(scales), 3), _mm512_set1_epi32(15));
    return {run, _mm512_and_si512(_mm512_slli_epi16(of_bytes, 4), _mm512_set1_epi8(0x70)), _mm512_movepi8_mask(of_bytes),
            vsub(itof(e), vset(18.0f))};
  }
  template <int j>
  [[gnu::always_inline]] inline L unpacked() const {  // 128 + weight * number, with the scale's sign
    const __m512i low = _mm512_load_si512(kNumbers.entry), high = _mm512_load_si512(kNumbers.entry + 64);
    L q = F::template line<j, true>(run, 0);
    asm("" : "+v"(q));  // else one instruction of three inputs puts q and number together, and waits for the units that multiply
    L line = _mm512_permutex2var_epi8(low, lor(q, number), high);
    line = _mm512_mask_sub_epi8(line, negative, _mm512_setzero_si512(), line);  // 256 - (128 + n)
    asm volatile("" : "+v"(line));  // here, between products
    return line;
  }
};

struct Rows {  // a group of 16 rows as products take it
  L line[8];
  V exponent;
};

struct Totals {  // 16 floats a token
  float* at;
  size_t stride;
  Totals from(int token) const { return {at + token * stride, stride}; }
};

template <class F, int W, bool kUnpack, int j>
KIMI_INLINE void line_of_tile(Rows& rows, const Packed<F>& following, const int8_t* x, I (&sums)[W]) {
  KIMI_UNROLL
  for (int i = 0; i < W; ++i) sums[i] = dot_u7(sums[i], rows.line[j], x + i * kGroup + 4 * j);
  if constexpr (kUnpack) rows.line[j] = following.template unpacked<j>();
}

// A group's rows times W tokens: chunk = before + products; at a chunk's end, total = earlier + that instead. With kUnpack the
// following group takes the rows' place.
template <class F, int W, bool kUnpack, bool kEnd>
KIMI_INLINE void tile_of_group(Rows& rows, const Packed<F>& following, const uint8_t* tile, const float* before, float* chunk,
                               Totals earlier, Totals total) {
  asm("" : "+r"(tile), "+r"(before), "+r"(chunk));  // or GCC keeps an address for each use, in memory
  const int8_t* x = reinterpret_cast<const int8_t*>(tile);
  const float* exponent = reinterpret_cast<const float*>(tile + W * kGroup);
  const int32_t* sum = reinterpret_cast<const int32_t*>(tile + W * (kGroup + 8));
  I sums[W];
  KIMI_UNROLL
  for (int i = 0; i < W; ++i)  // -128 times the activations' sum
    asm volatile("vpbroadcastd %1, %0" : "=v"(sums[i]) : "m"(sum[i]));
  line_of_tile<F, W, kUnpack, 0>(rows, following, x, sums), line_of_tile<F, W, kUnpack, 1>(rows, following, x, sums);
  line_of_tile<F, W, kUnpack, 2>(rows, following, x, sums), line_of_tile<F, W, kUnpack, 3>(rows, following, x, sums);
  line_of_tile<F, W, kUnpack, 4>(rows, following, x, sums), line_of_tile<F, W, kUnpack, 5>(rows, following, x, sums);
  line_of_tile<F, W, kUnpack, 6>(rows, following, x, sums), line_of_tile<F, W, kUnpack, 7>(rows, following, x, sums);
  KIMI_UNROLL
  for (int i = 0; i < W; ++i) {
    asm volatile("" : "+v"(sums[i]));  // after all products
    const V sum = vadd(vscale(itof(sums[i]), vadd(rows.exponent, vset(exponent[i]))), vload(before + i * kRows));
    if constexpr (kEnd) {
      vstore(total.at, vadd(vload(earlier.at), sum));
      earlier = earlier.from(1), total = total.from(1);
    } else {
      vstore(chunk + i * kRows, sum);
    }
  }
  if (kUnpack) rows.exponent = following.exponent;
}

constexpr int kManyFrom = 16;
constexpr int kTokensAtOnce = 128;  // whose sums for two row blocks stay in the first cache
constexpr int kAhead = 4;          // groups until weights that are asked for are unpacked
constexpr int kHints = 3;          // lines of a tile, which has 352 bytes, that each of two row blocks asks for

// A group's rows times a multiple of eight tokens and kRest more, which come first: they would be too few to unpack beside.
template <class F, int kRest, bool kEnd>
KIMI_INLINE void tiles_of_group(Rows& rows, const Packed<F>& following, const uint8_t* tile, ptrdiff_t ahead, int whole, bool first,
                                float* chunk, Totals earlier, Totals total) {
  alignas(64) static constexpr float none[kTile * kRows] = {};
  const float* before = first ? none : chunk;
  const int step = first ? 0 : kTile * kRows, rest = whole * kTile;
  const auto hint = [&](const uint8_t* tile) {
    for (int i = 0; i < kHints; ++i) __builtin_prefetch(tile + ahead + 64 * i);
  };
  if constexpr (kRest > 0) {
    hint(tile + rest * kTokenGroup);
    tile_of_group<F, kRest, false, kEnd>(rows, following, tile + rest * kTokenGroup, before + whole * step, chunk + rest * kRows,
                                         earlier.from(rest), total.from(rest));
  }
  for (; --whole > 0; tile += kTile * kTokenGroup, before += step, chunk += kTile * kRows) {
    hint(tile);
    tile_of_group<F, kTile, false, kEnd>(rows, following, tile, before, chunk, earlier, total);
    earlier = earlier.from(kTile), total = total.from(kTile);
  }
  hint(tile);
  tile_of_group<F, kTile, true, kEnd>(rows, following, tile, before, chunk, earlier, total);
}

template <class F, int kRest>
static void many_blocks(const void* const* w, const void* const* next, int n, const uint8_t* tiles, size_t step, int groups, int tokens,
                        float* const* out, size_t stride) {
  alignas(64) float chunk[kPair][kTokensAtOnce * kRows], sum[kPair][kTokensAtOnce * kRows], none[kRows] = {};
  const auto run = [](const void* block, int g) { return F::run(static_cast<const uint8_t*>(block), g); };
  Packed<F> now = Packed<F>::of(run(w[0], 0));
  Rows rows{{now.template unpacked<0>(), now.template unpacked<1>(), now.template unpacked<2>(), now.template unpacked<3>(),
             now.template unpacked<4>(), now.template unpacked<5>(), now.template unpacked<6>(), now.template unpacked<7>()},
            now.exponent};
  for (int g = 0; g < groups; ++g, tiles += step) {
    const bool first = g % kChunk == 0, last = g + 1 == groups, end = g % kChunk == kChunk - 1 || last;
    for (int s = 0; s < n; ++s) {
      const Packed<F> following = Packed<F>::of(s + 1 < n ? run(w[s + 1], g) : run(w[0], last ? 0 : g + 1));
      const uint8_t* soon = g + kAhead < groups ? run(w[s], g + kAhead) : run(next[s], g + kAhead - groups);
      for (int i = 0; i < F::bytes / 64 + 1; ++i) __builtin_prefetch(soon + 64 * i);
      const ptrdiff_t ahead = (last ? -g : 1) * static_cast<ptrdiff_t>(step) + s * kHints * 64;
      // Where the caller wants them, lines can be 512 bytes apart, and drive each other out of the first cache.
      const Totals kept{sum[s], kRows}, earlier = g < kChunk ? Totals{none, 0} : kept, total = last ? Totals{out[s], stride} : kept;
      if (end) tiles_of_group<F, kRest, true>(rows, following, tiles, ahead, tokens / kTile, first, chunk[s], earlier, total);
      else tiles_of_group<F, kRest, false>(rows, following, tiles, ahead, tokens / kTile, first, chunk[s], earlier, total);
    }
  }
}

template <class F>
static void many(const void* const* w, const void* const* next, int n, const uint8_t* tiles, int groups, int tokens, float* const* out,
                 size_t stride) {
  constexpr decltype(&many_blocks<F, 0>) kernel[kTile] = {many_blocks<F, 0>, many_blocks<F, 1>, many_blocks<F, 2>, many_blocks<F, 3>,
                                                          many_blocks<F, 4>, many_blocks<F, 5>, many_blocks<F, 6>, many_blocks<F, 7>};
  for (int from = 0, count; from < tokens; from += count) {
    count = part_of(tokens - from, kTokensAtOnce);
    float* to[kPair];
    for (int s = 0; s < n; ++s) to[s] = out[s] + from * stride;
    kernel[count % kTile](w, from + count < tokens ? w : next, n, tiles + static_cast<size_t>(from) * kTokenGroup,
                          static_cast<size_t>(tokens) * kTokenGroup, groups, count, to, stride);
  }
}

#define KIMI_MANY_FORMS {nullptr, products::many<products::Q4B>, products::many<products::Q3B>}  // those with scales of one byte
