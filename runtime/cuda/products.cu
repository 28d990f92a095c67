// Products of packed matrices and quantized rows. Read arithmetic.cu first.
//
// A run of 16 rows × 32 channels is lines of 64 bytes, four channels of all 16 rows, then 16 scales. Few
// tokens: a thread takes four rows of a row block (16 bytes of each line) through one chunk of eight groups, the unit of
// the fixed order of sums. So four neighbouring threads read whole lines, every 32-byte sector that is fetched is used,
// and no thread waits for another before its chunk's total. The totals meet in shared memory and are added in order. Many
// tokens: see kTile below.
//
// At full size (K = 2048, eight chunks) a row block is one warp. A card has to have bandwidth times latency on the way, about 560
// kB on a 3090, 2 MB on an H100. A thread asks for four groups of int4 at once, 272 bytes, so a warp for 9 kB: the 1408 warps of
// gate and up of six experts and the shared MLP have 12 MB on the way, the 228 of q and kv_a 2 MB.
// Weights are read once for NT tokens; activations come from the first cache.

struct Matrix {     // packed; `stride` bytes from row block to row block
  const u8* data;
  int form, rows, columns, stride;
};

enum { kQ4 = 0, kQ8 = 1, kQ4B = 2, kQ3B = 3 };

struct Halves {     // float16 scales, of four rows and of two
  using Four = uint2;
  DEVICE void scales(uint2 four, float (&scale)[4]) {
    scale[0] = half_to_float(static_cast<u16>(four.x)), scale[1] = half_to_float(static_cast<u16>(four.x >> 16));
    scale[2] = half_to_float(static_cast<u16>(four.y)), scale[3] = half_to_float(static_cast<u16>(four.y >> 16));
  }
  DEVICE u32 read_two(const u8* at) { return read_4(at); }
  DEVICE void scales(u32 two, float (&scale)[2]) {
    scale[0] = half_to_float(static_cast<u16>(two)), scale[1] = half_to_float(static_cast<u16>(two >> 16));
  }
};

struct Bytes {      // scales of one byte: a sign, four bits e, three bits m: (1 + m / 8) 2^(e - 15)
  using Four = u32;
  DEVICE float scale_of(u32 byte) { return __int_as_float((byte & 128) << 24 | (byte & 127) << 20 | 112 << 23); }
  DEVICE void scales(u32 four, float (&scale)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) scale[r] = scale_of(four >> 8 * r);
  }
  DEVICE u32 read_two(const u8* at) { return read_2(at); }
  DEVICE void scales(u32 two, float (&scale)[2]) { scale[0] = scale_of(two), scale[1] = scale_of(two >> 8); }
};

template <class Scales>
struct Int4 : Scales {  // w = scale · (q - 8): the sums start at -8 · (sum of the activations)
  static constexpr int lines = 4, bytes = 256 + 4 * sizeof(typename Scales::Four);
  static constexpr bool biased = true;
  DEVICE int halves(u32 w, u32 mask, int line, const u32* x, int sum) {
    sum = dp4a(w & mask, x[2 * line], sum);
    return dp4a(w >> 4 & mask, x[2 * line + 1], sum);
  }
  DEVICE int dot(const u32 (&w)[4], const u32* x, int sum) {  // a row's words of all lines
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = halves(w[j], 0x0f0f0f0fu, j, x, sum);
    return sum;
  }
  // For the tensor cores 16 · (q - 8): the nibble goes to the upper half of its byte, whose sign then is turned. A sum
  // comes out 16 times as large, and the bits of 1.5 · 2^19 count sixteenths.
  static constexpr int ahead = 4, words = 1, origin = 0x49400000;
  static constexpr float zero = 786432.0f;
  DEVICE int first_line(int t) { return t; }  // of the words that lane t of four needs
  DEVICE void signed_halves(uint2 w, u32 mask, u32 (&a)[4]) {
    const u32 sign = 0x80808080u;
    a[0] = and_xor(w.x << 4, mask, sign), a[1] = and_xor(w.y << 4, mask, sign);
    a[2] = and_xor(w.x, mask, sign), a[3] = and_xor(w.y, mask, sign);
  }
  DEVICE void unpack(const uint2 (&w)[1], int, u32 (&a)[4]) { signed_halves(w[0], 0xf0f0f0f0u, a); }
};

using Q4 = Int4<Halves>;
using Q4B = Int4<Bytes>;

