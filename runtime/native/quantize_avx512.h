// Quantizing a whole tile of eight tokens, a group of all at once: what is found of a token, its largest value and its sums, then
// fills a lane, not a vector, and is stored with its neighbours'. One token at a time took some 50 cycles a group in a prompt, for
// chains of shuffles and five small stores into lines that another token had left. Included by kernels_inl.h.

// Of two vectors each half against the other: the first's in the lower half, the second's in the upper.
static inline V halves_max(V a, V b) { return vmax(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); }

static void quantize_tile(const float* x, size_t stride, int groups, Tile to) {
  uint8_t* tile = to.at;
  const __m512i by_token = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i first_halves = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i second_halves = _mm512_add_epi32(first_halves, _mm512_set1_epi32(4));
  for (int g = 0; g < groups; ++g, x += kGroup, tile += to.step) {
    V a[kTile], b[kTile], most[kTile], four[2];
    for (int i = 0; i < kTile; ++i) {
      a[i] = vload(x + i * stride), b[i] = vload(x + i * stride + 16);
      most[i] = vmax(vabs(a[i]), vabs(b[i]));
    }
    for (int h = 0; h < 2; ++h) {  // a token in each quarter of a vector
      const V u = halves_max(most[4 * h], most[4 * h + 1]), v = halves_max(most[4 * h + 2], most[4 * h + 3]);
      four[h] = vmax(_mm512_shuffle_f32x4(u, v, 0x88), _mm512_shuffle_f32x4(u, v, 0xdd));
    }
    const V two = vmax(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    const __m256 absmax = _mm512_castps512_ps256(_mm512_permutexvar_ps(by_token, vmax(two, _mm512_permute_ps(two, 0x4e))));

    // `quantize_token` has the same steps.
    const __mmask8 some = _mm256_cmp_ps_mask(absmax, _mm256_set1_ps(1e-30f), _CMP_GT_OQ);
    const __m256i carried = _mm256_add_epi32(_mm256_castps_si256(absmax), _mm256_set1_epi32(0x1ffff));
    const __m256i e = _mm256_maskz_sub_epi32(some, _mm256_srai_epi32(carried, 23), _mm256_set1_epi32(133));
    alignas(32) float inverse[kTile];
    _mm256_store_si256(reinterpret_cast<__m256i*>(inverse),
                       _mm256_maskz_slli_epi32(some, _mm256_sub_epi32(_mm256_set1_epi32(127), e), 23));
    L pair[kTile / 2], sums[kTile / 2];
    for (int i = 0; i < kTile / 2; ++i) {
      const auto bytes = [&](int t) {
        const V by = vset(inverse[t]);
        const auto half = [&](V values) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(vround(vmul(values, by)))); };
        return _mm256_set_m128i(half(b[t]), half(a[t]));
      };
      pair[i] = _mm512_inserti64x4(_mm512_castsi256_si512(bytes(2 * i)), bytes(2 * i + 1), 1);
      _mm512_storeu_si512(tile + 2 * i * kGroup, pair[i]);
      sums[i] = _mm512_dpbusd_epi32(izero(), _mm512_set1_epi8(1), pair[i]);  // of four bytes
    }
    const auto fours = [](I p, I q) { return iadd(_mm512_unpacklo_epi32(p, q), _mm512_unpackhi_epi32(p, q)); };
    const I u = fours(sums[0], sums[1]), v = fours(sums[2], sums[3]);
    const I all = iadd(_mm512_unpacklo_epi64(u, v), _mm512_unpackhi_epi64(u, v));
    const auto times = [&](L which) {
      return _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), _mm512_castsi512_si256(_mm512_permutexvar_epi32(which, all))), 3);
    };
    const __m256i low = times(first_halves), whole = _mm256_add_epi32(low, times(second_halves));
    float* scales = reinterpret_cast<float*>(tile + kTile * kGroup);
    _mm256_storeu_ps(scales, _mm256_add_ps(kept(e), _mm256_sub_ps(absmax, absmax)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales + kTile), whole);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales + 2 * kTile), to.for_many ? _mm256_slli_epi32(whole, 4) : low);
  }
}
