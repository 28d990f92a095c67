// Products of packed matrices and quantized rows. Read arithmetic.cu first.
//
// A run of 16 rows × 32 channels is lines of 64 bytes, four channels of all 16 rows, then 16 float16 scales. Few
// tokens: a thread takes four rows of a row block (16 bytes of each line) through one chunk of eight groups, the unit of
// the fixed order of sums. So four neighbouring threads read whole lines, every 32-byte sector that is fetched is used,
// and no thread waits for another before its chunk's total. The totals meet in shared memory and are added in order. Many
// tokens: see kTile below.
//
// At full size (K = 2048, eight chunks) a row block is one warp. A card has to have bandwidth times latency on the way, about 560
// kB on a 3090, 2 MB on an H100. A thread asks for four groups of int4 at once, 288 bytes, so a warp for 9 kB: the 1408 warps of
// gate and up of six experts and the shared MLP have 13 MB on the way, the 228 of q and kv_a 2 MB.
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
  DEVICE void unpack(const uint2 (&w)[1], u32 (&a)[4]) {
    a[0] = w[0].x & 0x0f0f0f0fu, a[1] = w[0].y & 0x0f0f0f0fu;
    a[2] = w[0].x >> 4 & 0x0f0f0f0fu, a[3] = w[0].y >> 4 & 0x0f0f0f0fu;
  }
};

struct Q8 {         // w = scale · q
  static constexpr int lines = 8, bytes = 544;
  static constexpr bool biased = false;
  DEVICE int dot(u32 w, int line, const u32* x, int sum) {
    return __dp4a(static_cast<int>(w), static_cast<int>(x[line]), sum);
  }
  DEVICE void unpack(const uint2 (&w)[2], u32 (&a)[4]) { a[0] = w[0].x, a[1] = w[0].y, a[2] = w[1].x, a[3] = w[1].y; }
};

// Groups whose weights a thread asks for before it uses the first of them: a card answers after hundreds of clocks.
template <class Form, int NT>
DEVICE constexpr int ahead() { return NT > 1 ? 1 : Form::lines == 4 ? 4 : 2; }

// Rows 4 quad..4 quad + 3 of a row block, groups first..last - 1 (within one chunk), times the listed rows of x.
template <class Form, int NT>
DEVICE void chunk_total(const u8* block, const Rows& x, const int (&token)[NT], int first, int last, int quad,
                        float (&total)[NT][4]) {
  constexpr int many = ahead<Form, NT>();
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int r = 0; r < 4; ++r) total[t][r] = 0.0f;
#pragma unroll 1
  for (int begin = first; begin < last; begin += many) {
    uint4 line[many][Form::lines];
    uint2 halves[many];
#pragma unroll
    for (int i = 0; i < many; ++i) {  // past the end, the last one again
      const u8* run = block + static_cast<size_t>(least(begin + i, last - 1)) * Form::bytes;
#pragma unroll
      for (int j = 0; j < Form::lines; ++j) line[i][j] = *reinterpret_cast<const uint4*>(run + 64 * j + 16 * quad);
      halves[i] = *reinterpret_cast<const uint2*>(run + 64 * Form::lines + 8 * quad);
    }
#pragma unroll
    for (int i = 0; i < many; ++i) {
      const bool there = begin + i < last;
      const int g = least(begin + i, last - 1);
      const float scale[4] = {
          half_to_float(static_cast<u16>(halves[i].x)), half_to_float(static_cast<u16>(halves[i].x >> 16)),
          half_to_float(static_cast<u16>(halves[i].y)), half_to_float(static_cast<u16>(halves[i].y >> 16))};
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
          sum[0] = Form::dot(line[i][j].x, j, word, sum[0]);
          sum[1] = Form::dot(line[i][j].y, j, word, sum[1]);
          sum[2] = Form::dot(line[i][j].z, j, word, sum[2]);
          sum[3] = Form::dot(line[i][j].w, j, word, sum[3]);
        }
        const float x_scale = x.scale[at];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float sum_to_here = fmaf(static_cast<float>(sum[r]), scale[r] * x_scale, total[t][r]);
          total[t][r] = there ? sum_to_here : total[t][r];
        }
      }
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

