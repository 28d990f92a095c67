#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "row_blocks.h"

namespace kimi {
namespace {

// Those that run here, the best first.
std::vector<const Kernels*> find_usable() {
  std::vector<const Kernels*> all = {
#if defined(__x86_64__) || defined(_M_X64)
      &kZen4, &kAvx512Vnni, &kAvxVnni, &kAvx512Vnni256, &kAvx2,
#elif defined(__aarch64__) || defined(_M_ARM64)
      &kNeon,
#endif
      &kScalar};
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd")) std::swap(all[0], all[1]);
#endif
  std::erase_if(all, [](const Kernels* k) { return !k->runs_here(); });
  return all;
}
const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> all = find_usable();
  return all;
}

std::unique_ptr<Pool> the_pool;

// Row blocks from..to of w times all tokens into y [n][stride], trimming the last block; `add` adds to what is there.
void row_blocks_into(const Weights& w, int from, int to, const Operand& x, float* y, size_t stride, bool add) {
  const int padded = (to - from) * kRows, rows = std::min(padded, w.rows - from * kRows);
  if (rows == padded && !add) return row_blocks(w, from, to, x, y + from * kRows, stride);
  float* out = scratch.out.get(static_cast<size_t>(x.n) * padded);
  row_blocks(w, from, to, x, out, padded);
  for (int i = 0; i < x.n; ++i) {
    float* at = y + i * stride + from * kRows;
    for (int r = 0; r < rows; ++r) at[r] = add ? at[r] + out[i * padded + r] : out[i * padded + r];
  }
}

// Calls task(first, W) for every tile of n tokens; the pool takes part if there are several.
template <typename Task>
void each_tile(int n, const Task& task) {
  const int whole = n / kTile;
  int count = 0;
  for (int first = 0; first < n; first += tile_width(n, first)) ++count;
  pool().run(count, [&](int i, int) {
    int first = std::min(i, whole) * kTile;
    for (int k = whole; k < i; ++k) first += tile_width(n, first);
    task(first, tile_width(n, first));
  });
}

// A task should read about this much, so that claiming it costs nothing beside it.
constexpr size_t kTaskBytes = 40 << 10;
// Row blocks of w that a task of T tokens takes, of so many in all.
int blocks_a_task(const Weights& w, int T, int blocks) {
  const size_t bytes = static_cast<size_t>(w.columns) * kRows * w.block->bytes / w.block->elements;
  return std::max(static_cast<int>(kTaskBytes / bytes), T == 1 ? long_task(blocks) : kPair);
}

// T rows of x, `stride` floats apart, as tiles.
const uint8_t* tiles_of(const float* x, size_t stride, int T, int columns, uint8_t* out) {
  for (int first = 0, W; first < T; first += W) {
    W = tile_width(T, first);
    kernels().quantize(x + first * stride, stride, W, columns / kGroup, {out + first * token_bytes(columns), W}, 0);
  }
  return out;
}

// Matrix h times head h of T tokens; y is [T][H][rows].
void head_products(const std::vector<Weights>& w, const Heads& x, int T, float* y) {
  static Buffer<uint8_t> buffer;
  const int H = static_cast<int>(w.size()), B = blocks_of(w[0].rows), columns = w[0].columns;
  const size_t size = token_bytes(columns) * T, stride = static_cast<size_t>(H) * w[0].rows;  // of one head's tiles; of y
  const int32_t* list = counting(T);
  // A single token's head is so little that every task quantizes it for itself: that is less than a call of the pool.
  const bool tiled = !is_float(w[0]), before = tiled && T > 1;
  uint8_t* tiles = before ? buffer.get(size * H) : nullptr;
  const auto quantize = [&](int h, uint8_t* at) { return tiles_of(x.at(0, h), x.token, T, columns, at); };
  if (before) pool().run(H, [&](int h, int) { quantize(h, tiles + h * size); });
  const int step = blocks_a_task(w[0], T, H * B), steps = (B + step - 1) / step;
  pool().run(H * steps, [&](int i, int) {
    const int h = i / steps, from = i % steps * step;
    const uint8_t* in = before ? tiles + h * size : tiled ? quantize(h, scratch.tile.get(size)) : nullptr;
    const Operand operand{in, T, columns, x.at(0, h), x.token, list};
    row_blocks_into(w[h], from, std::min(from + step, B), operand, y + static_cast<size_t>(h) * w[h].rows, stride, false);
  });
}

// The same of one head and a few tokens, by the thread that calls.
void head_product(const std::vector<Weights>& w, int h, const Heads& x, int T, const int32_t* list, float* y) {
  const int columns = w[h].columns;
  const uint8_t* in = is_float(w[h]) ? nullptr : tiles_of(x.at(0, h), x.token, T, columns, scratch.tile.get(token_bytes(columns) * T));
  const Operand operand{in, T, columns, x.at(0, h), x.token, list};
  row_blocks_into(w[h], 0, blocks_of(w[h].rows), operand, y + static_cast<size_t>(h) * w[h].rows, w.size() * w[h].rows, false);
}

}  // namespace