// The same in even q, of which three bits are kept: a fourth line's words are made of a bit in each half byte of the three.
struct Q3B : Q4B {
  static constexpr int lines = 3, bytes = 208;
  DEVICE u32 fourth(u32 a, u32 b, u32 c) {
    const u32 bit = 0x11111111u;
    return (a & bit) << 1 | (b & bit) << 2 | (c & bit) << 3;
  }
  DEVICE int dot(const u32 (&w)[3], const u32* x, int sum) {
    const u32 mask = 0x0e0e0e0eu;
#pragma unroll
    for (int j = 0; j < 3; ++j) sum = halves(w[j], mask, j, x, sum);
    return halves(fourth(w[0], w[1], w[2]), mask, 3, x, sum);
  }
  static constexpr int ahead = 2, words = 3;
  DEVICE int first_line(int) { return 0; }
  DEVICE void unpack(const uint2 (&w)[3], int t, u32 (&a)[4]) {
    const uint2 own = t == 0 ? w[0] : t == 1 ? w[1] : t == 2 ? w[2]
        : uint2{fourth(w[0].x, w[1].x, w[2].x), fourth(w[0].y, w[1].y, w[2].y)};
    signed_halves(own, 0xe0e0e0e0u, a);
  }
};

struct Q8 : Halves {  // w = scale · q
  static constexpr int lines = 8, bytes = 544;
  static constexpr bool biased = false;
  DEVICE int dot(const u32 (&w)[8], const u32* x, int sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = dp4a(w[j], x[j], sum);
    return sum;
  }
  static constexpr int ahead = 4, words = 2, origin = 0x4b400000;  // the bits of 1.5 · 2^23, which count ones
  static constexpr float zero = 12582912.0f;
  DEVICE int first_line(int t) { return 2 * t; }
  DEVICE void unpack(const uint2 (&w)[2], int, u32 (&a)[4]) { a[0] = w[0].x, a[1] = w[0].y, a[2] = w[1].x, a[3] = w[1].y; }
};

// Groups whose weights a thread asks for before it uses the first of them: a card answers after hundreds of clocks.
template <class Form, int NT>
DEVICE constexpr int ahead() { return NT > 1 ? 1 : Form::lines <= 4 ? 4 : 2; }

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
    u32 row[many][4][Form::lines];  // of each row its words of all lines
    typename Form::Four scales[many];
#pragma unroll
    for (int i = 0; i < many; ++i) {  // past the end, the last one again
      const u8* run = block + static_cast<size_t>(least(begin + i, last - 1)) * Form::bytes;
#pragma unroll
      for (int j = 0; j < Form::lines; ++j) {
        const uint4 line = *reinterpret_cast<const uint4*>(run + 64 * j + 16 * quad);
        row[i][0][j] = line.x, row[i][1][j] = line.y, row[i][2][j] = line.z, row[i][3][j] = line.w;
      }
      scales[i] = reinterpret_cast<const typename Form::Four*>(run + 64 * Form::lines)[quad];
    }
#pragma unroll
    for (int i = 0; i < many; ++i) {
      const bool there = begin + i < last;
      const int g = least(begin + i, last - 1);
      float scale[4];
      Form::scales(scales[i], scale);
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const int at = token[t] * x.groups + g;
        const uint4* values = reinterpret_cast<const uint4*>(x.q) + 2 * at;
        const uint4 a = values[0], b = values[1];
        const u32 word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        const int start = Form::biased ? x.sum[at] : 0;
        const float x_scale = x.scale[at];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int sum = Form::dot(row[i][r], word, start);
          const float sum_to_here = fmaf(static_cast<float>(sum), scale[r] * x_scale, total[t][r]);
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
  if (form == kQ4B) chunk_total<Q4B, NT>(block, x, token, first, last, quad, total);
  else if (form == kQ3B) chunk_total<Q3B, NT>(block, x, token, first, last, quad, total);
  else if (form == kQ4) chunk_total<Q4, NT>(block, x, token, first, last, quad, total);
  else chunk_total<Q8, NT>(block, x, token, first, last, quad, total);
}

// For many tokens: eight row blocks times a tile of 32 tokens, by four warps on the tensor cores, chunk by chunk. A warp
// has two row blocks. A chunk of the activations, which all four need, is brought to shared memory while the one before is
// multiplied; weights go to the registers of the one warp that needs them, some groups ahead. A group of a row block times
// eight tokens is one step of `mma`; its integer sums are exact, and each gets the float steps of the order of sums in its
// own lane.
//
// Which channels meet in a step's column is free, as long as both sides agree: lane 4 g + t takes channels 8 t..8 t + 7
// of its rows and tokens. Those are the two halves of one packed word of int4, and eight bytes in a row of a token. Which
// row is which is free too: it takes rows 2 g and 2 g + 1, whose words are neighbours. So a warp asks for the lines of a
// run as they lie, 256 bytes at a time. (Of three bits a channel each lane asks for all three lines, for two row blocks.)
constexpr int kTile = 32;           // tokens
constexpr int kTall = 8;            // row blocks
constexpr int kEights = kTile / 8;  // steps that share an unpacked weight
constexpr int kHeld = 8 * kEights;  // sums of a lane: number i of step e of its row block b at (b · kEights + e) · 4 + i

