#include "ops.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kimi {
namespace {

const Kernels* const kBestFirst[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kAvx512Vnni, &kAvxVnni, &kAvx512Vnni256, &kAvx2,
#elif defined(__aarch64__) || defined(_M_ARM64)
    &kNeon,
#endif
    &kScalar};

const Kernels* chosen = nullptr;
std::unique_ptr<Pool> the_pool;

// A task should read about this much, so that claiming it costs nothing beside it.
constexpr size_t kTaskBytes = 40 << 10;
bool is_float(const Weights& w) { return w.block->elements == 1; }
int blocks_of(int rows) { return (rows + kRows - 1) / kRows; }

// n rows of activations as the kernels take them: quantized, in tiles; and as the floats they were, for matrices stored
// as floats, which multiply the rows of x that `tokens` lists.
struct Operand {
  const uint8_t* tiles;
  int n, columns;
  const float* x;
  size_t x_stride;       // floats from row to row
  const int32_t* tokens;
};

// Calls task(first, W) for every tile of n tokens; the pool takes part if there are several.
template <typename Task>
void each_tile(int n, const Task& task) {
  const int whole = n / kTile, tail = n % kTile;
  const int count = whole + (tail >> 2) + (tail >> 1 & 1) + (tail & 1);
  pool().run(count, [&](int i, int) {
    int first = std::min(i, whole) * kTile;
    for (int k = whole; k < i; ++k) first += tile_width(n, first);
    task(first, tile_width(n, first));
  });
}

// The listed rows of `rows`, each a tile of one token, put together as tiles; a single row is a tile already.
const uint8_t* gather(const uint8_t* rows, int columns, const int32_t* tokens, int n, uint8_t* out) {
  const size_t size = token_bytes(columns);
  if (n == 1) return rows + tokens[0] * size;
  for (int first = 0, W; first < n; first += W) {
    W = tile_width(n, first);
    for (int lane = 0; lane < W; ++lane) {
      const uint8_t* row = rows + tokens[first + lane] * size;
      uint8_t* at = out + first * size;
      for (int g = 0; g < columns / kGroup; ++g, row += kTokenGroup, at += W * kTokenGroup) {
        std::memcpy(at + lane * kGroup, row, kGroup);
        for (int k = 0; k < 3; ++k) std::memcpy(at + W * (kGroup + 4 * k) + 4 * lane, row + kGroup + 4 * k, 4);
      }
    }
  }
  return out;
}

struct Scratch {  // per thread
  Buffer<PanelRun> panel;
  Buffer<float> row, out, more;
  Buffer<uint8_t> tile;
};
thread_local Scratch scratch;

bool on_amd() {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool is = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return is;
#else
  return false;
#endif
}

// Row blocks of one shape and layout, which are multiplied side by side.
struct Blocks {
  const void *these[kMostBlocks], *next[kMostBlocks];
  float* out[kMostBlocks];
  int n = 0;

