// Absorbed attention over the packed latent cache. Read products.cu first, and native/attention.cpp for the why.
//
// The cache holds int8 rows twice: `rows` with positions as rows of the packed layout q8g32, for the scores, and
// `columns` with latent channels as rows and positions as channels, for the weighted sums. Both are products of
// products.cu whose "tokens" are heads, eight of one token or, in a long prompt, 32 of one or several neighbours; so each
// cached byte is read once for eight or 32. A decoded token is spread over positions: scores by row blocks, sums by chunks
// of 256 positions, whose totals `finish` adds in order.
//
// Where the first token stands comes from device memory, and grids depend on the context alone: a captured step stays
// right at every position.

struct Cache {
  u8 *rows, *columns;
  int context, C, R;
};
DEVICE int row_groups(const Cache& c) { return c.C / kGroup + ceil_div(c.R, kGroup); }
DEVICE size_t rows_stride(const Cache& c) { return static_cast<size_t>(row_groups(c)) * Q8::bytes; }
DEVICE size_t columns_stride(const Cache& c) { return static_cast<size_t>(ceil_div(c.context, kGroup)) * Q8::bytes; }

// Stored scale of a group whose largest value is `most`, and the factor that takes a value to its step.
DEVICE u16 stored_scale(float most, float* inverse) {
  const u16 half = float_to_half(most * (1.0f / 127.0f));
  const float scale = half_to_float(half);
  *inverse = 1.0f / (scale > 1e-30f ? scale : 1e-30f);
  return half;
}
DEVICE int to_step(float v, float inverse) {
  v = v * inverse;
  v = v < 127.0f ? v : 127.0f;
  v = v > -127.0f ? v : -127.0f;
  return static_cast<int>(rintf(v));
}

DEVICE float rotated(const float* x, int i, const float* cos, const float* sin) {
  const int pair = i / 2;
  const float even = x[2 * pair], odd = x[2 * pair + 1], c = cos[pair], s = sin[pair];
  return i % 2 ? even * s + odd * c : even * c - odd * s;
}

// Of token blockIdx.x. Block H of the grid's y: the latent, normalised, and the key, rotated, into the cache. Block h:
// head h's query, its no-rope part quantized for k_b, its rope part rotated and quantized beside what k_b will give.
// q [T][H][N + R], kv [T][C + R], cos and sin [T][R / 2]. Shared: C + 1 floats.
KERNEL latents(const float* q, const float* kv, const float* weight, float eps, const float* cos, const float* sin,
               const int* start, int N, Cache cache, Rows nope, Rows query) {
  const int t = blockIdx.x, h = blockIdx.y, H = gridDim.y - 1, C = cache.C, R = cache.R;
  cos += static_cast<size_t>(t) * (R / 2);
  sin += static_cast<size_t>(t) * (R / 2);
  if (h < H) {
    const size_t row = static_cast<size_t>(t) * H + h;
    q += row * (N + R);
    for (int g = warp(); g < N / kGroup + ceil_div(R, kGroup); g += warps()) {
      const int k = g * kGroup + lane(), i = k - N;
      if (i < 0 || g < N / kGroup) quantize(q[k], nope, row, g);
      else quantize(i < R ? rotated(q + N, i, cos, sin) : 0.0f, query, row, C / kGroup + g - N / kGroup);
    }
    return;
  }
  float* staged = shared_floats();
  kv += static_cast<size_t>(t) * (C + R);
  for (int k = threadIdx.x; k < C; k += blockDim.x) staged[k] = kv[k];
  __syncthreads();
  const float r = inverse_norm(staged, C, eps, staged + C);
  const int position = *start + t, row = position % kRows;
  u8* block = cache.rows + position / kRows * rows_stride(cache);
  for (int g = warp(); g < row_groups(cache); g += warps()) {
    const int k = g * kGroup + lane();
    const float v = k < C ? staged[k] * r * weight[k] : k < C + R ? rotated(kv + C, k - C, cos, sin) : 0.0f;
    float inverse;
    const u16 half = stored_scale(largest_magnitude(v), &inverse);
    u8* run = block + static_cast<size_t>(g) * Q8::bytes;
    run[64 * (lane() / 4) + 4 * row + lane() % 4] = static_cast<u8>(to_step(v, inverse));
    if (lane() == 0) *reinterpret_cast<u16*>(run + 512 + 2 * row) = half;
  }
}