// A chunk of activations: int8 values in halves of 16, and their scales.
struct Chunk {
  uint4 half[kChunk][kTile][2];
  float scale[kChunk][kTile];
};

// Asks for groups first..first + kChunk - 1 of a row, the thread's own part of them. From group `reach` on there is
// nothing: zeros, which change no sum but the sign of a zero, and that is lost in the sum over chunks.
DEVICE void bring(Chunk& chunk, const Rows& x, size_t row, int first, int reach) {
  const int token = threadIdx.x / 2 % kTile, half = threadIdx.x % 2, own = threadIdx.x / (2 * kTile);
  const size_t at = row * x.groups + first;
  const uint4* values = reinterpret_cast<const uint4*>(x.q) + 2 * (at + own) + half;
#pragma unroll
  for (int i = 0; i < kChunk; i += 2)
    bring_16(&chunk.half[i + own][token][half], values + 2 * i, first + i + own < reach);
  const int other = 2 * own + half;
#pragma unroll
  for (int i = 0; i < kChunk; i += 4)
    bring_4(&chunk.scale[i + other][token], x.scale + at + other + i, first + i + other < reach);
}

// A lane's weights of a group of two row blocks: of each its words, and the scales of its two rows.
template <class Form>
struct Held {
  uint2 word[2][Form::words];
  u32 scales[2];
};

// Where a lane's weights are, of the group whose turn it is.
struct Place {
  const u8 *word[2], *scales[2];
};

template <class Form>
DEVICE void ask(Held<Form>& held, const Place& place, int group) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int j = 0; j < Form::words; ++j) held.word[b][j] = read_8(place.word[b] + group * Form::bytes + 64 * j);
    held.scales[b] = Form::read_two(place.scales[b] + group * Form::bytes);
  }
}

// The float of a step's sum, given as the bits Form::origin + n, exactly for |n| < 2^22; a group's are at most 32 · 128 ·
// 128 = 2^19. (A subtraction, because conversions are slow.)
template <class Form>
DEVICE float exact(int bits) { return __int_as_float(bits) - Form::zero; }

// total += group k of a chunk for E eights of tokens, in the order of sums.
template <class Form, int E>
DEVICE void add_group(const u32 (&a)[2][4], const float (&scale)[2][2], const Chunk& chunk, int k,
                      float (&total)[kHeld]) {
  const int g = lane() / 4, t = lane() % 4;
  const int origin[4] = {Form::origin, Form::origin, Form::origin, Form::origin};
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const uint2 values = reinterpret_cast<const uint2*>(chunk.half[k][8 * e + g])[t];
    const float2 scales = reinterpret_cast<const float2*>(chunk.scale[k])[4 * e + t];
    const u32 x[2] = {values.x, values.y};
    const float x_scale[2] = {scales.x, scales.y};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      int out[4];
      mma(out, a[b], x, origin);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = total[(b * kEights + e) * 4 + i];
        sum = fmaf(exact<Form>(out[i]), scale[b][i / 2] * x_scale[i % 2], sum);
      }
    }
  }
}

// sum += a chunk of `groups` groups, behind which the row blocks have `left` more; the weights of the first ones are held,
// and in the end of those that follow.
template <class Form, int E>
DEVICE void add_chunk(Held<Form> (&held)[Form::ahead], Place& place, int groups, int left, const Chunk& chunk,
                      float (&sum)[kHeld]) {
  float total[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) total[i] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < groups; k += Form::ahead) {
#pragma unroll
    for (int i = 0; i < Form::ahead; ++i) {
      if (k + i >= groups) break;
      u32 a[2][4];
      float scale[2][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        Form::unpack(held[i].word[b], lane() % 4, a[b]);
        Form::scales(held[i].scales[b], scale[b]);
      }
      add_group<Form, E>(a, scale, chunk, k + i, total);
      if (k + i + Form::ahead < groups + left) ask(held[i], place, i);
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) place.word[b] += Form::ahead * Form::bytes, place.scales[b] += Form::ahead * Form::bytes;
  }
#pragma unroll
  for (int b = 0; b < 2; ++b)
#pragma unroll
    for (int i = 4 * b * kEights; i < 4 * (b * kEights + E); ++i) sum[i] = sum[i] + total[i];
}

