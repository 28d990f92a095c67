// Products of packed matrices and quantized rows. Read arithmetic.cu first.
//
// A run of 16 rows × 32 channels is lines of 64 bytes, four channels of all 16 rows, then 16 float16 scales. A thread
// takes four rows of a row block (16 bytes of each line) through one chunk of eight groups, the unit of the fixed order
// of sums. So four neighbouring threads read whole lines, every 32-byte sector that is fetched is used, and no thread
// waits for another before its chunk's total. The totals meet in shared memory and are added in order.
//
// At full size (K = 2048, eight chunks) a row block is one warp. Gate and up of six experts and of the shared MLP are
// 1408 warps; a thread has one or two groups on the way, 72 to 144 bytes, so sixteen warps on a multiprocessor have 37 kB
// or more. A 3090 needs about 936 GB/s × 0.6 µs = 560 kB in flight, 7 kB for each of its 82. Smaller matrices (q and kv_a:
// 228 warps; o: 128) have less, 2.8 and 1.6 warps, but still 6 kB and 4 kB: those are where more bytes in flight may pay.
// Weights are read once for NT tokens; activations come from the first cache.

struct Matrix {     // packed; `stride` bytes from row block to row block
  const u8* data;
  int form, rows, columns, stride;
};

enum { kQ4 = 0, kQ8 = 1 };

struct Q4 {         // w = scale · (q - 8): the sums start at -8 · (sum of the activations)
  static constexpr int lines = 4, bytes = 288;
  static constexpr bool biased = true;
  DEVICE int dot(u32 w, int line, const u32* x, int sum) {
    sum = __dp4a(static_cast<int>(w & 0x0f0f0f0fu), static_cast<int>(x[2 * line]), sum);
    return __dp4a(static_cast<int>(w >> 4 & 0x0f0f0f0fu), static_cast<int>(x[2 * line + 1]), sum);
  }
};

struct Q8 {         // w = scale · q
  static constexpr int lines = 8, bytes = 544;
  static constexpr bool biased = false;
  DEVICE int dot(u32 w, int line, const u32* x, int sum) {
    return __dp4a(static_cast<int>(w), static_cast<int>(x[line]), sum);
  }
};

// Rows 4 quad..4 quad + 3 of a row block, groups first..last - 1 (within one chunk), times the listed rows of x.
template <class Form, int NT>
DEVICE void chunk_total(const u8* block, const Rows& x, const int (&token)[NT], int first, int last, int quad,
                        float (&total)[NT][4]) {
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int r = 0; r < 4; ++r) total[t][r] = 0.0f;
#pragma unroll(NT == 1 ? 2 : 1)
  for (int g = first; g < last; ++g) {
    const u8* run = block + static_cast<size_t>(g) * Form::bytes;
    uint4 line[Form::lines];
#pragma unroll
    for (int j = 0; j < Form::lines; ++j) line[j] = *reinterpret_cast<const uint4*>(run + 64 * j + 16 * quad);
    const uint2 halves = *reinterpret_cast<const uint2*>(run + 64 * Form::lines + 8 * quad);
    const float scale[4] = {half_to_float(static_cast<u16>(halves.x)), half_to_float(static_cast<u16>(halves.x >> 16)),
                            half_to_float(static_cast<u16>(halves.y)), half_to_float(static_cast<u16>(halves.y >> 16))};
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      const int at = token[t] * x.groups + g;
      const uint4* values = reinterpret_cast<const uint4*>(x.q) + 2 * at;
      const uint4 a = values[0], b = values[1];
      const u32 word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      const int start = Form::biased ? x.sum[at] : 0;
      int sum[4] = {start, start, start, start};
#pragma unroll
      for (int j = 0; j < Form::lines; ++j) {
        sum[0] = Form::dot(line[j].x, j, word, sum[0]);
        sum[1] = Form::dot(line[j].y, j, word, sum[1]);
        sum[2] = Form::dot(line[j].z, j, word, sum[2]);
        sum[3] = Form::dot(line[j].w, j, word, sum[3]);
      }
      const float x_scale = x.scale[at];
#pragma unroll
      for (int r = 0; r < 4; ++r) total[t][r] = fmaf(static_cast<float>(sum[r]), scale[r] * x_scale, total[t][r]);
    }
  }
}

