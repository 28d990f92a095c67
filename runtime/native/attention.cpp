// The latent cache, and attention as two products over it. docs/kernels.md says why they look so.
#include <algorithm>
#include <cstring>

#include "row_blocks.h"

namespace kimi {

void remember(const LatentCache& cache, const float* latent_and_key, int T, int start) {
  const int C = cache.C, R = cache.R, groups = cache.row_groups(), width = groups * kGroup;
  each_token(T, [&](int t) {
    const int position = start + t;
    static thread_local Buffer<float> buffer;
    float* row = buffer.get(width);
    std::memcpy(row, latent_and_key + static_cast<size_t>(t) * (C + R), sizeof(float) * (C + R));
    std::fill(row + C + R, row + width, 0.0f);
    kernels().store_row(row, groups, cache.rows + position / kRows * cache.rows_stride(), position % kRows);
  });
  turn_columns(cache, start, start + T);
}

void turn_columns(const LatentCache& cache, int first, int end) {
  const int from = first / kGroup;
  pool().run(end / kGroup - from, [&](int i, int) {
    const int g = from + i;
    kernels().turn_rows(cache.rows, cache.rows_stride(), g * kGroup, kGroup, cache.C, cache.columns + static_cast<size_t>(g) * kQ8Run,
                        cache.columns_stride());
  });
}

namespace {
// Attention of one token. Two products of the same kernel: queries times cached rows, then weights times cached columns.
// The columns' last group, in which the token itself stands, is made from the rows for each token anew; so the bits
// depend on the positions alone, not on when they were computed.
//
// Each step can be dealt out: ask() by heads, compare() by row blocks, weigh() by heads, sum() by pairs of channel blocks.
struct OneToken {
  Buffer<float> score_;
  Buffer<uint8_t> queries_, weights_;

  const LatentCache* cache;
  int H, n, groups, own;          // positions seen: `groups` whole groups of 32, then `own` more
  size_t stride;                  // floats from head to head of `score`
  float *score, *inverse;         // [H][stride], [H]
  uint8_t *queries, *weights, *rest, *last, *last_rest;

