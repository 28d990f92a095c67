// The image tower: everything between its products, in the order of native/vision_inl.h. Read arithmetic.cu first.
//
// Sums of 16 lanes (norms, the softmax's total, the patch projection) are kept by sixteen threads, one each, and meet in
// the CPU's tree. Attention is the CPU's: blocks of 128 keys, exact sums of 16-bit products, and blocks that meet in
// float32. Sixteen threads have four queries; thread l scores keys l, l + 16, ..., which is the CPU's lane l, and then
// sums channels l, l + 16, .... So a query's softmax stays in the registers of its sixteen threads, and only rounded
// weights go through shared memory.
//
// Dimension key:  P patches   W tower width   H heads   K = W / H   F MLP width   M image tokens   X values of a patch

constexpr int kKeys = 128;     // keys of a block
constexpr int kQueries = 32;   // queries of a block of threads
constexpr float kQkLimit = 4095.0f, kVLimit = 511.0f, kWeightLimit = 32767.0f;

// One picture's q, k and v of one layer, as native/vision.h lays them out; two 16-bit values a word.
struct Patches {
  u32* q;          // [H][N][K/2]
  u32* k;          // [H][Np/16][K/2][16 keys]
  u32* v;          // [H][Np/2][Kp]: two keys a word
  float* q_scale;  // [H][N], with log2(e) / sqrt(K)
  float* k_scale;  // [H][Np]
  float* v_scale;  // [H][Np/128][Kp]
  int N, H, K, Np, Kp;
};

// As `lane_sum`, by additions in the same tree, and right in every lane of each sixteen.
DEVICE float sum_of_sixteen(float v) {
  for (int step = 8; step; step /= 2) v = v + __shfl_xor_sync(kAll, v, step);
  return v;
}
DEVICE float largest_of_sixteen(float v) {
  for (int step = 8; step; step /= 2) {
    const float other = __shfl_xor_sync(kAll, v, step);
    v = other > v ? other : v;
  }
  return v;
}

// 2^x by the polynomial of vision_inl.h, operation for operation.
DEVICE float power_of_two(float x) {
  x = x > -126.0f ? x : -126.0f;
  const float n = rintf(x), f = x - n;
  float p = 0x1.5d87fep-10f;
  p = fmaf(p, f, 0x1.3b2ab6p-7f);
  p = fmaf(p, f, 0x1.c6b08ep-5f);
  p = fmaf(p, f, 0x1.ebfbep-3f);
  p = fmaf(p, f, 0x1.62e43p-1f);
  return fmaf(p, f, 1.0f) * two_to(static_cast<int>(n));
}

DEVICE u32 two_values(float low, float high) {  // each rounded to 16 bits, ties to even
  return (static_cast<u32>(static_cast<int>(rintf(low))) & 0xffffu) | static_cast<u32>(static_cast<int>(rintf(high))) << 16;
}
DEVICE int low_value(u32 two) { return static_cast<int>(static_cast<short>(two)); }
DEVICE int high_value(u32 two) { return static_cast<int>(two) >> 16; }

// x = patches · weight + (places + bias): where the residual stream begins. Sixteen threads have an output of eight
// patches. The grid: eights of outputs, eights of patches. weight [W][X], patches [T][X], X in whole sixteens.
KERNEL embed_patches(const float* weight, const float* patches, int X, int W, int T, const float* places,
                     const float* bias, float* x) {
  const int own = threadIdx.x % 16, o = blockIdx.x * 8 + threadIdx.x / 16, first = blockIdx.y * 8;
  const float* row = weight + static_cast<size_t>(least(o, W - 1)) * X;
  float sum[8] = {};
  for (int k = own; k < X; k += 16) {
    const float w = row[k];
#pragma unroll
    for (int t = 0; t < 8; ++t)
      sum[t] = fmaf(w, patches[static_cast<size_t>(least(first + t, T - 1)) * X + k], sum[t]);
  }
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float all = sum_of_sixteen(sum[t]);
    const size_t at = static_cast<size_t>(first + t) * W + o;
    if (own == t && o < W && first + t < T) x[at] = all + (places[at] + bias[o]);
  }
}