template <int NT>
DEVICE void chunk_total(int form, const u8* block, const Rows& x, const int (&token)[NT], int chunk, int quad,
                        float (&total)[NT][4]) {
  const int first = chunk * kChunk, last = least(first + kChunk, x.groups);
  if (form == kQ4) chunk_total<Q4, NT>(block, x, token, first, last, quad, total);
  else chunk_total<Q8, NT>(block, x, token, first, last, quad, total);
}

// `count` row blocks times NT rows of x: returns [count][NT][16] in shared memory, which stays until the next call. All
// threads of the block; shared: 16 · count · NT · (chunks + 1) floats.
template <int NT>
DEVICE const float* multiply(int form, const u8* blocks, int stride, int count, const Rows& x, const int (&token)[NT]) {
  const int chunks = ceil_div(x.groups, kChunk), n = count * NT * kRows;
  float *out = shared_floats(), *parts = out + n;
  for (int i = threadIdx.x; i < count * chunks * 4; i += blockDim.x) {
    const int quad = i % 4, chunk = i / 4 % chunks, b = i / 4 / chunks;
    float total[NT][4];
    chunk_total<NT>(form, blocks + static_cast<size_t>(b) * stride, x, token, chunk, quad, total);
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int r = 0; r < 4; ++r) parts[chunk * n + (b * NT + t) * kRows + 4 * quad + r] = total[t][r];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float sum = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk) sum = sum + parts[chunk * n + i];
    out[i] = sum;
  }
  __syncthreads();
  return out;
}

// Rows first..first + NT - 1 of x, the last one again where there are no more.
template <int NT>
DEVICE void consecutive(int first, int n, int (&token)[NT]) {
#pragma unroll
  for (int t = 0; t < NT; ++t) token[t] = least(first + t, n - 1);
}

// y (+)= w x for one or two matrices that read the same rows: blocks of the grid are a's row blocks, then b's; along y,
// tiles of NT tokens.
template <int NT>
DEVICE void product(const Matrix& a, const Matrix& b, const Rows& x, int T, float* ya, float* yb, int add) {
  const int split = ceil_div(a.rows, kRows);
  const bool second = static_cast<int>(blockIdx.x) >= split;
  const int form = second ? b.form : a.form, rows = second ? b.rows : a.rows, stride = second ? b.stride : a.stride;
  const int block = second ? blockIdx.x - split : blockIdx.x;
  const u8* blocks = (second ? b.data : a.data) + static_cast<size_t>(block) * stride;
  float* y = second ? yb : ya;
  for (int first = blockIdx.y * NT; first < T; first += gridDim.y * NT) {
    int token[NT];
    consecutive(first, T, token);
    const float* out = multiply<NT>(form, blocks, stride, 1, x, token);
    for (int i = threadIdx.x; i < NT * kRows; i += blockDim.x) {
      const int t = first + i / kRows, row = block * kRows + i % kRows;
      if (t >= T || row >= rows) continue;
      float* at = y + static_cast<size_t>(t) * rows + row;
      *at = add ? *at + out[i] : out[i];
    }
  }
}
KERNEL product_1(Matrix a, Matrix b, Rows x, int T, float* ya, float* yb, int add) {
  product<1>(a, b, x, T, ya, yb, add);
}
KERNEL_OF_EIGHT product_8(Matrix a, Matrix b, Rows x, int T, float* ya, float* yb, int add) {
  product<8>(a, b, x, T, ya, yb, add);
}

// Head h's matrix, at h · head_bytes, times row t · H + h of x; 32 outputs a block, quantized into group blockIdx.x of
// the same row of y. The grid: groups of outputs, heads, tiles of tokens.
template <int NT>
DEVICE void heads(const Matrix& w, u64 head_bytes, const Rows& x, int T, const Rows& y) {
  const int H = gridDim.y, h = blockIdx.y, g = blockIdx.x;
  const u8* blocks = w.data + h * head_bytes + static_cast<size_t>(2 * g) * w.stride;
  for (int first = blockIdx.z * NT; first < T; first += gridDim.z * NT) {
    int token[NT];
    consecutive(first, T, token);
    for (int t = 0; t < NT; ++t) token[t] = token[t] * H + h;
    const float* out = multiply<NT>(w.form, blocks, w.stride, 2, x, token);
    for (int t = warp(); t < least(NT, T - first); t += warps())
      quantize(out[(lane() / kRows * NT + t) * kRows + lane() % kRows], y, static_cast<size_t>(first + t) * H + h, g);
  }
}
KERNEL heads_1(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<1>(w, head_bytes, x, T, y); }
KERNEL_OF_EIGHT heads_8(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<8>(w, head_bytes, x, T, y); }
