// Experts: the tokens that chose each, its gate and up, its down, and the sums in order of index.
#include <algorithm>
#include <cstring>

#include "row_blocks.h"

namespace kimi {
namespace {

// The listed rows of `rows`, each a tile of one token, put together as tiles; a single row is a tile already.
const uint8_t* gather(const uint8_t* rows, int columns, const int32_t* tokens, int n, bool for_many, uint8_t* out) {
  const size_t size = token_bytes(columns);
  if (n == 1) return rows + tokens[0] * size;
  for (int first = 0, W; first < n; first += W) {
    W = tile_width(n, first);
    const Tile to = tile_of(out, n, columns, for_many, first, W);
    for (int lane = 0; lane < W; ++lane) {
      const uint8_t* row = rows + tokens[first + lane] * size;
      uint8_t* at = to.at;
      for (int g = 0; g < columns / kGroup; ++g, row += kTokenGroup, at += to.step) {
        std::memcpy(at + lane * kGroup, row, kGroup);
        int32_t rest[3];  // the scale and two sums
        std::memcpy(rest, row + kGroup, sizeof(rest));
        if (for_many) rest[2] = 16 * rest[1];
        for (int k = 0; k < 3; ++k) std::memcpy(at + W * (kGroup + 4 * k) + 4 * lane, rest + k, 4);
      }
    }
  }
  return out;
}

// One expert and its rows of x. The order of jobs, which is that of the experts' index, is the order of every token's sum.
struct Job {
  const Weights *gate, *up, *down;
  int n;                               // rows
  const int32_t *tokens, *slots;       // row i is expert(x[tokens[i]]); slots[i] is its place among all that were asked for, or slots is null
  Operand in, hidden;                  // x's rows; silu(gate) * up, of which tiles or x is written by `run_hidden`
};

// One job an expert that is asked for: slot i wants experts[i] on x[tokens[i]]. What it returns lasts until the next call: a token
// has one of these in every layer, and allocating what they list took 10 µs each time.
std::vector<Job>& jobs_of(const Mlp& mlp, const int32_t* experts, const int32_t* tokens, int n_slots) {
  static std::vector<Job> jobs;
  static std::vector<int> ends;  // of each expert's slots among all, sorted by expert
  static Buffer<int32_t> sorted;
  const int E = static_cast<int>(mlp.gate.size());
  int32_t *slot = sorted.get(2 * static_cast<size_t>(n_slots)), *token = slot + n_slots;
  ends.assign(E + 1, 0);
  for (int i = 0; i < n_slots; ++i) ++ends[experts[i] + 1];
  for (int e = 0; e < E; ++e) ends[e + 1] += ends[e];
  for (int i = 0; i < n_slots; ++i) {
    const int at = ends[experts[i]]++;
    slot[at] = i;
    token[at] = tokens[i];
  }
  jobs.clear();
  for (int e = 0, first = 0; e < E; first = ends[e++])
    if (const int n = ends[e] - first) jobs.push_back({&mlp.gate[e], &mlp.up[e], &mlp.down[e], n, token + first, slot + first, {}, {}});
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
  row_blocks(g, from, to, job.in, gate, (to - from) * kRows, u, from);
  row_blocks(u, from, to, job.in, up, (to - from) * kRows, g, to);
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
  static std::vector<Task> tasks;
  tasks.clear();
  const int together = std::max(1, long_task(static_cast<int>(n_blocks)) / 4);
  for (size_t j = 0; j < jobs.size(); ++j) {
    const size_t n = jobs[j].n, F = jobs[j].gate->rows;
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
    const int n = job.n, F = job.gate->rows;
    job.in = {in_at, n, D, x, static_cast<size_t>(D), job.tokens, many_meet(*job.gate, n) && many_meet(*job.up, n)};
    if (in_at) in_at += n * in_bytes;
    const bool floats = is_float(*job.down);
    job.hidden = {floats ? nullptr : tiles_at, n, F, floats ? floats_at : nullptr, static_cast<size_t>(F), numbers, many_meet(*job.down, n)};
    if (floats) floats_at += static_cast<size_t>(n) * F;
    else tiles_at += n * token_bytes(F);
  }
  if (wanted) {
    uint8_t* at = rows.get(in_bytes * T);
    const auto quantize = [&](int t, int) { kernels().quantize_row(x + static_cast<size_t>(t) * D, D / kGroup, {at + t * in_bytes, 1}, 0); };
    const auto collect = [&](int j, int) {
      Operand& in = jobs[j].in;
      in.tiles = gather(at, D, in.tokens, in.n, in.for_many, const_cast<uint8_t*>(in.tiles));
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
      Tile to = tile_of(const_cast<uint8_t*>(job.hidden.tiles), n, F, job.hidden.for_many, first, W);
      to.at += g * to.step;
      kernels().quantize(gate + first * width, width, W, groups, to, 0);
    }
  });
}

// Calls task(from, to) for all row blocks of down, several at a time: every task goes through the hidden values of all tokens, which
// of a long prompt are more than caches hold.
template <typename Task>
void each_down(int D, const Task& task) {
  const int blocks = blocks_of(D), step = long_task(blocks);
  pool().run((blocks + step - 1) / step, [&](int i, int) { task(i * step, std::min((i + 1) * step, blocks)); });
}

// Row blocks b..end of a job's down times its hidden values, for a task that takes from..to of one job after the other.
void down(const std::vector<Job>& jobs, size_t j, int b, int end, int from, int to, float* out, size_t stride) {
  const bool more = end < to, last = j + 1 == jobs.size();
  const Weights& following = *jobs[more ? j : last ? 0 : j + 1].down;
  row_blocks(*jobs[j].down, b, end, jobs[j].hidden, out, stride, following, more ? end : last ? to : from);
}

}  // namespace