const Kernels* chosen = nullptr;
void (*between_parts)() = [] {};

const Kernels& choose_kernels() { return *(chosen = usable().front()); }

std::vector<const char*> usable_kernels() {
  std::vector<const char*> names;
  for (const Kernels* k : usable()) names.push_back(k->name);
  return names;
}

void use_kernels(const char* name) {
  for (const Kernels* k : usable())
    if (std::strcmp(k->name, name) == 0) {
      chosen = k;
      return;
    }
  throw std::invalid_argument(std::string("no kernels named ") + name + " run on this machine");
}

Pool& pool() {
  if (!the_pool) the_pool = std::make_unique<Pool>(1);
  return *the_pool;
}

void set_threads(int n) {
  if (n < 1) throw std::invalid_argument("at least one thread is needed");
  if (pool().n_threads() != n) the_pool = std::make_unique<Pool>(n);
}

void products(const std::vector<Product>& all, const float* x, size_t x_stride, int T) {
  static Buffer<uint8_t> buffers[2];
  const int columns = all[0].w->columns;
  Operand operands[2];  // in tiles alone, and for many
  for (bool for_many : {false, true}) operands[for_many] = {nullptr, T, columns, x, x_stride, counting(T), for_many};
  const auto meets = [&](const Product& p) -> Operand& { return operands[many_meet(*p.w, T)]; };
  std::vector<int> ends;
  int n_tasks = 0, n_blocks = 0;
  for (const Product& p : all) n_blocks += blocks_of(p.w->rows);
  for (const Product& p : all) {
    if (!is_float(*p.w)) meets(p).tiles = buffers[meets(p).for_many].get(token_bytes(columns) * T);
    const int step = blocks_a_task(*p.w, T, n_blocks);
    ends.push_back(n_tasks += (blocks_of(p.w->rows) + step - 1) / step);
  }
  for (const Operand& operand : operands)
    if (operand.tiles)
      each_tile(T, [&](int first, int W) {
        const Tile to = tile_of(buffers[operand.for_many].get(0), T, columns, operand.for_many, first, W);
        kernels().quantize(x + first * x_stride, x_stride, W, columns / kGroup, to, 0);
      });
  pool().run(n_tasks, [&](int i, int) {
    size_t which = 0;
    while (i >= ends[which]) ++which;
    const Product& p = all[which];
    const int step = blocks_a_task(*p.w, T, n_blocks), from = (i - (which ? ends[which - 1] : 0)) * step;
    row_blocks_into(*p.w, from, std::min(from + step, blocks_of(p.w->rows)), meets(p), p.y, p.stride, p.add);
  });
}

void linear(const Weights& w, const float* x, int T, float* y) {
  products({{&w, y, static_cast<size_t>(w.rows), false}}, x, w.columns, T);
}

void linear_heads(const std::vector<Weights>& w, const float* x, int T, float* y) {
  const size_t columns = w[0].columns;
  head_products(w, {x, w.size() * columns, columns}, T, y);
}

void embed(const Weights& w, const int32_t* ids, int T, float* y) {
  for (int t = 0; t < T; ++t) {
    const int id = ids[t], r = id % kRows;
    float* out = y + static_cast<size_t>(t) * w.columns;
    if (is_float(w)) {
      decode_float_row(w.block->kind, w.data + static_cast<size_t>(id) * w.columns * w.block->bytes, w.columns, out);
      continue;
    }
    if (is_packed(w.block->kind)) {
      float* block = scratch.row.get(static_cast<size_t>(kRows) * w.columns);
      turned_block(w, id / kRows, block, kRows);
      for (int k = 0; k < w.columns; ++k) out[k] = block[k * kRows + r];
      continue;
    }
    PanelRun* panel = scratch.panel.get(w.columns / kGroup);
    const size_t row_bytes = static_cast<size_t>(w.columns / w.block->elements) * w.block->bytes;
    decode_panel(*w.block, w.data + id * row_bytes, 1, w.columns, 0, panel);
    for (int k = 0; k < w.columns; ++k) {
      const PanelRun& run = panel[k / kGroup];
      const int c = k % kGroup;
      out[k] = run.scale[c / 16][0] * static_cast<float>(run.q[64 * (c / 4) + c % 4]) + run.offset[0];
    }
  }
}

