#include "ops.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace kimi {
namespace {

const Kernels* const kBestFirst[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &kAvx512Vnni, &kAvx2,
#endif
    &kScalar};

const Kernels* chosen = nullptr;
std::unique_ptr<Pool> the_pool;

bool is_float(const Weights& w) { return w.block->elements == 1; }
int blocks_of(int rows) { return (rows + kRows - 1) / kRows; }

// T rows of activations, quantized once and shared by all matrices that read them. Matrices stored as floats read x.
class Inputs {
 public:
  Inputs(const float* x, int T, int I, bool quantize) : x(x), columns(I) {
    if (!quantize) return;
    const int G = I / kGroup;
    q_.resize(static_cast<size_t>(T) * I);
    scale_.resize(static_cast<size_t>(T) * G);
    sum_.resize(static_cast<size_t>(T) * G);
    const auto row = [&](int t, int) {
      kernels().quantize_row(x + static_cast<size_t>(t) * I, I, q_.data() + static_cast<size_t>(t) * I,
                             scale_.data() + static_cast<size_t>(t) * G, sum_.data() + static_cast<size_t>(t) * G);
    };
    if (T < 8) {
      for (int t = 0; t < T; ++t) row(t, 0);
    } else {
      pool().run(T, row);
    }
    view = {q_.data(), scale_.data(), sum_.data(), G};
  }
  const float* x;
  int columns;
  Activations view{};