// For many tokens: eight row blocks times a tile of 32 tokens, by four warps on the tensor cores, chunk by chunk. A warp
// has two row blocks. A chunk of the activations, which all four need, and of its own weights is brought to shared memory
// first, so that as many bytes are on the way as a chunk has. A group of a row block times eight tokens is one step of
// `mma`; its integer sums are exact, and each gets the float steps of the order of sums in its own lane.
//
// Which channels meet in a step's column is free, as long as both sides agree: lane 4 g + t takes channels 8 t..8 t + 7
// of its rows and tokens. Those are the two halves of one packed word of int4, and eight bytes in a row of a token. Which
// row is which is free too: it takes rows 2 g and 2 g + 1, whose words are neighbours.
constexpr int kTile = 32;           // tokens
constexpr int kTall = 8;            // row blocks
constexpr int kEights = kTile / 8;  // steps that share an unpacked weight
constexpr int kHeld = 8 * kEights;  // sums of a lane: number i of step e of its row block b at (b · kEights + e) · 4 + i
constexpr int kWhole = 0x4b400000;  // the bits of 1.5 · 2^23

// A chunk of activations: int8 values in halves of 16; for each two tokens where their sums start, [0], and their scales,
// [1], both twice, as a lane of `mma` takes them.
struct Chunk {
  uint4 half[kChunk][kTile][2], twice[2][kChunk][kTile / 2];
};

// Where piece i of 16 bytes of a run's lines stands in shared memory, so that the 16 lanes that read at once, eight bytes
// each, find them in 32 different banks.
DEVICE int place_of(int i) { return i ^ i / 8 % 4 * 2; }

// The float of an integer, given as the bits kWhole + n: as a float these are 1.5 · 2^23 + n, exactly, for |n| < 2^22, and
// so is the difference. A group's sum is at most 32 · 127 · 128 < 2^19. (An addition, because conversions are slow.)
DEVICE float exact(int bits) { return __int_as_float(bits) - 12582912.0f; }

// What a thread brings of a chunk, on its way from the card's memory to the shared one: all of it is asked for before any
// of it is stored. Of activations that is half a group of a row for every second group. Of a warp's two row blocks: a run is
// 16 or 32 pieces of 16 bytes of lines, of which a warp takes 32 at once, and two of scales, and those of two row blocks'
// eight groups are one for each lane.
template <class Form>
struct Coming {
  static constexpr int pieces = Form::bytes / 16, lines = 4 * Form::lines, at_once = 32 / lines;
  uint4 values[kChunk / 2], weights[2 * kChunk / at_once], scales;
  int twice[kChunk / 2];
};

// Groups first..first + groups - 1. Row `row` is the thread's; from group `reach` on it has none: zeros, which change no
// sum but the sign of a zero, and that is lost in the sum over chunks.
template <class Form>
DEVICE void ask(Coming<Form>& c, const Rows& x, size_t row, int reach, const u8* const (&block)[2], int first,
                int groups) {
  constexpr int pieces = Coming<Form>::pieces, lines = Coming<Form>::lines, at_once = Coming<Form>::at_once;
  const uint4* from[2] = {reinterpret_cast<const uint4*>(block[0]) + first * pieces,
                          reinterpret_cast<const uint4*>(block[1]) + first * pieces};
#pragma unroll
  for (int i = 0; i < 2 * kChunk; i += at_once) {
    const int k = least(i % kChunk + lane() / lines, groups - 1);  // past the end, the last one again
    c.weights[i / at_once] = from[i / kChunk][k * pieces + lane() % lines];
  }
  c.scales = (lane() / 2 / kChunk ? from[1] : from[0])[least(lane() / 2 % kChunk, groups - 1) * pieces + lines + lane() % 2];
  const int half = threadIdx.x % 2, whole = half ? 0 : kWhole;
  const int* word = half ? reinterpret_cast<const int*>(x.scale) : x.sum;
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const int k = 2 * i + threadIdx.x / (2 * kTile);
    const size_t at = row * x.groups + first + k;
    const bool there = k < groups && first + k < reach;
    c.values[i] = there ? reinterpret_cast<const uint4*>(x.q)[2 * at + half] : uint4{0, 0, 0, 0};
    c.twice[i] = whole + (there && (half || Form::biased) ? word[at] : 0);
  }
}