// Sums over groups begin..end - 1, of token t only those below reach_of(t); begin is a chunk's. Row blocks 2 warp and
// 2 warp + 1, the last one again where there are no more; n tokens, at most kTile, in as many eights as they need. All of a
// block's 128 threads, once a kernel: what lies in shared memory is not waited for.
template <class Form, class RowOf, class ReachOf>
DEVICE void tile_sums(const u8* blocks, int stride, int count, const Rows& x, int n, RowOf row_of, int begin, int end,
                      ReachOf reach_of, float (&sum)[kHeld]) {
  Chunk* chunks = reinterpret_cast<Chunk*>(shared_memory);  // two, in turn
  const int own = least(threadIdx.x / 2 % kTile, n - 1), row = row_of(own), reach = least(end, reach_of(own));
  const int eights = ceil_div(n, 8), g = lane() / 4, t = lane() % 4;
  Held<Form> held[Form::ahead];
  Place place;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const u8* block = blocks + static_cast<size_t>(least(2 * warp() + b, count - 1)) * stride + begin * Form::bytes;
    place.word[b] = block + 64 * Form::first_line(t) + 8 * g;
    place.scales[b] = block + 64 * Form::lines + sizeof(typename Form::Four) / 2 * g;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum[i] = 0.0f;
  if (begin < end) bring(chunks[0], x, row, begin, reach);
#pragma unroll
  for (int i = 0; i < Form::ahead; ++i) {
    if (begin + i < end) ask(held[i], place, 0);
#pragma unroll
    for (int b = 0; b < 2; ++b) place.word[b] += Form::bytes, place.scales[b] += Form::bytes;
  }
#pragma unroll 1
  for (int first = begin, turn = 0; first < end; first += kChunk, turn ^= 1) {
    all_brought();
    __syncthreads();  // of all threads; and all have left the other chunk
    if (first + kChunk < end) bring(chunks[turn ^ 1], x, row, first + kChunk, reach);
    const int groups = least(kChunk, end - first), left = end - first - groups;
    if (eights > 3) add_chunk<Form, 4>(held, place, groups, left, chunks[turn], sum);
    else if (eights > 2) add_chunk<Form, 3>(held, place, groups, left, chunks[turn], sum);
    else if (eights > 1) add_chunk<Form, 2>(held, place, groups, left, chunks[turn], sum);
    else add_chunk<Form, 1>(held, place, groups, left, chunks[turn], sum);
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
  if (form == kQ4B) tile_sums<Q4B>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  else if (form == kQ3B) tile_sums<Q3B>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  else if (form == kQ4) tile_sums<Q4>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  else tile_sums<Q8>(blocks, stride, count, x, n, row_of, 0, x.groups, everything, sum);
  __syncthreads();
  each_of_tile(sum, count, [=](int b, int token, int row, float v) { out[(b * kTile + token) * kRows + row] = v; });
  __syncthreads();
  return out;
}

// `count` row blocks times n rows of x, at most NT, row_of(0) to row_of(n - 1): returns [count][NT][16] in shared memory,
// which stays until the next call. All threads of the block; shared: 16 · count · NT · (chunks + 1) floats, and for a tile
// two chunks of activations, where the results of eight row blocks fit too.
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
  const int first = blockIdx.y * NT, n = least(NT, T - first);
  const float* out = multiply<NT>(form, blocks, stride, count, x, n, [=](int t) { return first + t; });
  for (int i = threadIdx.x; i < count * NT * kRows; i += blockDim.x) {
    const int t = i / kRows % NT, row = (block + i / (NT * kRows)) * kRows + i % kRows;
    if (t >= n || row >= rows) continue;
    float* at = y + static_cast<size_t>(first + t) * rows + row;
    *at = add ? *at + out[i] : out[i];
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
  const int first = blockIdx.z * NT, n = least(NT, T - first);
  const float* out = multiply<NT>(w.form, blocks, w.stride, 2 * groups, x, n, [=](int t) { return (first + t) * H + h; });
  for (int i = warp(); i < groups * n; i += warps()) {
    const int t = i / groups, b = i % groups * 2 + lane() / kRows;
    quantize(out[(b * NT + t) * kRows + lane() % kRows], y, static_cast<size_t>(first + t) * H + h, g + i % groups);
  }
}
KERNEL_OF_ONE heads_1(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<1>(w, head_bytes, x, T, y); }
KERNEL_OF_EIGHT heads_8(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<8>(w, head_bytes, x, T, y); }
KERNEL_OF_TILES heads_32(Matrix w, u64 head_bytes, Rows x, int T, Rows y) { heads<32>(w, head_bytes, x, T, y); }