// Rows of patches in the order of tokens: the four patches of each 2 × 2 square of a picture of `wide` patches a row.
DEVICE int of_square(int i, int wide) {
  const int token = i / 4, row = token / (wide / 2), column = token % (wide / 2);
  return (2 * row + i / 2 % 2) * wide + 2 * column + i % 2;
}

// Layer norm, a row of W floats a warp: as floats where `out` is given, and quantized where `rows` is. Row i is the i-th of
// x, or, for `wide` > 0, the i-th in the order of tokens.
KERNEL layer_norm(const float* x, const float* weight, const float* bias, int T, int W, float eps, int wide, float* out,
                  Rows rows) {
  const int t = blockIdx.x * warps() + warp();
  if (t >= T) return;
  const float* row = x + static_cast<size_t>(wide ? of_square(t, wide) : t) * W;
  float sum = 0.0f, square = 0.0f;
  for (int k = lane() % 16; k < ceil_div(W, 16) * 16; k += 16) sum = sum + (k < W ? row[k] : 0.0f);
  const float mean = sum_of_sixteen(sum) / static_cast<float>(W);
  for (int k = lane() % 16; k < W; k += 16) {
    const float d = row[k] - mean;
    square = fmaf(d, d, square);
  }
  const float r = 1.0f / sqrtf(sum_of_sixteen(square) / static_cast<float>(W) + eps);
  for (int g = 0; g < ceil_div(W, kGroup); ++g) {
    const int k = g * kGroup + lane();
    const float v = k < W ? fmaf((row[k] - mean) * r, weight[k], bias[k]) : 0.0f;
    if (out && k < W) out[static_cast<size_t>(t) * W + k] = v;
    if (rows.q) quantize(v, rows, t, g);
  }
}

// Rows of n floats to int8, a group a warp, the last group filled up with zeros. The grid: groups, rows.
KERNEL quantize_rows(const float* x, int n, Rows rows) {
  const int g = blockIdx.x * warps() + warp(), k = g * kGroup + lane();
  if (g >= rows.groups) return;
  quantize(k < n ? x[static_cast<size_t>(blockIdx.y) * n + k] : 0.0f, rows, blockIdx.y, g);
}

DEVICE float gelu_tanh(float z) {  // z / (1 + e^(-2u)), u = sqrt(2 / pi) (z + 0.044715 z^3)
  const float u = -1.5957691216057308f * fmaf(z * z * z, 0.044715f, z);
  return z / (1.0f + exponential(u));
}
DEVICE float gelu_erf(float z) {  // z (1 + erf(z / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26
  const float a = fabsf(z) * 0.70710678118654752f, t = 1.0f / fmaf(a, 0.3275911f, 1.0f);
  float p = 1.061405429f;
  p = fmaf(p, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f) * t;
  const float rest = p * exponential((0.0f - a) * a);
  return (z > 0.0f ? z : 0.0f) - fabsf(z) * 0.5f * rest;
}

// gelu(y + bias) of rows of F floats to int8, as `quantize_rows`.
KERNEL gelu_rows(const float* y, const float* bias, int F, int exact, Rows rows) {
  const int g = blockIdx.x * warps() + warp(), k = g * kGroup + lane();
  if (g >= rows.groups) return;
  const float z = k < F ? y[static_cast<size_t>(blockIdx.y) * F + k] + bias[k] : 0.0f;
  const float v = exact ? gelu_erf(z) : gelu_tanh(z);
  quantize(k < F ? v : 0.0f, rows, blockIdx.y, g);
}

// x += y + bias, rows of W. The grid: shares of a row, rows.
KERNEL add_bias(const float* y, const float* bias, int W, float* x) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= W) return;
  const size_t at = static_cast<size_t>(blockIdx.y) * W + k;
  x[at] = x[at] + (y[at] + bias[k]);
}