void mixture(const Mlp& routed, const int32_t* ids, const float* weights, int A, const Mlp* shared, const float* x,
             int T, int D, float* y) {
  static Buffer<int32_t> owners;
  int32_t* tokens = owners.get(static_cast<size_t>(T) * A);
  for (int i = 0; i < T * A; ++i) tokens[i] = i / A;
  std::vector<Job>& jobs = jobs_of(routed, ids, tokens, T * A);
  const int32_t* numbers = counting(T);
  if (shared) jobs.push_back({&shared->gate[0], &shared->up[0], &shared->down[0], T, numbers, nullptr, {}, {}});
  run_hidden(jobs, x, T, D);
  each_down(D, [&](int from, int to) {
    const int padded = (to - from) * kRows, rows = std::min(padded, D - from * kRows);
    float* sum = scratch.more.get(static_cast<size_t>(T) * padded);
    std::fill_n(sum, static_cast<size_t>(T) * padded, 0.0f);
    for (size_t j = 0; j < jobs.size(); ++j) {
      const Job& job = jobs[j];
      const int step = job.hidden.n == 1 ? to - from : kPair;  // of many tokens so little that it stays in the first caches
      for (int b = from; b < to; b += step) {
        const int end = std::min(b + step, to), width = (end - b) * kRows;
        float* part = scratch.out.get(static_cast<size_t>(job.hidden.n) * width);
        down(jobs, j, b, end, from, to, part, width);
        for (int i = 0; i < job.hidden.n; ++i)
          kernels().axpy(job.slots ? weights[job.slots[i]] : 1.0f, part + static_cast<size_t>(i) * width, width,
                         sum + static_cast<size_t>(job.tokens[i]) * padded + (b - from) * kRows);
      }
    }
    for (int t = 0; t < T; ++t) kernels().axpy(1.0f, sum + static_cast<size_t>(t) * padded, rows, y + static_cast<size_t>(t) * D + from * kRows);
  });
}

void expert_outputs(const Mlp& mlp, const int32_t* experts, const int32_t* tokens, int n_slots, const float* x, int T,
                    int D, float* y) {
  std::vector<Job>& jobs = jobs_of(mlp, experts, tokens, n_slots);
  run_hidden(jobs, x, T, D);
  each_down(D, [&](int from, int to) {
    const int padded = (to - from) * kRows, rows = std::min(padded, D - from * kRows);
    for (size_t j = 0; j < jobs.size(); ++j) {
      const Job& job = jobs[j];
      float* part = scratch.out.get(static_cast<size_t>(job.hidden.n) * padded);
      down(jobs, j, from, to, from, to, part, padded);
      for (int i = 0; i < job.hidden.n; ++i)
        std::memcpy(y + static_cast<size_t>(job.slots[i]) * D + from * kRows, part + static_cast<size_t>(i) * padded, sizeof(float) * rows);
    }
  });
}

void combine(const float* outputs, const float* weights, int A, const float* shared, int T, int D, float* x) {
  static Buffer<float> buffer;
  float* sums = buffer.get(static_cast<size_t>(T) * D);
  each_token(T, [&](int t) {
    float *sum = sums + static_cast<size_t>(t) * D, *to = x + static_cast<size_t>(t) * D;
    std::fill_n(sum, D, 0.0f);
    for (int i = t * A; i < (t + 1) * A; ++i) kernels().axpy(weights[i], outputs + static_cast<size_t>(i) * D, D, sum);
    kernels().axpy(1.0f, shared + static_cast<size_t>(t) * D, D, sum);
    for (int k = 0; k < D; ++k) to[k] += sum[k];
  });
}

}  // namespace kimi