  // Tiles of H heads: the queries; the weights of the whole groups, of the own group, and what quantizing the first and
  // the own group lost. Sinks and neighbours dwarf the rest of their group, so those two are kept to two int8 digits.
  void begin(const LatentCache& c, int heads, int position) {
    cache = &c;
    H = heads;
    n = position + 1;
    groups = n / kGroup;
    own = n % kGroup;
    stride = static_cast<size_t>(groups + 1) * kGroup;
    score = score_.get(stride * H + H);
    inverse = score + stride * H;
    queries = queries_.get(H * token_bytes(c.row_groups() * kGroup));
    weights = weights_.get(static_cast<size_t>(H) * kTokenGroup * (groups + 3));
    rest = weights + static_cast<size_t>(H) * kTokenGroup * groups;
    last = rest + H * kTokenGroup;
    last_rest = last + H * kTokenGroup;
  }
  void ask(int h, const float* q, const float* qr) const {  // a head's rows, of C and of R
    const int C = cache->C, R = cache->R, row_groups = cache->row_groups(), width = row_groups * kGroup;
    static thread_local Buffer<float> buffer;
    float* row = buffer.get(width);
    std::memcpy(row, q, sizeof(float) * C);
    std::memcpy(row + C, qr, sizeof(float) * R);
    std::fill(row + C + R, row + width, 0.0f);
    int first, W;
    place(h, &first, &W);
    kernels().quantize_row(row, row_groups, {queries + first * token_bytes(width), W}, h - first);
  }
  // The tile that holds head h.
  void place(int h, int* first, int* W) const {
    for (*first = 0; *first + (*W = tile_width(H, *first)) <= h; *first += *W) {}
  }
  template <typename Call>
  void tiles(const Call& call) const {
    for (int first = 0, W; first < H; first += W) call(first, W = tile_width(H, first));
  }
  int row_blocks() const { return (n + kRows - 1) / kRows; }
  void compare(int from, int to) const {  // row blocks of 16 positions
    const int row_groups = cache->row_groups();
    for (int n; from < to; from += n) {
      n = std::min(kPair, to - from);
      const uint8_t* rows = cache->rows + from * cache->rows_stride();
      tiles([&](int first, int W) {
        kernels().side_by_side(Form::q8g32, rows, cache->rows_stride(), n, queries + first * token_bytes(row_groups * kGroup), row_groups,
                               W, score + first * stride + from * kRows, stride);
      });
    }
  }
  void weigh(int h, float scale) const {
    float* s = score + h * stride;
    inverse[h] = 1.0f / kernels().softmax(s, n, scale, nullptr);
    int first, W;
    place(h, &first, &W);
    const int lane = h - first;
    float lost[kGroup];
    if (groups) {
      uint8_t* tile = weights + static_cast<size_t>(first) * kTokenGroup * groups;
      kernels().quantize_row(s, groups, {tile, W}, lane);
      kernels().residual(s, tile, W, lane, lost);
      kernels().quantize_row(lost, 1, {rest + first * kTokenGroup, W}, lane);
    }
    if (own) {
      uint8_t* tile = last + first * kTokenGroup;
      kernels().quantize_row(s + groups * kGroup, 1, {tile, W}, lane);
      kernels().residual(s + groups * kGroup, tile, W, lane, lost);
      kernels().quantize_row(lost, 1, {last_rest + first * kTokenGroup, W}, lane);
    }
  }
  void sum(int pair, float* u) const {  // 32 channels; u [H][C]
    uint8_t turned[2 * kQ8Run];
    if (own)
      kernels().turn_rows(cache->rows + static_cast<size_t>(pair) * kQ8Run, cache->rows_stride(), groups * kGroup, own, kGroup,
                          turned, kQ8Run);
    for (int half = 0; half < 2; ++half) sum_block(2 * pair + half, turned + half * kQ8Run, u);
  }
  void sum_block(int b, const uint8_t* turned, float* u) const {
    const auto product = [](Form form, const uint8_t* w, const uint8_t* tile, int n_groups, int W, float* out, size_t to_next = 0) {
      kernels().side_by_side(form, w, to_next, 1, tile, n_groups, W, out, kRows);
    };
    const uint8_t* columns = cache->columns + b * cache->columns_stride();
    tiles([&](int first, int W) {
      float parts[4][kTile * kRows] = {};
      if (groups) {
        const uint8_t* all = weights + static_cast<size_t>(first) * kTokenGroup * groups;
        product(Form::q8g32_positive, columns, all, groups, W, parts[0], cache->columns_stride());
        product(Form::q8g32, columns, rest + first * kTokenGroup, 1, W, parts[1]);
      }
      if (own) {
        product(Form::q8g32_positive, turned, last + first * kTokenGroup, 1, W, parts[2]);
        product(Form::q8g32, turned, last_rest + first * kTokenGroup, 1, W, parts[3]);
      }
      for (int i = 0; i < W; ++i)
        for (int r = 0; r < kRows; ++r) {
          const int k = i * kRows + r;
          u[static_cast<size_t>(first + i) * cache->C + b * kRows + r] =
              ((parts[0][k] + parts[1][k]) + (parts[2][k] + parts[3][k])) * inverse[first + i];
        }
    });
  }
};
}  // namespace

void attention(const LatentCache& cache, const Absorb& absorb, const float* q, const Heads& qr, int start, int T, int H, float scale,
               float* u) {
  const int C = cache.C;
  const Heads own{q, static_cast<size_t>(H) * C, static_cast<size_t>(C)};
  if (T <= kTile) {  // so few that all threads share each
    static OneToken tokens[kTile];
    for (int t = 0; t < T; ++t) tokens[t].begin(cache, H, start + t);
    const int step = long_task(tokens[T - 1].row_blocks());
    const int parts = (tokens[T - 1].row_blocks() + step - 1) / step, pairs = C / kGroup;  // of a token's positions and channels
    pool().run(H, [&](int h, int) {
      absorb(h);
      for (int t = 0; t < T; ++t) tokens[t].ask(h, own.at(t, h), qr.at(t, h));
    });
    pool().run(T * parts, [&](int i, int) {
      const int from = i % parts * step;
      tokens[i / parts].compare(from, std::min(from + step, tokens[i / parts].row_blocks()));
    });
    pool().run(T * H, [&](int i, int) { tokens[i / H].weigh(i % H, scale); });
    pool().run(T * pairs, [&](int i, int) { tokens[i / pairs].sum(i % pairs, u + static_cast<size_t>(i / pairs) * H * C); });
    return;
  }
  pool().run(T, [&](int t, int) {
    static thread_local OneToken token;
    token.begin(cache, H, start + t);
    for (int h = 0; h < H; ++h) token.ask(h, own.at(t, h), qr.at(t, h));
    token.compare(0, token.row_blocks());
    for (int h = 0; h < H; ++h) token.weigh(h, scale);
    for (int pair = 0; pair < C / kGroup; ++pair) token.sum(pair, u + static_cast<size_t>(t) * H * C);
  });
}

}  // namespace kimi