template <class Form>
DEVICE void store(const Coming<Form>& c, Chunk& chunk, uint4* weights, int groups) {
  constexpr int pieces = Coming<Form>::pieces, lines = Coming<Form>::lines, at_once = Coming<Form>::at_once;
#pragma unroll
  for (int i = 0; i < 2 * kChunk; i += at_once) {
    const int k = i % kChunk + lane() / lines;
    if (k < groups) weights[(i / kChunk * kChunk + k) * pieces + place_of(lane() % lines)] = c.weights[i / at_once];
  }
  const int own = lane() / 2;
  if (own % kChunk < groups) weights[own * pieces + lines + lane() % 2] = c.scales;
  const int token = threadIdx.x / 2 % kTile, half = threadIdx.x % 2;
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const int k = 2 * i + threadIdx.x / (2 * kTile);
    if (k >= groups) break;
    chunk.half[k][token][half] = c.values[i];
    int* twice = reinterpret_cast<int*>(&chunk.twice[half][k][token / 2]) + token % 2;
    twice[0] = twice[2] = c.twice[i];
  }
}

// total += one group, in the order of sums: `run` is its weights of row block 0, those of 1 are a chunk further.
template <class Form>
DEVICE void add_group(const uint4* run, const Chunk& chunk, int k, int eights, float (&total)[kHeld]) {
  constexpr int pieces = Form::bytes / 16, words = Form::lines / 4;
  const int g = lane() / 4, t = lane() % 4;
  u32 a[2][4];
  float scale[2][2];
#pragma unroll
  for (int b = 0; b < 2; ++b, run += kChunk * pieces) {
    uint2 w[words];
#pragma unroll
    for (int j = 0; j < words; ++j)
      w[j] = reinterpret_cast<const uint2*>(run + place_of(4 * (words * t + j) + g / 2))[g % 2];
    Form::unpack(w, a[b]);
    const u32 halves = reinterpret_cast<const u32*>(run + 4 * Form::lines)[g];
    scale[b][0] = half_to_float(static_cast<u16>(halves));
    scale[b][1] = half_to_float(static_cast<u16>(halves >> 16));
  }
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    if (e >= eights) break;
    const uint2 values = reinterpret_cast<const uint2*>(chunk.half[k][8 * e + g])[t];
    const int4 sums = reinterpret_cast<const int4&>(chunk.twice[0][k][4 * e + t]);
    const float2 scales = reinterpret_cast<const float2&>(chunk.twice[1][k][4 * e + t]);
    const u32 x[2] = {values.x, values.y};
    const int start[4] = {sums.x, sums.y, sums.z, sums.w};
    const float x_scale[2] = {scales.x, scales.y};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      int out[4];
      mma(out, a[b], x, start);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = total[(b * kEights + e) * 4 + i];
        sum = fmaf(exact(out[i]), scale[b][i / 2] * x_scale[i % 2], sum);
      }
    }
  }
}