void pack(const Weights& w, uint8_t* out) {
  const Block& packed = block_named(packed_as(w.block->kind));
  const size_t size = static_cast<size_t>(w.columns) / packed.elements * packed.bytes * kRows;
  pool().run(blocks_of(w.rows), [&](int b, int) { pack_block(*w.block, w.data, w.rows, w.columns, b, out + b * size); });
}

void rms_norm(const float* x, const float* weight, int T, int D, float eps, float* y) {
  each_token(T, [&](int t) { kernels().rms_norm(x + static_cast<size_t>(t) * D, weight, D, eps, y + static_cast<size_t>(t) * D); });
}

void route(const float* x, const float* router, const float* bias, int T, int D, int E, int A, float scale,
           int32_t* ids, float* weights) {
  static Buffer<float> buffer;
  constexpr int kTogether = 4, kShare = 8;  // tokens that meet an expert's row at once; experts of a task of few tokens
  const int padded = (E + 15) / 16 * 16;
  float* scores = buffer.get(static_cast<size_t>(T) * padded);
  std::vector<const float*> rows(E);
  for (int e = 0; e < E; ++e) rows[e] = router + static_cast<size_t>(e) * D;
  const auto compare = [&](int t, int n, int from, int to) {
    const float* tokens[kTogether];
    for (int i = 0; i < n; ++i) tokens[i] = x + static_cast<size_t>(t + i) * D;
    kernels().dots(tokens, n, rows.data() + from, to - from, D, scores + static_cast<size_t>(t) * padded + from, padded);
  };
  const auto choose = [&](int t) {
    static thread_local std::vector<int32_t> order;
    float* score = scores + static_cast<size_t>(t) * padded;
    std::fill(score + E, score + padded, 0.0f);
    kernels().sigmoid(score, padded, score);
    order.resize(E);
    for (int e = 0; e < E; ++e) order[e] = e;
    std::partial_sort(order.begin(), order.begin() + A, order.end(), [&](int a, int b) {
      const float sa = score[a] + bias[a], sb = score[b] + bias[b];
      return sa != sb ? sa > sb : a < b;
    });
    std::sort(order.begin(), order.begin() + A);
    float sum = 0;
    for (int i = 0; i < A; ++i) sum += score[order[i]];
    for (int i = 0; i < A; ++i) {
      ids[t * A + i] = order[i];
      weights[t * A + i] = score[order[i]] / (sum + 1e-20f) * scale;
    }
  };
  if (T < pool().n_threads()) {  // the experts are dealt out
    const int steps = (E + kShare - 1) / kShare;
    pool().run(T * steps, [&](int i, int) {
      const int from = i % steps * kShare;
      compare(i / steps, 1, from, std::min(from + kShare, E));
    });
    for (int t = 0; t < T; ++t) choose(t);
    return;
  }
  const int step = T < kTogether * pool().n_threads() ? 1 : kTogether;
  pool().run((T + step - 1) / step, [&](int i, int) {
    const int first = i * step, end = std::min(first + step, T);
    compare(first, end - first, 0, E);
    for (int t = first; t < end; ++t) choose(t);
  });
}