  // Row blocks from..to of w into out; those of `following` from `then` on are likely to come after all that is added.
  void add(const Weights& w, int from, int to, const Weights& following, int then, float* to_out) {
    for (; from < to; ++from, ++then, to_out += kRows) add(w.data + from * w.stride, following.data + then * following.stride, to_out);
  }
  void add(const void* block, const void* following, float* to_out) {
    these[n] = block, next[n] = following, out[n] = to_out;
    ++n;
  }
  void multiply(Form form, const Operand& x, size_t stride) const {
    const size_t size = token_bytes(x.columns);
    const BlocksKernel streamed = x.n == 1 && n > kPair && on_amd() ? kernels().one_stream[static_cast<int>(form)] : nullptr;
    const BlocksKernel kernel = streamed ? streamed : kernels().blocks[static_cast<int>(form)];
    for (int first = 0, W; first < x.n; first += W) {
      W = tile_width(x.n, first);
      float* to[kMostBlocks];
      for (int i = 0; i < n; ++i) to[i] = out[i] + first * stride;
      kernel(these, next, n, x.tiles + first * size, x.columns / kGroup, W, to, stride);
    }
  }
};

// Row block b of w, whose layout is not packed, times all tokens: out[i * stride + row].
void row_block(const Weights& w, int b, const Operand& x, float* out, size_t stride) {
  switch (w.block->kind) {
    case Kind::F32:
    case Kind::F16:
    case Kind::BF16: {
      const size_t row_bytes = static_cast<size_t>(w.columns) * w.block->bytes;
      float* weights = scratch.row.get(w.columns);
      for (int r = 0; r < kRows; ++r) {
        const int row = b * kRows + r;
        const uint8_t* stored = w.data + row * row_bytes;
        if (row < w.rows && w.block->kind == Kind::F16)
          kernels().half_to_float(reinterpret_cast<const uint16_t*>(stored), w.columns, weights);
        else if (row < w.rows)
          decode_float_row(w.block->kind, stored, w.columns, weights);
        for (int i = 0; i < x.n; ++i)
          out[i * stride + r] = row < w.rows ? kernels().dot(weights, x.x + x.tokens[i] * x.x_stride, w.columns) : 0;
      }
      return;
    }
    default: {
      PanelRun* panel = scratch.panel.get(w.columns / kGroup);
      decode_panel(*w.block, w.data, w.rows, w.columns, b * kRows, panel);
      const Form form = w.block->halves ? Form::panel_halves : w.block->offsets ? Form::panel_offsets : Form::panel;
      Blocks blocks;
      blocks.add(panel, panel, out);
      blocks.multiply(form, x, stride);
    }
  }
}

// How many of so many row blocks a task of one token takes: as many as go side by side, if that leaves each thread a few tasks.
int blocks_of_one(int blocks) {
  int n = kMostBlocks;
  while (n > kPair && blocks < 3 * n * pool().n_threads()) n /= 2;
  return n;
}

Form packed_form(const Weights& w) { return static_cast<Form>(w.block->kind); }  // Kind and Form list them in one order

// Row blocks from..to of w times all tokens: out[i * stride + row], counted from the first block's first row. After them, those
// of `following` from `then` on are likely to come.
void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride, const Weights& following, int then) {
  for (int n = 1; from < to; from += n, out += n * kRows) {
    if (!is_packed(w.block->kind)) {
      row_block(w, from, x, out, stride);
      continue;
    }
    n = std::min(x.n == 1 ? kMostBlocks : kPair, to - from);
    Blocks blocks;
    if (from + n < to) blocks.add(w, from, from + n, w, from + n, out);
    else blocks.add(w, from, from + n, following, then, out);
    blocks.multiply(packed_form(w), x, stride);
  }
}
void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride) {
  row_blocks(w, from, to, x, out, stride, w, to);
}

// The same into y [n][stride], trimming the last block; `add` adds to what is there.
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

const int32_t* counting(int n) {
  static std::vector<int32_t> numbers;  // only the calling thread asks, between tasks
  for (int i = static_cast<int>(numbers.size()); i < n; ++i) numbers.push_back(i);
  return numbers.data();
}

// Row blocks of w that a task of T tokens takes, of so many in all.
int blocks_a_task(const Weights& w, int T, int blocks) {
  const size_t bytes = static_cast<size_t>(w.columns) * kRows * w.block->bytes / w.block->elements;
  return std::max(static_cast<int>(kTaskBytes / bytes), T == 1 ? blocks_of_one(blocks) : kPair);
}

// Matrix h times head h of T tokens. x: head h of token t at t * x_token + h * x_head; y is [T][H][rows].
void head_products(const std::vector<Weights>& w, const float* x, size_t x_token, size_t x_head, int T, float* y) {
  static Buffer<uint8_t> buffer;
  const int H = static_cast<int>(w.size()), B = blocks_of(w[0].rows), columns = w[0].columns;
  const size_t size = token_bytes(columns) * T;  // of one head
  const int32_t* list = counting(T);
  const bool tiled = !is_float(w[0]), alone = T == 1;
  uint8_t* tiles = tiled ? buffer.get(size * H) : nullptr;
  const auto quantize = [&](int h, uint8_t* at) {
    for (int first = 0, W; first < T; first += W) {
      W = tile_width(T, first);
      for (int lane = 0; lane < W; ++lane)
        kernels().quantize(x + (first + lane) * x_token + h * x_head, columns / kGroup, at + first * token_bytes(columns), W, lane);
    }
    return at;
  };
  if (tiled && !alone) pool().run(H, [&](int h, int) { quantize(h, tiles + h * size); });
  const int step = blocks_a_task(w[0], T, H * B), steps = (B + step - 1) / step;
  pool().run(H * steps, [&](int i, int) {
    const int h = i / steps, from = i % steps * step;
    // A single token's head is so little that every task quantizes it for itself: that is less than a call of the pool.
    const uint8_t* in = tiled && alone ? quantize(h, scratch.tile.get(size)) : tiles + h * size;
    const Operand operand{tiled ? in : nullptr, T, columns, x + h * x_head, x_token, list};
    row_blocks_into(w[h], from, std::min(from + step, B), operand, y + static_cast<size_t>(h) * w[h].rows, static_cast<size_t>(H) * w[h].rows, false);
  });
}

}  // namespace