// Sums over groups begin..end - 1, of token t only those below reach_of(t); begin is a chunk's. Row blocks 2 warp and
// 2 warp + 1, the last one again where there are no more; n tokens, at most kTile, in as many eights as they need. All of a
// block's 128 threads.
template <class Form, class RowOf, class ReachOf>
DEVICE void tile_sums(const u8* blocks, int stride, int count, const Rows& x, int n, RowOf row_of, int begin, int end,
                      ReachOf reach_of, float (&sum)[kHeld]) {
  constexpr int pieces = Form::bytes / 16;
  Chunk& chunk = *reinterpret_cast<Chunk*>(shared_memory);
  uint4* weights = shared_memory + sizeof(Chunk) / 16 + warp() * 2 * kChunk * pieces;
  const u8* block[2] = {blocks + static_cast<size_t>(least(2 * warp(), count - 1)) * stride,
                        blocks + static_cast<size_t>(least(2 * warp() + 1, count - 1)) * stride};
  const int own = least(threadIdx.x / 2 % kTile, n - 1), row = row_of(own), reach = reach_of(own);
  float total[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum[i] = 0.0f;
  for (int first = begin; first < end; first += kChunk) {
    const int groups = least(kChunk, end - first);
    Coming<Form> coming;
    ask(coming, x, row, reach, block, first, groups);
    __syncthreads();
    store(coming, chunk, weights, groups);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) total[i] = 0.0f;
#pragma unroll 2
    for (int k = 0; k < groups; ++k) add_group<Form>(weights + k * pieces, chunk, k, ceil_div(n, 8), total);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum[i] = sum[i] + total[i];
  }
}

// Calls use(row block, token, row, sum) for what this lane has of the tile's first `count` row blocks.
template <class Use>
DEVICE void each_of_tile(const float (&sum)[kHeld], int count, Use use) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int b = 2 * warp() + i / 4 / kEights, e = i / 4 % kEights;
    if (b < count) use(b, 8 * e + 2 * (lane() % 4) + i % 2, 2 * (lane() / 4) + i / 2 % 2, sum[i]);
  }
}

// `multiply` of at most eight row blocks and kTile rows.
template <class RowOf>
DEVICE const float* multiply_tile(int form, const u8* blocks, int stride, int count, const Rows& x, int n,
                                  RowOf row_of) {
  float sum[kHeld], *out = shared_floats();
  const auto everything = [=](int) { return x.groups; };
  if (form == kQ4) tile_sums<Q4>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  else tile_sums<Q8>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  __syncthreads();
  each_of_tile(sum, count, [=](int b, int token, int row, float v) { out[(b * kTile + token) * kRows + row] = v; });
  __syncthreads();
  return out;
}

// `count` row blocks times n rows of x, at most NT, row_of(0) to row_of(n - 1): returns [count][NT][16] in shared memory,
// which stays until the next call. All threads of the block; shared: 16 · count · NT · (chunks + 1) floats, and for a tile
// a chunk of activations and of eight row blocks, or 16 · count · NT floats if that is more.
template <int NT, class RowOf>
DEVICE const float* multiply(int form, const u8* blocks, int stride, int count, const Rows& x, int n, RowOf row_of) {
  if constexpr (NT == kTile) {
    return multiply_tile(form, blocks, stride, count, x, n, row_of);
  } else {
    int token[NT];
#pragma unroll
    for (int t = 0; t < NT; ++t) token[t] = row_of(least(t, n - 1));
    const int chunks = ceil_div(x.groups, kChunk), size = count * NT * kRows;
    float *out = shared_floats(), *parts = out + size;
    for (int i = threadIdx.x; i < count * chunks * 4; i += blockDim.x) {
      const int quad = i % 4, chunk = i / 4 % chunks, b = i / 4 / chunks;
      float total[NT][4];
      chunk_total<NT>(form, blocks + static_cast<size_t>(b) * stride, x, token, chunk, quad, total);
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) parts[chunk * size + (b * NT + t) * kRows + 4 * quad + r] = total[t][r];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      float sum = 0.0f;
      for (int chunk = 0; chunk < chunks; ++chunk) sum = sum + parts[chunk * size + i];
      out[i] = sum;
    }
    __syncthreads();
    return out;
  }
}