// A cached value of latent channel k, as its row gives it.
DEVICE float cached(const Cache& cache, int position, int k) {
  const int row = position % kRows;
  const u8* run = cache.rows + position / kRows * rows_stride(cache) + static_cast<size_t>(k / kGroup) * Q8::bytes;
  const float scale = half_to_float(*reinterpret_cast<const u16*>(run + 512 + 2 * row));
  return scale * static_cast<float>(static_cast<s8>(run[64 * (k % kGroup / 4) + 4 * row + k % 4]));
}

// Groups of 32 positions that these T tokens completed, into the columns: a lane has a channel, whose positions are the 32
// columns of a q8g32 row.
DEVICE void turn_completed(const Cache& cache, int start, int T) {
  const int wide = cache.C / kGroup, first = start / kGroup, n = ((start + T) / kGroup - first) * wide;
  for (int i = blockIdx.x * warps() + warp(); i < n; i += gridDim.x * warps()) {
    const int group = first + i / wide, g = i % wide;
    float value[kGroup], most = 0.0f;
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      value[p] = cached(cache, group * kGroup + p, g * kGroup + lane());
      most = fabsf(value[p]) > most ? fabsf(value[p]) : most;
    }
    float inverse;
    const u16 half = stored_scale(most, &inverse);
    const int row = lane() % kRows;
    u8* run = cache.columns + (2 * g + lane() / kRows) * columns_stride(cache) + group * Q8::bytes;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      u32 word = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) word |= static_cast<u32>(to_step(value[4 * j + c], inverse) & 255) << 8 * c;
      *reinterpret_cast<u32*>(run + 64 * j + 4 * row) = word;
    }
    *reinterpret_cast<u16*>(run + 512 + 2 * row) = half;
  }
}

// Tokens are scored in slices: n of T, from token `first` on. Their queries are n · H rows, of which a block takes NT, as
// far as the last of their tokens sees: what a score beyond its own token's sight is does not matter. y: tiles of rows,
// and behind them the turning of columns, which the next kernel reads. s [n · H][stride].
template <int NT>
DEVICE void scores(const Cache& cache, const int* start, int first, int n, int T, int H, const Rows& query, float* s,
                   int stride) {
  const int row = blockIdx.y * NT, rows = least(NT, n * H - row);
  if (rows <= 0) {
    if (first == 0) turn_completed(cache, *start, T);
    return;
  }
  const int b = blockIdx.x * 8, count = least(8, ceil_div(*start + first + (row + rows - 1) / H + 1, kRows) - b);
  if (count <= 0) return;
  const size_t wide = rows_stride(cache);
  const float* out = multiply<NT>(kQ8, cache.rows + b * wide, static_cast<int>(wide), count, query, rows,
                                  [=](int i) { return first * H + row + i; });
  for (int i = threadIdx.x; i < count * NT * kRows; i += blockDim.x) {
    const int own = i / kRows % NT, position = (b + i / (NT * kRows)) * kRows + i % kRows;
    if (own < rows) s[static_cast<size_t>(row + own) * stride + position] = out[i];
  }
}
KERNEL_OF_EIGHT scores_8(Cache cache, const int* start, int first, int n, int T, int H, Rows query, float* s,
                         int stride) {
  scores<8>(cache, start, first, n, T, H, query, s, stride);
}
KERNEL_OF_TILES scores_32(Cache cache, const int* start, int first, int n, int T, int H, Rows query, float* s,
                          int stride) {
  scores<32>(cache, start, first, n, T, H, query, s, stride);
}

constexpr int kStaged = 2048;  // weights of one round of the softmax