void attention_layer(const AttentionLayer& l, float* x, int T, const float* cos, const float* sin,
                     const LatentCache& cache, int start, bool expanded, int asking) {
  static Buffer<float> normed, queries, latents, absorbed, summed, values;
  const int D = l.q.columns, H = static_cast<int>(l.k_b.size()), N = l.k_b[0].columns, C = l.k_b[0].rows, V = l.v_b[0].rows;
  const int R = l.kv_a.rows - C, K = N + R, silent = T - asking;
  const size_t width = static_cast<size_t>(H) * V;
  // x's rows first..first+n after their norm.
  const auto norm = [&](int first, int n) {
    float* h = normed.get(static_cast<size_t>(n) * D);
    rms_norm(x + static_cast<size_t>(first) * D, l.norm, n, D, l.eps, h);
    return h;
  };
  const auto rotate = [&](float* row, int t) {
    const float *c = cos + static_cast<size_t>(t) * R / 2, *s = sin + static_cast<size_t>(t) * R / 2;
    for (int i = 0; i < R / 2; ++i) {
      const float even = row[2 * i], odd = row[2 * i + 1];
      row[2 * i] = even * c[i] - odd * s[i];
      row[2 * i + 1] = even * s[i] + odd * c[i];
    }
  };
  const auto rotate_queries = [&](float* q, int t, int n_heads) {
    for (int head = 0; head < n_heads; ++head) rotate(q + head * K + N, t);
  };
  // All latents into the cache: after their norm, and the key after its rotation. If all fit in one part, the queries with them, which
  // read the same rows.
  const bool together = !silent && T <= kPart;
  in_parts(T, [&](int first, int n) {
    const float* h = norm(first, n);
    float* kv = latents.get(static_cast<size_t>(n) * (C + R));
    float* q = together ? queries.get(static_cast<size_t>(n) * H * K) : nullptr;
    const Product keep{&l.kv_a, kv, static_cast<size_t>(C + R), false};
    if (together) products({{&l.q, q, static_cast<size_t>(H) * K, false}, keep}, h, D, n);
    else products({keep}, h, D, n);
    each_token(n, [&](int t) {
      float* row = kv + static_cast<size_t>(t) * (C + R);
      kernels().rms_norm(row, l.kv_norm, C, l.kv_eps, row);
      rotate(row + C, first + t);
      if (together) rotate_queries(q + static_cast<size_t>(t) * H * K, t, H);
    });
    remember(cache, kv, n, start + first);
  });
  // Of the asking tokens first..first+n, n_heads heads from `head` on.
  const auto ask = [&](int first, int n, int head, int n_heads) {
    const size_t stride = static_cast<size_t>(together ? H : n_heads) * K;
    float* q = queries.get(together ? 0 : n * stride);
    if (together) {
      q += first * stride + head * K;
    } else {
      const Weights rows = rows_of(l.q, head * K, n_heads * K);
      products({{&rows, q, stride, false}}, norm(silent + first, n), D, n);
      each_token(n, [&](int t) { rotate_queries(q + t * stride, silent + first + t, n_heads); });
    }
    return Queries{{q, stride, static_cast<size_t>(K)}, {q + N, stride, static_cast<size_t>(K)}};
  };
  float* o = values.get(asking * width);
  if (expanded) expanded_attention(cache, l.k_b, l.v_b, ask, start + silent, asking, l.scale, o);
  in_parts(asking, [&](int first, int n) {
    if (!expanded) {
      const Queries asked = ask(first, n, 0, H);
      float* qc = absorbed.get(static_cast<size_t>(n) * H * C);
      float* u = summed.get(static_cast<size_t>(n) * H * C);
      const int32_t* list = counting(n);
      if (n > kTile) head_products(l.k_b, asked.q, n, qc);
      const auto absorb = [&](int h) { head_product(l.k_b, h, asked.q, n, list, qc); };
      attention(cache, absorb, qc, asked.qr, start + silent + first, n, H, l.scale, u);
      head_products(l.v_b, {u, static_cast<size_t>(H) * C, static_cast<size_t>(C)}, n, o + first * width);
    }
    products({{&l.o, x + static_cast<size_t>(silent + first) * D, static_cast<size_t>(D), true}}, o + first * width, width, n);
  });
}

void feed_forward_layer(const FeedForwardLayer& l, float* x, int T, bool counts) {
  static Buffer<float> normed, weights;
  static Buffer<int32_t> ids;
  const int D = l.shared.gate[0].columns, A = l.router ? l.active : 0;
  in_parts(T, [&](int first, int n) {
    float* part = x + static_cast<size_t>(first) * D;
    float* h = normed.get(static_cast<size_t>(n) * D);
    rms_norm(part, l.norm, n, D, l.eps, h);
    int32_t* chosen_ids = ids.get(static_cast<size_t>(n) * A + 1);
    float* chosen_weights = weights.get(static_cast<size_t>(n) * A + 1);
    if (l.router)
      route(h, l.router, l.bias, n, D, static_cast<int>(l.routed.gate.size()), A, l.scale, chosen_ids, chosen_weights);
    if (l.used && counts)
      for (int i = 0; i < n * A; ++i) ++l.used[chosen_ids[i]];
    mixture(l.routed, chosen_ids, chosen_weights, A, &l.shared, h, n, D, part);
  });
}

void run_layers(const Layers& layers, int first, int end, float* x, int T, const float* cos, const float* sin, int start, bool expanded,
                int asking) {
  for (int i = first; i < end; ++i) {
    const Layer& layer = layers.all[i];
    const int answered = i + 1 == static_cast<int>(layers.all.size()) ? asking : T;
    attention_layer(*layer.attention, x, T, cos, sin, *layer.cache, start, expanded && answered == T, answered);
    feed_forward_layer(*layer.feed_forward, x + static_cast<size_t>(T - answered) * layer.attention->q.columns, answered, T == 1);
  }
}

}  // namespace kimi