// Bias, rotation and rounding of one row of q or k, a warp: two channels a lane, and two more if K > 64. Returns the scale.
DEVICE float place_row(const float* x, const float* bias, const float* cos, const float* sin, int K, u32* out, int step) {
  float even[2], odd[2], most = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = lane() + 32 * i;
    const bool has = j < K / 2;
    const float a = has ? x[2 * j] + bias[2 * j] : 0.0f, b = has ? x[2 * j + 1] + bias[2 * j + 1] : 0.0f;
    const float c = has ? cos[j] : 0.0f, s = has ? sin[j] : 0.0f;
    even[i] = a * c - b * s;
    odd[i] = a * s + b * c;
    most = fabsf(even[i]) > most ? fabsf(even[i]) : most;
    most = fabsf(odd[i]) > most ? fabsf(odd[i]) : most;
  }
  most = largest(most);
  const float inverse = most > 1e-30f ? kQkLimit / most : 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = lane() + 32 * i;
    if (j < K / 2) out[j * step] = two_values(even[i] * inverse, odd[i] * inverse);
  }
  return most / kQkLimit;
}

// Rows first..first + n - 1 of a picture into its store; first is a multiple of 128, and n too unless the picture ends
// there. qkv [n][3][H][K]; cos and sin [n][K/2]. The grid: heads, blocks of keys; 128 threads.
KERNEL place_patches(Patches s, const float* qkv, const float* bias, const float* cos, const float* sin, int first, int n) {
  const int head = blockIdx.x, from = blockIdx.y * kKeys, count = least(kKeys, n - from), W = s.H * s.K;
  const float factor = 1.44269504088896341f / sqrtf(static_cast<float>(s.K));
  qkv += static_cast<size_t>(from) * 3 * W + head * s.K;
  bias += head * s.K;
  for (int i = warp(); i < count; i += warps()) {
    const int at = first + from + i;
    const float *row = qkv + static_cast<size_t>(i) * 3 * W, *c = cos + static_cast<size_t>(from + i) * (s.K / 2),
                *si = sin + static_cast<size_t>(from + i) * (s.K / 2);
    const size_t query = static_cast<size_t>(head) * s.N + at, key = static_cast<size_t>(head) * s.Np + at;
    const float q = place_row(row, bias, c, si, s.K, s.q + query * (s.K / 2), 1);
    const float k = place_row(row + W, bias + W, c, si, s.K, s.k + (key / 16 * 16) * (s.K / 2) + at % 16, 16);
    if (lane() == 0) {
      s.q_scale[query] = factor * q;
      s.k_scale[key] = k;
    }
  }
  // v: the largest of a channel over the block, a thread each; a missing key is zero.
  const int channel = threadIdx.x;
  if (channel >= s.Kp) return;
  const bool has = channel < s.K;
  qkv += 2 * W + channel;
  const float shift = has ? bias[2 * W + channel] : 0.0f;
  float most = 0.0f;
  for (int i = 0; has && i < count; ++i) {
    const float v = fabsf(qkv[static_cast<size_t>(i) * 3 * W] + shift);
    most = v > most ? v : most;
  }
  const float inverse = most > 1e-30f ? kVLimit / most : 0.0f;
  const int block = (first + from) / kKeys;
  s.v_scale[(static_cast<size_t>(head) * (s.Np / kKeys) + block) * s.Kp + channel] = most / (kVLimit * kWeightLimit);
  u32* out = s.v + (static_cast<size_t>(head) * s.Np + block * kKeys) / 2 * s.Kp + channel;
  for (int i = 0; i < kKeys; i += 2) {
    const float a = has && i < count ? (qkv[static_cast<size_t>(i) * 3 * W] + shift) * inverse : 0.0f;
    const float b = has && i + 1 < count ? (qkv[static_cast<size_t>(i + 1) * 3 * W] + shift) * inverse : 0.0f;
    out[static_cast<size_t>(i / 2) * s.Kp] = two_values(a, b);
  }
}