// Weights of head blockIdx.x of the slice's token blockIdx.y, not yet divided by their sum: quantized, and what was lost
// of the first whole group and of the token's own group quantized again. inverse [slice][H]. The order of sums makes
// their sum serial, sixteen lanes wide: the first warp adds one round's weights while the others make the next.
// Shared: 2 · kStaged + 32 floats; two warps at least.
KERNEL softmax(const int* start, int first, float scale, const float* s, int stride, Rows weights, Rows rest,
               float* inverse) {
  const int n = *start + first + static_cast<int>(blockIdx.y) + 1, padded = ceil_div(n, kGroup) * kGroup;
  const size_t row = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  float *staged = shared_floats(), *tops = staged + 2 * kStaged;
  s += row * stride;
  float top = s[0];
#pragma unroll 8
  for (int k = threadIdx.x; k < n; k += blockDim.x) {
    const float other = s[k];
    top = other > top ? other : top;
  }
  top = largest(top);
  if (lane() == 0) tops[warp()] = top;
  __syncthreads();
  for (int w = 0; w < warps(); ++w) top = tops[w] > top ? tops[w] : top;
  float total = 0.0f;  // of every sixteenth weight
  for (int round = 0; round <= ceil_div(padded, kStaged); ++round) {
    if (warp() == 0) {
      const float* made = staged + (round + 1) % 2 * kStaged;
      const int there = round ? least(kStaged, padded - (round - 1) * kStaged) : 0;
#pragma unroll 8
      for (int k = lane() % 16; k < there; k += 16) total = total + made[k];
    } else {
      const int base = round * kStaged, here = least(kStaged, padded - base);
      for (int k = (warp() - 1) * kGroup + lane(); k < here; k += (warps() - 1) * kGroup) {
        const int position = base + k, group = position / kGroup;
        const float v = position < n ? exponential(scale * (s[position] - top)) : 0.0f;
        staged[round % 2 * kStaged + k] = v;
        const float lost = quantize(v, weights, row, group);
        if (group == n / kGroup) quantize(lost, rest, row, 1);
        else if (group == 0) quantize(lost, rest, row, 0);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x >= 32) return;
  total = lane_sum(total);
  if (threadIdx.x == 0) inverse[row] = 1.0f / total;
}

// Weighted sums over whole groups of positions, chunk by chunk: partial [slice][H][chunks][C]. The grid: row blocks of
// channels, shares of the chunks, tiles of heads of each token.
KERNEL_OF_EIGHT weigh_8(Cache cache, const int* start, int first, int H, Rows weights, float* partial, int chunks) {
  const int tiles = ceil_div(H, 8), h0 = blockIdx.z % tiles * 8, z = blockIdx.z / tiles, quad = threadIdx.x % 4;
  const int groups = (*start + first + z + 1) / kGroup;
  int token[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) token[i] = z * H + least(h0 + i, H - 1);
  const u8* block = cache.columns + blockIdx.x * columns_stride(cache);
  const int share = blockDim.x / 4;  // chunks that a block takes at a time
  for (int chunk = blockIdx.y * share + threadIdx.x / 4; chunk < ceil_div(groups, kChunk); chunk += gridDim.y * share) {
    float total[8][4];
    chunk_total<Q8, 8>(block, weights, token, chunk * kChunk, least(groups, (chunk + 1) * kChunk), quad, total);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (h0 + i < H) {
        const size_t at = (static_cast<size_t>(z) * H + h0 + i) * chunks + chunk;
        *reinterpret_cast<float4*>(partial + at * cache.C + blockIdx.x * kRows + 4 * quad) =
            make_float4(total[i][0], total[i][1], total[i][2], total[i][3]);
      }
  }
}

// The same for many tokens, n of them, their n · H rows of weights in tiles, and `span` chunks to a part: partial
// [slice][H][parts][C]. The grid: eights of row blocks, parts, tiles of rows.
KERNEL_OF_TILES weigh_32(Cache cache, const int* start, int first, int n, int H, Rows weights, float* partial,
                         int parts, int span) {
  const int block = blockIdx.x * kTall, row = blockIdx.z * kTile, rows = least(kTile, n * H - row);
  const int count = least(kTall, cache.C / kRows - block), seen = *start + first + 1;
  const auto groups_of = [=](int i) { return (seen + (row + i) / H) / kGroup; };
  const int from = blockIdx.y * span * kChunk, to = least(groups_of(rows - 1), from + span * kChunk);
  if (from >= to) return;
  float sum[kHeld];
  tile_sums<Q8>(cache.columns + block * columns_stride(cache), static_cast<int>(columns_stride(cache)), count, weights, rows,
                [=](int i) { return row + i; }, from, to, groups_of, sum);
  each_of_tile(sum, count, [=](int b, int i, int channel, float v) {
    const size_t at = static_cast<size_t>(row + i) * parts + blockIdx.y;
    if (i < rows) partial[at * cache.C + (block + b) * kRows + channel] = v;
  });
}

// One group of weights times one group of 32 positions of a channel, whose steps are 32 bytes.
DEVICE float one_group(const uint4* steps, float scale, const Rows& x, size_t row, int group) {
  const size_t at = row * x.groups + group;
  const uint4* values = reinterpret_cast<const uint4*>(x.q) + 2 * at;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 w = steps[i], v = values[i];
    sum = dp4a(w.x, v.x, sum);
    sum = dp4a(w.y, v.y, sum);
    sum = dp4a(w.z, v.z, sum);
    sum = dp4a(w.w, v.w, sum);
  }
  return 0.0f + fmaf(static_cast<float>(sum), scale * x.scale[at], 0.0f);
}

// What the warps of `finish` share: 32 positions of 32 channels, [0] the first group's, [1] the own group's, as steps (a
// channel's 32 and 16 bytes more, so that lanes meet fewer banks) and their scales; and the own group's values, one more
// apart, so that neither a position nor a channel lies in one bank.
struct Turned {
  uint4 step[2][kGroup][3];
  float scale[2][kGroup], value[kGroup][kGroup + 1];
};

// A weighted sum, the parts over whole groups in order and what the second digits and the own group add, over the
// softmax's own sum; quantized for v_b. The own group is turned here, by all warps. The grid: groups of 32 channels, tokens
// of the slice; a warp is a head. u: row t · H + h. Shared: a Turned.
KERNEL_OF_HEADS finish(Cache cache, const int* start, int first, Rows weights, Rows rest, const float* inverse,
                       const float* partial, int parts, int span, Rows u) {
  const int g = blockIdx.x, h = warp(), H = warps(), t = first + blockIdx.y;
  const int n = *start + t + 1, groups = n / kGroup, own = n % kGroup;
  Turned& turned = *reinterpret_cast<Turned*>(shared_memory);
  for (int i = h; i < kGroup; i += H)
    turned.value[i][lane()] = i < own ? cached(cache, groups * kGroup + i, g * kGroup + lane()) : 0.0f;
  if (groups) {
    for (int i = threadIdx.x; i < 8 * kGroup; i += blockDim.x) {  // word i / 32 of channel i % 32
      const int channel = i % kGroup, row = channel % kRows;
      const u8* run = cache.columns + (2 * g + channel / kRows) * columns_stride(cache);
      reinterpret_cast<u32*>(turned.step[0][channel])[i / kGroup] =
          *reinterpret_cast<const u32*>(run + 64 * (i / kGroup) + 4 * row);
      if (i < kGroup) turned.scale[0][channel] = half_to_float(*reinterpret_cast<const u16*>(run + 512 + 2 * row));
    }
  }
  __syncthreads();
  for (int i = h; i < kGroup; i += H) {
    const float v = turned.value[lane()][i];
    float to_steps;
    const u16 half = stored_scale(largest_magnitude(v), &to_steps);
    reinterpret_cast<s8*>(turned.step[1][i])[lane()] = static_cast<s8>(to_step(v, to_steps));
    turned.scale[1][i] = half_to_float(half);
  }
  const size_t row = static_cast<size_t>(blockIdx.y) * H + h;
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (groups) {
    const float* totals = partial + row * parts * cache.C + g * kGroup + lane();
    const size_t wide = cache.C;
#pragma unroll 8
    for (int i = 0; i < ceil_div(groups, span * kChunk); ++i) part[0] = part[0] + totals[i * wide];
    part[1] = one_group(turned.step[0][lane()], turned.scale[0][lane()], rest, row, 0);
  }
  __syncthreads();
  if (own) {
    part[2] = one_group(turned.step[1][lane()], turned.scale[1][lane()], weights, row, groups);
    part[3] = one_group(turned.step[1][lane()], turned.scale[1][lane()], rest, row, 1);
  }
  quantize(((part[0] + part[1]) + (part[2] + part[3])) * inverse[row], u, static_cast<size_t>(t) * H + h, g);
}
