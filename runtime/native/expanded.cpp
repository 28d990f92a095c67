// Attention of many tokens in the expanded form: keys and values of every head, made from the cached latents for the time of
// one layer. A position costs more products once, and every token that sees it fewer (docs/kernels.md).
//
// Two products for each head, as in the absorbed form: queries of up to eight tokens times keys, which stand as a packed
// matrix with positions as rows; then the softmax's weights times values, with channels as rows. A value is rounded by a
// scale of its position, which goes over to the weights; so all that is stored of a position follows from its cached row,
// and a token's bits depend on the positions alone, as in the absorbed form.
#include <algorithm>
#include <cstring>

#include "row_blocks.h"

namespace kimi {
namespace {

constexpr int kAtOnce = 512;                 // positions whose keys and values are made together
constexpr size_t kExpandedBytes = 48 << 20;  // what the keys and values of a few heads may take

// Keys and values of a few heads in one layer: q8g32, positions as rows, and q8g32 with scales of 1, channels as rows.
struct Expanded {
  int N, R, V, positions;
  uint8_t *keys, *values;
  float* scales;            // of the values, for each position
  int key_groups() const { return N / kGroup + (R + kGroup - 1) / kGroup; }
  int groups() const { return (positions + kGroup - 1) / kGroup; }
  size_t padded() const { return static_cast<size_t>(groups()) * kGroup; }
  size_t key_stride() const { return static_cast<size_t>(key_groups()) * kQ8Run; }  // from 16 positions to the next
  size_t value_stride() const { return static_cast<size_t>(groups()) * kQ8Run; }    // from 16 channels to the next
  size_t key_bytes() const { return 2 * groups() * key_stride(); }                  // of a head
  size_t value_bytes() const { return V / kRows * value_stride(); }
  size_t head_bytes() const { return key_bytes() + value_bytes() + sizeof(float) * padded(); }
};

// k_b turned round: [C, N] becomes q8g32 [N, C], for each head.
std::vector<Weights> turned(const std::vector<Weights>& k_b) {
  static Buffer<uint8_t> packed;
  const int H = static_cast<int>(k_b.size()), C = k_b[0].rows, N = k_b[0].columns, groups = C / kGroup;
  const size_t stride = static_cast<size_t>(groups) * kQ8Run, size = N / kRows * stride;
  uint8_t* out = packed.get(H * size);
  pool().run(H, [&](int h, int) {
    static thread_local Buffer<float> buffer;
    float* rows = buffer.get(static_cast<size_t>(N) * C);
    for (int b = 0; b < C / kRows; ++b) turned_block(k_b[h], b, rows + b * kRows, C);
    for (int n = 0; n < N; ++n)
      kernels().store_row(rows + static_cast<size_t>(n) * C, groups, out + h * size + n / kRows * stride, n % kRows);
  });
  std::vector<Weights> all;
  for (int h = 0; h < H; ++h) all.push_back({&block_named("q8g32"), out + h * size, stride, N, C});
  return all;
}

// Makes n_heads heads' keys and values of all positions.
void expand(const LatentCache& cache, const Weights* keys, const Weights* values, int n_heads, const Expanded& e) {
  static Buffer<float> latents, made;
  static Buffer<int32_t> ids;
  const int C = cache.C, nope = e.N / kGroup;
  const size_t width = e.N + e.V, stride = n_heads * width;
  const Weights cached{&block_named("q8g32"), cache.rows, cache.rows_stride(), cache.context, C};
  float* c = latents.get(static_cast<size_t>(kAtOnce) * C);
  float* kv = made.get(kAtOnce * stride);
  int32_t* id = ids.get(e.positions);
  for (int i = 0; i < e.positions; ++i) id[i] = i;
  for (int first = 0; first < e.positions; first += kAtOnce) {
    const int n = std::min(kAtOnce, e.positions - first);
    pool().run((n + kRows - 1) / kRows, [&](int b, int) {
      const int at = b * kRows;
      embed(cached, id + first + at, std::min(kRows, n - at), c + static_cast<size_t>(at) * C);
    });
    std::vector<Product> all;
    for (int h = 0; h < n_heads; ++h) {
      all.push_back({&keys[h], kv + h * width, stride, false});
      all.push_back({&values[h], kv + h * width + e.N, stride, false});
    }
    products(all, c, C, n);
    const int groups = (n + kGroup - 1) / kGroup;
    pool().run(n_heads * groups, [&](int i, int) {
      const int h = i / groups, at = i % groups * kGroup, g = (first + at) / kGroup, count = std::min(kGroup, n - at);
      const float* x = kv + at * stride + h * width;
      uint8_t* to = e.keys + h * e.key_bytes() + 2 * g * e.key_stride();
      for (int k = 0; k < count; ++k) kernels().store_row(x + k * stride, nope, to + k / kRows * e.key_stride(), k % kRows);
      for (int b = 0; b * kRows < count; ++b)  // the rotated key is the same for all heads
        std::memcpy(to + b * e.key_stride() + nope * kQ8Run, cache.rows + (2 * g + b) * cache.rows_stride() + C / kGroup * kQ8Run,
                    (e.key_groups() - nope) * kQ8Run);
      kernels().turn_values(x + e.N, stride, count, e.V, e.values + h * e.value_bytes() + static_cast<size_t>(g) * kQ8Run,
                            e.value_stride(), e.scales + h * e.padded() + g * kGroup);
    });
  }
}

// Head h's attention of W tokens that stand side by side within a group of positions, the first at `position`.
void attend(const Expanded& e, int h, const Heads& q, const Heads& qr, int position, int W, float scale, float* o, size_t o_stride) {
  static thread_local Buffer<float> row_, score_;
  static thread_local Buffer<uint8_t> query_, weights_;
  const uint8_t *keys = e.keys + h * e.key_bytes(), *values = e.values + h * e.value_bytes();
  const float* scales = e.scales + h * e.padded();
  const int width = e.key_groups() * kGroup, own = position / kGroup, groups = own + 1;
  const size_t stride = static_cast<size_t>(groups) * kGroup + kRows;
  float* row = row_.get(static_cast<size_t>(W) * width);
  float* score = score_.get(W * stride);
  uint8_t* query = query_.get(W * token_bytes(width));
  const size_t tile = static_cast<size_t>(W) * kTokenGroup;  // bytes of one group
  uint8_t* weights = weights_.get(tile * (groups + 2));
  for (int i = 0; i < W; ++i) {
    float* at = row + i * width;
    std::memcpy(at, q.at(i, h), sizeof(float) * e.N);
    std::memcpy(at + e.N, qr.at(i, h), sizeof(float) * e.R);
    std::fill(at + e.N + e.R, at + width, 0.0f);
  }
  kernels().quantize(row, width, W, width / kGroup, {query, W}, 0);
  const int seen = (position + W + kRows - 1) / kRows;  // row blocks of keys
  for (int b = 0; b < seen; b += kPair)
    kernels().side_by_side(Form::q8g32, keys + b * e.key_stride(), e.key_stride(), std::min(kPair, seen - b), query, e.key_groups(), W,
                           score + b * kRows, stride);
  // Sinks and neighbours dwarf the rest of their group, so those two groups have a second int8 digit, behind the others.
  const int twice[2] = {0, own}, n_twice = own ? 2 : 1;
  float inverse[kTile], lost[kTile * kGroup];
  for (int i = 0; i < W; ++i) inverse[i] = 1.0f / kernels().softmax(score + i * stride, position + i + 1, scale, scales);
  kernels().quantize(score, stride, W, groups, {weights, W}, 0);
  for (int d = 0; d < n_twice; ++d) {
    for (int i = 0; i < W; ++i)
      kernels().residual(score + i * stride + twice[d] * kGroup, weights + tile * twice[d], W, i, lost + i * kGroup);
    kernels().quantize(lost, kGroup, W, 1, {weights + tile * (groups + d), W}, 0);
  }
  for (int b = 0; b < e.V / kRows; ++b) {
    const uint8_t* rows = values + b * e.value_stride();
    float parts[3][kTile * kRows] = {};
    kernels().side_by_side(Form::q8g32_positive, rows, 0, 1, weights, groups, W, parts[0], kRows);
    for (int d = 0; d < n_twice; ++d)
      kernels().side_by_side(Form::q8g32, rows + static_cast<size_t>(twice[d]) * kQ8Run, 0, 1, weights + tile * (groups + d), 1, W,
                             parts[1 + d], kRows);
    for (int i = 0; i < W; ++i)
      for (int r = 0; r < kRows; ++r) {
        const int k = i * kRows + r;
        o[i * o_stride + b * kRows + r] = ((parts[0][k] + parts[1][k]) + parts[2][k]) * inverse[i];
      }
  }
}

}  // namespace

void expanded_attention(const LatentCache& cache, const std::vector<Weights>& k_b, const std::vector<Weights>& v_b, const Asking& ask,
                        int start, int T, float scale, float* o) {
  static Buffer<uint8_t> keys, values;
  static Buffer<float> scales;
  const int H = static_cast<int>(k_b.size()), V = v_b[0].rows;
  const size_t width = static_cast<size_t>(H) * V;
  Expanded e{k_b[0].columns, cache.R, V, start + T, nullptr, nullptr, nullptr};
  const int at_once = std::clamp(static_cast<int>(kExpandedBytes / e.head_bytes()), 1, H);
  e.keys = keys.get(at_once * e.key_bytes());
  e.values = values.get(at_once * e.value_bytes());
  e.scales = scales.get(at_once * e.padded());
  const std::vector<Weights> turned_k_b = turned(k_b);
  for (int from = 0; from < H; from += at_once) {
    const int n_heads = std::min(at_once, H - from);
    expand(cache, &turned_k_b[from], &v_b[from], n_heads, e);
    in_parts(T, [&](int first, int n) {
      const Queries asked = ask(first, n, from, n_heads);
      // Tiles do not cross multiples of eight positions, so that all of a tile's tokens stand in the same group.
      const int skew = (start + first) % kTile, tiles = (skew + n + kTile - 1) / kTile;
      pool().run(n_heads * tiles, [&](int i, int) {
        const int h = i / tiles, tile = i % tiles * kTile - skew;
        for (int t = std::max(tile, 0), W; t < std::min(tile + kTile, n); t += W) {
          W = tile_width(std::min(tile + kTile, n), t);
          float* to = o + (first + t) * width + (from + h) * V;
          attend(e, h, asked.q.from(t, 0), asked.qr.from(t, 0), start + first + t, W, scale, to, width);
        }
      });
    });
  }
}

}  // namespace kimi