 private:
  std::vector<int8_t> q_;
  std::vector<float> scale_;
  std::vector<int32_t> sum_;
};

// Per thread: a decoded row block, and one row of floats.
struct Scratch {
  std::vector<PanelRun> panel;
  std::vector<float> row, out;
};
thread_local Scratch scratch;

// Row block b of w times the listed tokens: out[i * stride + row].
void row_block(const Weights& w, int b, const Inputs& in, const int32_t* tokens, int n, float* out, size_t stride) {
  const Kernels& k = kernels();
  switch (w.block->kind) {
    case Kind::q4g32:
      return k.q4_block(w.data + b * w.stride, in.view, tokens, n, out, stride);
    case Kind::q8g32:
      return k.q8_block(w.data + b * w.stride, in.view, tokens, n, out, stride);
    case Kind::F32:
    case Kind::F16:
    case Kind::BF16: {
      const size_t row_bytes = static_cast<size_t>(w.columns) * w.block->bytes;
      scratch.row.resize(w.columns);
      for (int r = 0; r < kRows; ++r) {
        const int row = b * kRows + r;
        if (row < w.rows) decode_float_row(w.block->kind, w.data + row * row_bytes, w.columns, scratch.row.data());
        for (int i = 0; i < n; ++i)
          out[i * stride + r] = row < w.rows ? k.dot(scratch.row.data(), in.x + static_cast<size_t>(tokens[i]) * in.columns, w.columns) : 0;
      }
      return;
    }
    default:
      scratch.panel.resize(w.columns / kGroup);
      decode_panel(*w.block, w.data, w.rows, w.columns, b * kRows, scratch.panel.data());
      return k.panel_block(scratch.panel.data(), w.block->halves, w.block->offsets, in.view, tokens, n, out, stride);
  }
}

// The same into y [T][rows], trimming the last block.
void row_block_into(const Weights& w, int b, const Inputs& in, const int32_t* tokens, int n, float* y, size_t stride) {
  const int rows = std::min(kRows, w.rows - b * kRows);
  if (rows == kRows) return row_block(w, b, in, tokens, n, y + b * kRows, stride);
  scratch.out.resize(static_cast<size_t>(n) * kRows);
  row_block(w, b, in, tokens, n, scratch.out.data(), kRows);
  for (int i = 0; i < n; ++i) std::memcpy(y + i * stride + b * kRows, scratch.out.data() + i * kRows, sizeof(float) * rows);
}

std::vector<int32_t> counting(int n) {
  std::vector<int32_t> v(n);
  for (int i = 0; i < n; ++i) v[i] = i;
  return v;
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

void linear(const Weights& w, const float* x, int T, float* y) {
  const Inputs in(x, T, w.columns, !is_float(w));
  const auto tokens = counting(T);
  pool().run(blocks_of(w.rows), [&](int b, int) { row_block_into(w, b, in, tokens.data(), T, y, w.rows); });
}

void linear_heads(const std::vector<Weights>& w, const float* x, int T, float* y) {
  const int H = static_cast<int>(w.size()), B = blocks_of(w[0].rows);
  const Inputs in(x, T * H, w[0].columns, !is_float(w[0]));
  pool().run(H * B, [&](int i, int) {
    const int h = i / B;
    std::vector<int32_t> tokens(T);
    for (int t = 0; t < T; ++t) tokens[t] = t * H + h;
    row_block_into(w[h], i % B, in, tokens.data(), T, y + static_cast<size_t>(h) * w[h].rows, static_cast<size_t>(H) * w[h].rows);
  });
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
      scratch.panel.resize(w.columns / kGroup);
      const size_t row_bytes = static_cast<size_t>(w.columns / w.block->elements) * w.block->bytes;
      decode_panel(*w.block, w.data + id * row_bytes, 1, w.columns, 0, scratch.panel.data());
      for (int k = 0; k < w.columns; ++k) {
        const PanelRun& run = scratch.panel[k / kGroup];
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

void rms_norm(const float* x, const float* weight, int T, int D, float eps, float* y) {
  for (int t = 0; t < T; ++t)
    kernels().rms_norm(x + static_cast<size_t>(t) * D, weight, D, eps, y + static_cast<size_t>(t) * D);
}

void route(const float* x, const float* router, const float* bias, int T, int D, int E, int A, float scale,
           int32_t* ids, float* weights) {
  const int padded = (E + 15) / 16 * 16;
  std::vector<float> score(padded, 0.0f);
  for (int t = 0; t < T; ++t) {
    for (int e = 0; e < E; ++e)
      score[e] = kernels().dot(x + static_cast<size_t>(t) * D, router + static_cast<size_t>(e) * D, D);
    kernels().sigmoid(score.data(), padded, score.data());
    auto order = counting(E);
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

void mixture(const Mlp& routed, const int32_t* ids, const float* weights, int A, const Mlp* shared, const float* x,
             int T, int D, float* y) {
  // One job an expert that has tokens, in order of index, the shared MLP last: the order of every token's sum.
  struct Job {
    const Weights *gate, *up, *down;
    std::vector<int32_t> tokens;   // rows of x
    std::vector<float> weight;     // empty: 1
    std::vector<float> gated, lifted;
    std::unique_ptr<Inputs> hidden;
  };
  std::vector<Job> jobs;
  const int E = static_cast<int>(routed.gate.size());
  std::vector<std::vector<int32_t>> slots(E);  // t * A + i
  for (int i = 0; i < T * A; ++i) slots[ids[i]].push_back(i);
  for (int e = 0; e < E; ++e) {
    if (slots[e].empty()) continue;
    Job job{&routed.gate[e], &routed.up[e], &routed.down[e], {}, {}, {}, {}, nullptr};
    for (int32_t i : slots[e]) {
      job.tokens.push_back(i / A);
      job.weight.push_back(weights[i]);
    }
    jobs.push_back(std::move(job));
  }
  if (shared) jobs.push_back({&shared->gate[0], &shared->up[0], &shared->down[0], counting(T), {}, {}, {}, nullptr});

  bool quantize = false;
  std::vector<std::pair<int, int>> tasks;  // (job, row block)
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int F = jobs[j].gate->rows;
    quantize |= !is_float(*jobs[j].gate);
    jobs[j].gated.resize(jobs[j].tokens.size() * F);
    jobs[j].lifted.resize(jobs[j].tokens.size() * F);
    for (int b = 0; b < blocks_of(F); ++b) tasks.emplace_back(static_cast<int>(j), b);
  }
  const Inputs in(x, T, D, quantize);
  pool().run(static_cast<int>(tasks.size()), [&](int i, int) {
    auto [j, b] = tasks[i];
    Job& job = jobs[j];
    const int n = static_cast<int>(job.tokens.size()), F = job.gate->rows;
    row_block_into(*job.gate, b, in, job.tokens.data(), n, job.gated.data(), F);
    row_block_into(*job.up, b, in, job.tokens.data(), n, job.lifted.data(), F);
    const int rows = std::min(kRows, F - b * kRows);
    for (int t = 0; t < n; ++t) {
      float* g = job.gated.data() + static_cast<size_t>(t) * F + b * kRows;
      if (rows == kRows) kernels().silu_mul(g, job.lifted.data() + static_cast<size_t>(t) * F + b * kRows, kRows, g);
    }
  });
  for (Job& job : jobs)
    job.hidden = std::make_unique<Inputs>(job.gated.data(), static_cast<int>(job.tokens.size()), job.gate->rows, !is_float(*job.down));
  pool().run(blocks_of(D), [&](int b, int) {
    static thread_local std::vector<float> part;
    const int rows = std::min(kRows, D - b * kRows);
    for (int t = 0; t < T; ++t) std::fill_n(y + static_cast<size_t>(t) * D + b * kRows, rows, 0.0f);
    for (const Job& job : jobs) {
      const int n = static_cast<int>(job.tokens.size());
      const auto all = counting(n);
      part.resize(static_cast<size_t>(n) * kRows);
      row_block(*job.down, b, *job.hidden, all.data(), n, part.data(), kRows);
      for (int i = 0; i < n; ++i) {
        float* out = y + static_cast<size_t>(job.tokens[i]) * D + b * kRows;
        const float w = job.weight.empty() ? 1.0f : job.weight[i];
        kernels().axpy(w, part.data() + static_cast<size_t>(i) * kRows, rows, out);
      }
    }
  });
}

void attention(const float* q, const float* qr, const uint16_t* cache, const uint16_t* rope, int start, int T, int H,
               int C, int R, float scale, float* u) {
  pool().run(T * H, [&](int i, int) {
    const size_t at = static_cast<size_t>(i);
    kernels().attend(q + at * C, qr + at * R, cache, rope, start + i / H + 1, C, R, scale, u + at * C);
  });
}

}  // namespace kimi