const Kernels& kernels() {
  if (!chosen)
    for (const Kernels* k : kBestFirst)
      if (k->runs_here()) return *(chosen = k);
  return *chosen;
}

std::vector<const char*> usable_kernels() {
  std::vector<const char*> names;
  for (const Kernels* k : kBestFirst)
    if (k->runs_here()) names.push_back(k->name);
  return names;
}

void use_kernels(const char* name) {
  for (const Kernels* k : kBestFirst)
    if (std::strcmp(k->name, name) == 0 && k->runs_here()) {
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
  static Buffer<uint8_t> buffer;
  const int columns = all[0].w->columns;
  Operand operand{nullptr, T, columns, x, x_stride, counting(T)};
  std::vector<int> ends;
  int n_tasks = 0, n_blocks = 0;
  for (const Product& p : all) n_blocks += blocks_of(p.w->rows);
  for (const Product& p : all) {
    if (!is_float(*p.w)) operand.tiles = buffer.get(token_bytes(columns) * T);
    const int step = blocks_a_task(*p.w, T, n_blocks);
    ends.push_back(n_tasks += (blocks_of(p.w->rows) + step - 1) / step);
  }
  if (operand.tiles)
    each_tile(T, [&](int first, int W) {
      uint8_t* tile = buffer.get(0) + first * token_bytes(columns);
      for (int lane = 0; lane < W; ++lane) kernels().quantize(x + (first + lane) * x_stride, columns / kGroup, tile, W, lane);
    });
  pool().run(n_tasks, [&](int i, int) {
    size_t which = 0;
    while (i >= ends[which]) ++which;
    const Product& p = all[which];
    const int step = blocks_a_task(*p.w, T, n_blocks), from = (i - (which ? ends[which - 1] : 0)) * step;
    row_blocks_into(*p.w, from, std::min(from + step, blocks_of(p.w->rows)), operand, p.y, p.stride, p.add);
  });
}

void linear(const Weights& w, const float* x, int T, float* y) {
  products({{&w, y, static_cast<size_t>(w.rows), false}}, x, w.columns, T);
}

void linear_heads(const std::vector<Weights>& w, const float* x, int T, float* y) {
  head_products(w, x, w.size() * w[0].columns, w[0].columns, T, y);
}

void embed(const Weights& w, const int32_t* ids, int T, float* y) {
  for (int t = 0; t < T; ++t) {
    const int id = ids[t], r = id % kRows;
    float* out = y + static_cast<size_t>(t) * w.columns;
    if (is_float(w)) {
      decode_float_row(w.block->kind, w.data + static_cast<size_t>(id) * w.columns * w.block->bytes, w.columns, out);
      continue;
    }
    if (w.block->kind != Kind::q4g32 && w.block->kind != Kind::q8g32) {
      PanelRun* panel = scratch.panel.get(w.columns / kGroup);
      const size_t row_bytes = static_cast<size_t>(w.columns / w.block->elements) * w.block->bytes;
      decode_panel(*w.block, w.data + id * row_bytes, 1, w.columns, 0, panel);
      for (int k = 0; k < w.columns; ++k) {
        const PanelRun& run = panel[k / kGroup];
        const int c = k % kGroup;
        out[k] = run.scale[c / 16][0] * static_cast<float>(run.q[64 * (c / 4) + c % 4]) + run.offset[0];
      }
      continue;
    }
    const bool four = w.block->kind == Kind::q4g32;
    const uint8_t* run = w.data + id / kRows * w.stride;
    for (int g = 0; g < w.columns / kGroup; ++g, run += four ? kQ4Run : kQ8Run) {
      alignas(64) uint16_t halves[16];
      std::memcpy(halves, run + (four ? 256 : 512), 32);
      float scales[16];
      kernels().half_to_float(halves, 16, scales);
      for (int c = 0; c < kGroup; ++c) {
        const uint8_t byte = four ? run[64 * (c / 8) + 4 * r + c % 4] : run[64 * (c / 4) + 4 * r + c % 4];
        const int q = four ? (c % 8 < 4 ? byte & 15 : byte >> 4) - 8 : static_cast<int8_t>(byte);
        out[g * kGroup + c] = scales[r] * static_cast<float>(q);
      }
    }
  }
}

void pack(const Weights& w, uint8_t* out) {
  const Block& packed = block_named(packed_as(w.block->kind));
  const size_t size = static_cast<size_t>(w.columns) / packed.elements * packed.bytes * kRows;
  pool().run(blocks_of(w.rows), [&](int b, int) { pack_block(*w.block, w.data, w.rows, w.columns, b, out + b * size); });
}

void rms_norm(const float* x, const float* weight, int T, int D, float eps, float* y) {
  for (int t = 0; t < T; ++t)
    kernels().rms_norm(x + static_cast<size_t>(t) * D, weight, D, eps, y + static_cast<size_t>(t) * D);
}

void route(const float* x, const float* router, const float* bias, int T, int D, int E, int A, float scale,
           int32_t* ids, float* weights) {
  static Buffer<float> buffer;
  const int padded = (E + 15) / 16 * 16;
  float* scores = buffer.get(static_cast<size_t>(T) * padded);
  // A token's scores are one task each for many tokens; for a few, the experts are dealt out.
  const int step = T < pool().n_threads() ? 8 : padded, steps = (padded + step - 1) / step;
  pool().run(T * steps, [&](int i, int) {
    const int t = i / steps, from = i % steps * step;
    for (int e = from; e < std::min(from + step, padded); ++e)
      scores[static_cast<size_t>(t) * padded + e] =
          e < E ? kernels().dot(x + static_cast<size_t>(t) * D, router + static_cast<size_t>(e) * D, D) : 0.0f;
  });
  std::vector<int32_t> order(E);
  for (int t = 0; t < T; ++t) {
    float* score = scores + static_cast<size_t>(t) * padded;
    kernels().sigmoid(score, padded, score);
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
  }
}

namespace {

// One expert and its rows of x. The order of jobs, which is that of the experts' index, is the order of every token's sum.
struct Job {
  const Weights *gate, *up, *down;
  std::vector<int32_t> tokens, slots;  // row i is expert(x[tokens[i]]); slots[i] is its place among all that were asked for
  Operand in, hidden;                  // x's rows; silu(gate) * up, of which tiles or x is written by `run_hidden`
};

// One job an expert that is asked for: slot i wants experts[i] on x[tokens[i]].
std::vector<Job> jobs_of(const Mlp& mlp, const int32_t* experts, const int32_t* tokens, int n_slots) {
  std::vector<std::vector<int32_t>> slots(mlp.gate.size());
  for (int i = 0; i < n_slots; ++i) slots[experts[i]].push_back(i);
  std::vector<Job> jobs;
  for (size_t e = 0; e < slots.size(); ++e) {
    if (slots[e].empty()) continue;
    Job job{&mlp.gate[e], &mlp.up[e], &mlp.down[e], {}, std::move(slots[e]), {}, {}};
    for (int32_t i : job.slots) job.tokens.push_back(tokens[i]);
    jobs.push_back(std::move(job));
  }
  return jobs;
}

// Row blocks from..to of gate and up, at most half of kMostBlocks: [n][16 * (to - from)] each.
void gate_and_up(const Job& job, int from, int to, float* gate, float* up) {
  const Weights &g = *job.gate, &u = *job.up;
  if (job.in.n == 1 && is_packed(g.block->kind) && u.block == g.block) {
    Blocks blocks;
    for (int b = from; b < to; ++b) {
      blocks.add(g, b, b + 1, g, b + to - from, gate + (b - from) * kRows);
      blocks.add(u, b, b + 1, u, b + to - from, up + (b - from) * kRows);
    }
    return blocks.multiply(packed_form(g), job.in, 0);
  }
  row_blocks(g, from, to, job.in, gate, (to - from) * kRows);
  row_blocks(u, from, to, job.in, up, (to - from) * kRows);
}

// The first half of all jobs: hidden values, quantized unless a down matrix is stored as floats.
void run_hidden(std::vector<Job>& jobs, const float* x, int T, int D) {
  static Buffer<uint8_t> rows, gathered, hidden_tiles;
  static Buffer<float> hidden_floats;
  const size_t in_bytes = token_bytes(D);
  bool wanted = false;
  size_t n_slots = 0, n_floats = 0, n_tiles = 0, most = 0, n_blocks = 0;
  for (const Job& job : jobs) n_blocks += 2 * static_cast<size_t>(blocks_of(job.gate->rows));
  struct Task { int job, group, n; };  // n groups of 32 hidden channels: two row blocks of gate and two of up each
  std::vector<Task> tasks;
  const int together = std::max(1, blocks_of_one(static_cast<int>(n_blocks)) / 4);
  for (size_t j = 0; j < jobs.size(); ++j) {
    const size_t n = jobs[j].tokens.size(), F = jobs[j].gate->rows;
    wanted |= !is_float(*jobs[j].gate);
    n_slots += n;
    most = std::max(most, n);
    n_floats += is_float(*jobs[j].down) ? n * F : 0;
    n_tiles += is_float(*jobs[j].down) ? 0 : n * token_bytes(static_cast<int>(F));
    const int groups = static_cast<int>(F / kGroup), step = n == 1 ? together : 1;
    for (int g = 0; g < groups; g += step) tasks.push_back({static_cast<int>(j), g, std::min(step, groups - g)});
  }
  const int32_t* numbers = counting(static_cast<int>(most));
  uint8_t* in_at = wanted ? gathered.get(n_slots * in_bytes) : nullptr;
  uint8_t* tiles_at = hidden_tiles.get(n_tiles);
  float* floats_at = hidden_floats.get(n_floats);
  for (Job& job : jobs) {
    const int n = static_cast<int>(job.tokens.size()), F = job.gate->rows;
    job.in = {in_at, n, D, x, static_cast<size_t>(D), job.tokens.data()};
    if (in_at) in_at += n * in_bytes;
    const bool floats = is_float(*job.down);
    job.hidden = {floats ? nullptr : tiles_at, n, F, floats ? floats_at : nullptr, static_cast<size_t>(F), numbers};
    if (floats) floats_at += static_cast<size_t>(n) * F;
    else tiles_at += n * token_bytes(F);
  }
  if (wanted) {
    uint8_t* at = rows.get(in_bytes * T);
    const auto quantize = [&](int t, int) { kernels().quantize(x + static_cast<size_t>(t) * D, D / kGroup, at + t * in_bytes, 1, 0); };
    const auto collect = [&](int j, int) {
      Operand& in = jobs[j].in;
      in.tiles = gather(at, D, in.tokens, in.n, const_cast<uint8_t*>(in.tiles));
    };
    if (T < 4) {
      for (int t = 0; t < T; ++t) quantize(t, 0);
      for (size_t j = 0; j < jobs.size(); ++j) collect(static_cast<int>(j), 0);
    } else {
      pool().run(T, quantize);
      pool().run(static_cast<int>(jobs.size()), collect);
    }
  }
  // Gate, up, silu and the hidden values' own quantization.
  pool().run(static_cast<int>(tasks.size()), [&](int i, int) {
    const auto [j, g, groups] = tasks[i];
    const Job& job = jobs[j];
    const int n = job.in.n, F = job.gate->rows, width = groups * kGroup;
    float* gate = scratch.out.get(static_cast<size_t>(n) * width);
    float* up = scratch.more.get(static_cast<size_t>(n) * width);
    gate_and_up(job, 2 * g, 2 * (g + groups), gate, up);
    kernels().silu_mul(gate, up, n * width, gate);
    if (job.hidden.x) {
      float* to = const_cast<float*>(job.hidden.x) + g * kGroup;
      for (int t = 0; t < n; ++t) std::memcpy(to + static_cast<size_t>(t) * F, gate + t * width, sizeof(float) * width);
      return;
    }
    for (int first = 0, W; first < n; first += W) {
      W = tile_width(n, first);
      uint8_t* tile = const_cast<uint8_t*>(job.hidden.tiles) + first * token_bytes(F) + static_cast<size_t>(g) * W * kTokenGroup;
      for (int lane = 0; lane < W; ++lane) kernels().quantize(gate + (first + lane) * width, groups, tile, W, lane);
    }
  });
}

// Calls task(from, to) for all row blocks of down, several at a time.
template <typename Task>
void each_down(int D, int T, const Task& task) {
  const int blocks = blocks_of(D), step = T == 1 ? blocks_of_one(blocks) : kPair;
  pool().run((blocks + step - 1) / step, [&](int i, int) { task(i * step, std::min((i + 1) * step, blocks)); });
}

// Row blocks from..to of a job's down times its hidden values. A task takes them from one job after the other.
void down(const std::vector<Job>& jobs, size_t j, int from, int to, float* out, size_t stride) {
  const bool last = j + 1 == jobs.size();
  row_blocks(*jobs[j].down, from, to, jobs[j].hidden, out, stride, *jobs[last ? 0 : j + 1].down, last ? to : from);
}

}  // namespace

void mixture(const Mlp& routed, const int32_t* ids, const float* weights, int A, const Mlp* shared, const float* x,
             int T, int D, float* y) {
  static Buffer<int32_t> owners;
  int32_t* tokens = owners.get(static_cast<size_t>(T) * A);
  for (int i = 0; i < T * A; ++i) tokens[i] = i / A;
  std::vector<Job> jobs = jobs_of(routed, ids, tokens, T * A);
  const int32_t* numbers = counting(T);
  if (shared) jobs.push_back({&shared->gate[0], &shared->up[0], &shared->down[0], {numbers, numbers + T}, {}, {}, {}});
  run_hidden(jobs, x, T, D);
  each_down(D, T, [&](int from, int to) {
    const int padded = (to - from) * kRows, rows = std::min(padded, D - from * kRows);
    float* sum = scratch.more.get(static_cast<size_t>(T) * padded);
    std::fill_n(sum, static_cast<size_t>(T) * padded, 0.0f);
    for (size_t j = 0; j < jobs.size(); ++j) {
      const Job& job = jobs[j];
      float* part = scratch.out.get(static_cast<size_t>(job.hidden.n) * padded);
      down(jobs, j, from, to, part, padded);
      for (int i = 0; i < job.hidden.n; ++i)
        kernels().axpy(job.slots.empty() ? 1.0f : weights[job.slots[i]], part + static_cast<size_t>(i) * padded, padded,
                       sum + static_cast<size_t>(job.tokens[i]) * padded);
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < rows; ++r) y[static_cast<size_t>(t) * D + from * kRows + r] += sum[static_cast<size_t>(t) * padded + r];
  });
}

void expert_outputs(const Mlp& mlp, const int32_t* experts, const int32_t* tokens, int n_slots, const float* x, int T,
                    int D, float* y) {
  std::vector<Job> jobs = jobs_of(mlp, experts, tokens, n_slots);
  run_hidden(jobs, x, T, D);
  each_down(D, T, [&](int from, int to) {
    const int padded = (to - from) * kRows, rows = std::min(padded, D - from * kRows);
    for (size_t j = 0; j < jobs.size(); ++j) {
      const Job& job = jobs[j];
      float* part = scratch.out.get(static_cast<size_t>(job.hidden.n) * padded);
      down(jobs, j, from, to, part, padded);
      for (int i = 0; i < job.hidden.n; ++i)
        std::memcpy(y + static_cast<size_t>(job.slots[i]) * D + from * kRows, part + static_cast<size_t>(i) * padded, sizeof(float) * rows);
    }
  });
}

void combine(const float* outputs, const float* weights, int A, const float* shared, int T, int D, float* x) {
  static Buffer<float> buffer;
  float* sums = buffer.get(static_cast<size_t>(T) * D);
  const auto add = [&](int t, int) {
    float *sum = sums + static_cast<size_t>(t) * D, *to = x + static_cast<size_t>(t) * D;
    std::fill_n(sum, D, 0.0f);
    for (int i = t * A; i < (t + 1) * A; ++i) kernels().axpy(weights[i], outputs + static_cast<size_t>(i) * D, D, sum);
    kernels().axpy(1.0f, shared + static_cast<size_t>(t) * D, D, sum);
    for (int k = 0; k < D; ++k) to[k] += sum[k];
  };
  if (T < 4) for (int t = 0; t < T; ++t) add(t, 0);
  else pool().run(T, add);
}

void attention_layer(const AttentionLayer& l, float* x, int T, const float* cos, const float* sin,
                     const LatentCache& cache, int start, bool expanded) {
  static Buffer<float> normed, queries, latents, ropes, absorbed, summed, values;
  const int D = l.q.columns, H = static_cast<int>(l.k_b.size()), N = l.k_b[0].columns, C = l.k_b[0].rows, V = l.v_b[0].rows;
  const int R = l.kv_a.rows - C, K = N + R;
  float* h = normed.get(static_cast<size_t>(T) * D);
  float* q = queries.get(static_cast<size_t>(T) * H * K);
  float* kv = latents.get(static_cast<size_t>(T) * (C + R));
  float* qr = ropes.get(static_cast<size_t>(T) * H * R);
  float* o = values.get(static_cast<size_t>(T) * H * V);
  const auto norm = [&](int t, int) { kernels().rms_norm(x + static_cast<size_t>(t) * D, l.norm, D, l.eps, h + static_cast<size_t>(t) * D); };
  if (T < 4) for (int t = 0; t < T; ++t) norm(t, 0);
  else pool().run(T, norm);
  products({{&l.q, q, static_cast<size_t>(H) * K, false}, {&l.kv_a, kv, static_cast<size_t>(C + R), false}}, h, D, T);
  // Cached: the latent after its norm, the key after its rotation.
  const auto turn = [&](int t, int) {
    const float *c = cos + static_cast<size_t>(t) * R / 2, *s = sin + static_cast<size_t>(t) * R / 2;
    const auto rotate = [&](const float* from, float* to) {
      for (int i = 0; i < R / 2; ++i) {
        const float even = from[2 * i], odd = from[2 * i + 1];
        to[2 * i] = even * c[i] - odd * s[i];
        to[2 * i + 1] = even * s[i] + odd * c[i];
      }
    };
    float* row = kv + static_cast<size_t>(t) * (C + R);
    kernels().rms_norm(row, l.kv_norm, C, l.kv_eps, row);
    rotate(row + C, row + C);
    for (int head = 0; head < H; ++head)
      rotate(q + (static_cast<size_t>(t) * H + head) * K + N, qr + (static_cast<size_t>(t) * H + head) * R);
  };
  if (T < 4) for (int t = 0; t < T; ++t) turn(t, 0);
  else pool().run(T, turn);
  remember(cache, kv, T, start);
  if (expanded) {
    expanded_attention(cache, l.k_b, l.v_b, q, K, qr, start, T, l.scale, o);
  } else {
    float* qc = absorbed.get(static_cast<size_t>(T) * H * C);
    float* u = summed.get(static_cast<size_t>(T) * H * C);
    head_products(l.k_b, q, static_cast<size_t>(H) * K, K, T, qc);
    attention(cache, qc, qr, start, T, H, l.scale, u);
    head_products(l.v_b, u, static_cast<size_t>(H) * C, C, T, o);
  }
  products({{&l.o, x, static_cast<size_t>(D), true}}, o, static_cast<size_t>(H) * V, T);
}

void feed_forward_layer(const FeedForwardLayer& l, float* x, int T) {
  static Buffer<float> normed, weights;
  static Buffer<int32_t> ids;
  const int D = l.shared.gate[0].columns, A = l.router ? l.active : 0;
  float* h = normed.get(static_cast<size_t>(T) * D);
  const auto norm = [&](int t, int) { kernels().rms_norm(x + static_cast<size_t>(t) * D, l.norm, D, l.eps, h + static_cast<size_t>(t) * D); };
  if (T < 4) for (int t = 0; t < T; ++t) norm(t, 0);
  else pool().run(T, norm);
  int32_t* chosen_ids = ids.get(static_cast<size_t>(T) * A + 1);
  float* chosen_weights = weights.get(static_cast<size_t>(T) * A + 1);
  if (l.router)
    route(h, l.router, l.bias, T, D, static_cast<int>(l.routed.gate.size()), A, l.scale, chosen_ids, chosen_weights);
  if (l.used && T == 1)
    for (int i = 0; i < A; ++i) ++l.used[chosen_ids[i]];
  mixture(l.routed, chosen_ids, chosen_weights, A, &l.shared, h, T, D, x);
}

}  // namespace kimi