// Queries first..first + n - 1 of a picture over all its keys: out [n][H][K]. The grid: 32 queries, heads; 128 threads.
// Shared: the weights of 32 queries and 128 keys, 16 bits each. NV sixteens of channels are enough for K.
template <int NV>
DEVICE void attend_patches(const Patches& s, int first, int n, float* out) {
  const int head = blockIdx.y, own = threadIdx.x % 16, group = threadIdx.x / 16, from = blockIdx.x * kQueries + 4 * group;
  u32* weights = reinterpret_cast<u32*>(shared_memory) + 4 * group * (kKeys / 2);
  short* weight = reinterpret_cast<short*>(weights);
  const u32* q[4];
  float q_scale[4], top[4], total[4], o[4][NV];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // past the last query the last one is computed again, and not stored
    const size_t row = static_cast<size_t>(head) * s.N + first + least(from + i, n - 1);
    q[i] = s.q + row * (s.K / 2);
    q_scale[i] = s.q_scale[row];
    top[i] = __int_as_float(static_cast<int>(0xff800000u));  // -infinity
    total[i] = 0.0f;
#pragma unroll
    for (int m = 0; m < NV; ++m) o[i][m] = 0.0f;
  }
  for (int key = 0; key < s.Np; key += kKeys) {
    const u32* k = s.k + (static_cast<size_t>(head) * s.Np + key) * (s.K / 2) + own;
    int sum[4][8] = {};
    for (int c = 0; c < s.K / 2; ++c) {
      u32 two[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) two[i] = q[i][c];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const u32 of_key = k[16 * (j * (s.K / 2) + c)];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sum[i][j] += low_value(two[i]) * low_value(of_key) + high_value(two[i]) * high_value(of_key);
      }
    }
    float keep[4], gain[4];
    __syncthreads();  // the weights before have been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float score[8], here = __int_as_float(static_cast<int>(0xff800000u));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = key + own + 16 * j;
        const float scale = at < s.N ? s.k_scale[static_cast<size_t>(head) * s.Np + at] * q_scale[i] : 0.0f;
        score[j] = at < s.N ? static_cast<float>(sum[i][j]) * scale : __int_as_float(static_cast<int>(0xff800000u));
        here = score[j] > here ? score[j] : here;
      }
      here = largest_of_sixteen(here);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float e = power_of_two(score[j] - here);
        part = part + e;
        weight[i * kKeys + own + 16 * j] = static_cast<short>(static_cast<int>(rintf(e * kWeightLimit)));
      }
      const float now = here > top[i] ? here : top[i];
      keep[i] = power_of_two(top[i] - now);
      gain[i] = power_of_two(here - now);
      top[i] = now;
      total[i] = fmaf(total[i], keep[i], part * gain[i]);
    }
    __syncthreads();
    const u32* v = s.v + (static_cast<size_t>(head) * s.Np + key) / 2 * s.Kp + own;
    int mixed[4][NV] = {};
    for (int pair = 0; pair < kKeys / 2; ++pair) {
      u32 two[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) two[i] = weights[i * (kKeys / 2) + pair];
#pragma unroll
      for (int m = 0; m < NV; ++m) {
        const u32 of_channel = 16 * m < s.Kp ? v[static_cast<size_t>(pair) * s.Kp + 16 * m] : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mixed[i][m] += low_value(two[i]) * low_value(of_channel) + high_value(two[i]) * high_value(of_channel);
      }
    }
    const float* scale = s.v_scale + (static_cast<size_t>(head) * (s.Np / kKeys) + key / kKeys) * s.Kp + own;
#pragma unroll
    for (int m = 0; m < NV; ++m) {
      const float of_channel = 16 * m < s.Kp ? scale[16 * m] : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        o[i][m] = fmaf(o[i][m], keep[i], static_cast<float>(mixed[i][m]) * (of_channel * gain[i]));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = 1.0f / sum_of_sixteen(total[i]);
#pragma unroll
    for (int m = 0; m < NV; ++m)
      if (from + i < n && own + 16 * m < s.K)
        out[(static_cast<size_t>(from + i) * s.H + head) * s.K + own + 16 * m] = o[i][m] * inverse;
  }
}
KERNEL_OF_EIGHT attend_patches_5(Patches s, int first, int n, float* out) { attend_patches<5>(s, first, n, out); }
KERNEL_OF_EIGHT attend_patches_8(Patches s, int first, int n, float* out) { attend_patches<8>(s, first, n, out); }