// Row blocks that a block of threads takes at once.
template <int NT>
DEVICE constexpr int tall() { return NT == kTile ? kTall : 1; }

// y (+)= w x for one or two matrices that read the same rows: blocks of the grid are a's row blocks, then b's; along y,
// tiles of NT tokens.
template <int NT>
DEVICE void product(const Matrix& a, const Matrix& b, const Rows& x, int T, float* ya, float* yb, int add) {
  const int split = ceil_div(a.rows, tall<NT>() * kRows);
  const bool second = static_cast<int>(blockIdx.x) >= split;
  const int form = second ? b.form : a.form, rows = second ? b.rows : a.rows, stride = second ? b.stride : a.stride;
  const int block = (second ? blockIdx.x - split : blockIdx.x) * tall<NT>();
  const int count = least(tall<NT>(), ceil_div(rows, kRows) - block);
  const u8* blocks = (second ? b.data : a.data) + static_cast<size_t>(block) * stride;
  float* y = second ? yb : ya;
  for (int first = blockIdx.y * NT; first < T; first += gridDim.y * NT) {
    const int n = least(NT, T - first);
    const float* out = multiply<NT>(form, blocks, stride, count, x, n, [=](int t) { return first + t; });
    for (int i = threadIdx.x; i < count * NT * kRows; i += blockDim.x) {
      const int t = i / kRows % NT, row = (block + i / (NT * kRows)) * kRows + i % kRows;
      if (t >= n || row >= rows) continue;
      float* at = y + static_cast<size_t>(first + t) * rows + row;
      *at = add ? *at + out[i] : out[i];
    }
  }
}
KERNEL_OF_ONE product_1(Matrix a, Matrix b, Rows x, int T, float* ya, float* yb, int add) {
  product<1>(a, b, x, T, ya, yb, add);
}
KERNEL_OF_EIGHT product_8(Matrix a, Matrix b, Rows x, int T, float* ya, float* yb, int add) {
  product<8>(a, b, x, T, ya, yb, add);
}
KERNEL_OF_TILES product_32(Matrix a, Matrix b, Rows x, int T, float* ya, float* yb, int add) {
  product<32>(a, b, x, T, ya, yb, add);
}

// Head h's matrix, at h · head_bytes, times row t · H + h of x; outputs quantized, 32 (a tile: 128) a block, into the same
// row of y. The grid: groups of outputs, heads, tiles of tokens.
template <int NT>
DEVICE void heads(const Matrix& w, u64 head_bytes, const Rows& x, int T, const Rows& y) {
  constexpr int most = NT == kTile ? kTall / 2 : 1;
  const int H = gridDim.y, h = blockIdx.y, g = blockIdx.x * most, groups = least(most, w.rows / kGroup - g);
  const u8* blocks = w.data + h * head_bytes + static_cast<size_t>(2 * g) * w.stride;
  for (int first = blockIdx.z * NT; first < T; first += gridDim.z * NT) {
    const int n = least(NT, T - first);
    const float* out =
        multiply<NT>(w.form, blocks, w.stride, 2 * groups, x, n, [=](int t) { return (first + t) * H + h; });
    for (int i = warp(); i < groups * n; i += warps()) {
      const int t = i / groups, b = i % groups * 2 + lane() / kRows;
      quantize(out[(b * NT + t) * kRows + lane() % kRows], y, static_cast<size_t>(first + t) * H + h, g + i % groups);
    }
  }
}
KERNEL_OF_ONE heads_1(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<1>(w, head_bytes, x, T, y); }
KERNEL_OF_EIGHT heads_8(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<8>(w, head_bytes, x, T, y); }
KERNEL_OF_TILES heads_32(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<32>(w, head_bytes, x, T, y); }
