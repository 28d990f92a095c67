// The mixture of experts: who acts, gate and up, down and the sum. Read products.cu first.
//
// All of it runs without the host: ids are made and read on the device. The chosen experts that lie here become jobs,
// one an expert with the slots (token · A + place) that chose it; the shared MLP is one more. With one token there are A
// jobs of one slot. An expert that lies elsewhere has no job; its output comes with `missing`, which is read where the CPU
// wrote it, in main memory: a copy before the kernel takes longer than the kernel's waiting. A sum runs over the
// experts in order of index, then the shared MLP, in one thread.

struct Job { int expert, first, count; };  // slots[first..first + count - 1]

struct Mlps {
  const u64* experts;   // [E] addresses of packed runs, 0 for one that lies elsewhere; gate and up in turn, then down
  const u8* shared;     // one run
  int form, F, shared_form, shared_F, D, A;
};

// Sigmoid scores of h [T][D] against router [E][D]: sixteen threads an expert, in the CPU's sixteen lanes.
KERNEL_OF_ONE route(const float* h, const float* router, int D, int E, float* scores) {
  const int e = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;
  const size_t t = blockIdx.y;
  const float *x = h + t * D, *w = router + static_cast<size_t>(least(e, E - 1)) * D;
  float sum = 0.0f;
#pragma unroll 32
  for (int k = threadIdx.x % 16; k < D; k += 16) sum = fmaf(x[k], w[k], sum);
  sum = lane_sum(sum);
  if (threadIdx.x % 16 == 0 && e < E) scores[t * E + e] = sigmoid(sum);
}

// What the CPU needs for the experts that are not here, into its own memory: h [T][D], ids and weights [T · A].
KERNEL fetch(const float* h, const int* ids, const float* weights, int T, int D, int A, float* to_h, int* to_ids,
             float* to_weights) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < T * D; i += gridDim.x * blockDim.x) {
    to_h[i] = h[i];
    if (i >= T * A) continue;
    to_ids[i] = ids[i];
    to_weights[i] = weights[i];
  }
}

// Jobs [E] from the chosen ids, those without slots last; an expert's slots are listed in ascending order. One block, in
// which a thread has a share of the slots for one expert. Shared: blockDim + E + n words.
DEVICE void deal_slots(const int* ids, int n, int E, const u64* experts, Job* jobs, int* slots, int* shared) {
  const int parts = blockDim.x / E, part = threadIdx.x / E, e = threadIdx.x % E;
  int *count = shared, *total = count + blockDim.x, *held = total + E;
  for (int i = threadIdx.x; i < n; i += blockDim.x) held[i] = ids[i];
  __syncthreads();
  const int share = ceil_div(n, parts), first = part * share, last = least(first + share, n);
  if (part < parts) {
    int own = 0;
    if (experts[e])
      for (int slot = first; slot < last; ++slot) own += held[slot] == e;
    count[threadIdx.x] = own;
  }
  __syncthreads();
  if (part == 0) {
    int all = 0;
    for (int p = 0; p < parts; ++p) all += count[p * E + e];
    total[e] = all;
  }
  __syncthreads();
  if (part >= parts) return;
  int busy = 0, before = 0, at = 0;
#pragma unroll 16
  for (int i = 0; i < E; ++i) {
    const int n_own = total[i];
    busy += n_own > 0;
    before += i < e && n_own > 0;
    at += i < e ? n_own : 0;
  }
  if (part == 0) {
    if (total[e]) jobs[before] = {e, at, total[e]};
    else jobs[busy + e - before] = {0, 0, 0};
  }
  if (count[threadIdx.x] == 0) return;
  for (int p = 0; p < part; ++p) at += count[p * E + e];
  for (int slot = first; slot < last; ++slot)
    if (held[slot] == e) slots[at++] = slot;
}

// The A largest of score + bias of every token, ties to the lower index, listed by index. A block takes as many tokens at
// once as it has threads for; one block alone deals the slots out too, for more `deal` does. Shared: 3 · blockDim words,
// or what dealing takes.
KERNEL choose(const float* scores, const float* bias, int T, int E, int A, float scale, const u64* experts, int* ids,
              float* weights, Job* jobs, int* slots) {
  float *biased = shared_floats(), *score = biased + blockDim.x;
  int* chosen = reinterpret_cast<int*>(score + blockDim.x);
  const int at_once = blockDim.x / E, place = threadIdx.x / E, e = threadIdx.x % E, row = place * E;
  for (int first = blockIdx.x * at_once; first < T; first += gridDim.x * at_once) {
    const int t = first + place;
    const bool mine = place < at_once && t < T;
    if (mine) {
      score[threadIdx.x] = scores[static_cast<size_t>(t) * E + e];
      biased[threadIdx.x] = score[threadIdx.x] + bias[e];
    }
    __syncthreads();
    if (mine) {
      int better = 0;
      const float own = biased[threadIdx.x];
#pragma unroll 16
      for (int i = 0; i < E; ++i) {
        const float other = biased[row + i];
        better += other > own || (other == own && i < e);
      }
      chosen[threadIdx.x] = better < A;
    }
    __syncthreads();
    const bool acts = mine && chosen[threadIdx.x];
    int before = 0;
    if (acts) {
#pragma unroll 16
      for (int i = 0; i < e; ++i) before += chosen[row + i];
      biased[row + before] = score[threadIdx.x];  // those of the chosen, in order
      ids[t * A + before] = e;
    }
    __syncthreads();
    if (acts) {
      float sum = 0.0f;
      for (int a = 0; a < A; ++a) sum = sum + biased[row + a];
      weights[t * A + before] = score[threadIdx.x] / (sum + 1e-20f) * scale;
    }
    __syncthreads();
  }
  if (gridDim.x == 1) deal_slots(ids, T * A, E, experts, jobs, slots, reinterpret_cast<int*>(shared_memory));
}
KERNEL deal(const int* ids, int n, int E, const u64* experts, Job* jobs, int* slots) {
  deal_slots(ids, n, E, experts, jobs, slots, reinterpret_cast<int*>(shared_memory));
}

DEVICE int run_bytes(int form) {
  return form == kQ4B ? Q4B::bytes : form == kQ3B ? Q3B::bytes : form == kQ4 ? Q4::bytes : Q8::bytes;
}
DEVICE size_t down_at(int form, int F, int D) {  // where down begins in an MLP's run
  return static_cast<size_t>(2 * (F / kRows)) * (D / kGroup) * run_bytes(form);
}
DEVICE const u8* expert_run(const Mlps& m, int expert) { return reinterpret_cast<const u8*>(m.experts[expert]); }

// Chosen field by field, so that neither has to lie in memory.
DEVICE Rows one_of(bool first, const Rows& a, const Rows& b) {
  return {first ? a.q : b.q, first ? a.scale : b.scale, first ? a.sum : b.sum, first ? a.groups : b.groups};
}

// silu(gate) · up of 32 hidden channels (a tile: 64), quantized. The grid: tiles of NT tokens, which come first so that
// those of one expert find its weights in the second cache; blocks of each of n_jobs jobs, then the shared MLP's. x: rows
// of tokens; hidden: rows of slots; shared_hidden: rows of tokens.
template <int NT>
DEVICE void gate_up(const Mlps& m, const Job* jobs, const int* slots, int n_jobs, const Rows& x, int T,
                    const Rows& hidden, const Rows& shared_hidden) {
  constexpr int most = NT == kTile ? kTall / 4 : 1;
  const int wide = ceil_div(m.F / kGroup, most), j = least(n_jobs, n_jobs ? blockIdx.y / wide : 0);
  const bool is_shared = j == n_jobs;
  const Job job = is_shared ? Job{0, 0, T} : jobs[j];
  const int first = blockIdx.x * NT;
  if (first >= job.count) return;
  const int g = (blockIdx.y - j * wide) * most, groups = least(most, (is_shared ? m.shared_F : m.F) / kGroup - g);
  const int form = is_shared ? m.shared_form : m.form, stride = m.D / kGroup * run_bytes(form);
  const u8* blocks = (is_shared ? m.shared : expert_run(m, job.expert)) + static_cast<size_t>(4 * g) * stride;
  const int n = least(NT, job.count - first), base = job.first + first;
  const auto token = [=](int t) { return is_shared ? base + t : slots[base + t] / m.A; };
  const float* out = multiply<NT>(form, blocks, stride, 4 * groups, x, n, token);  // gate, up, gate, up: 16 rows each
#pragma unroll(NT == kTile ? 4 : 1)
  for (int i = warp(); i < groups * n; i += warps()) {
    const int t = i / groups, b = i % groups * 4 + lane() / kRows * 2, row = lane() % kRows;
    const float gate = out[(b * NT + t) * kRows + row], up = out[((b + 1) * NT + t) * kRows + row];
    const float v = gate * sigmoid(gate) * up;
    if (is_shared) quantize(v, shared_hidden, base + t, g + i % groups);
    else quantize(v, hidden, slots[base + t], g + i % groups);
  }
}
KERNEL_OF_ONE gate_up_1(Mlps m, const Job* jobs, const int* slots, int n_jobs, Rows x, int T, Rows hidden,
                 Rows shared_hidden) {
  gate_up<1>(m, jobs, slots, n_jobs, x, T, hidden, shared_hidden);
}
KERNEL_OF_EIGHT gate_up_8(Mlps m, const Job* jobs, const int* slots, int n_jobs, Rows x, int T, Rows hidden,
                          Rows shared_hidden) {
  gate_up<8>(m, jobs, slots, n_jobs, x, T, hidden, shared_hidden);
}
KERNEL_OF_TILES gate_up_32(Mlps m, const Job* jobs, const int* slots, int n_jobs, Rows x, int T, Rows hidden,
                           Rows shared_hidden) {
  gate_up<32>(m, jobs, slots, n_jobs, x, T, hidden, shared_hidden);
}

// For a few tokens: x += the whole sum. A block has 16 rows of token blockIdx.y and all its experts; their chunks are
// dealt out like the chunks of one long product. missing [T · A][D]: outputs of experts that lie
// elsewhere. shared [T][D]: the shared MLP's outputs, if it ran elsewhere; then its width here is 0. Shared memory: 16
// floats a chunk, and A weights and marks of who is here.
KERNEL_OF_ONE down(Mlps m, const int* ids, const float* weights, Rows hidden, Rows shared_hidden, const float* missing,
                   const float* shared, float* x) {
  const int b = blockIdx.x, t = blockIdx.y;
  const int chunks = ceil_div(m.F / kGroup, kChunk), shared_chunks = ceil_div(m.shared_F / kGroup, kChunk);
  const int routed = m.A * chunks;
  float *parts = shared_floats(), *weight = parts + (routed + shared_chunks) * kRows;
  int* here = reinterpret_cast<int*>(weight + m.A);
  for (int i = threadIdx.x; i < (routed + shared_chunks) * 4; i += blockDim.x) {
    const int quad = i % 4, item = i / 4;
    const bool is_shared = item >= routed;
    const int slot = is_shared ? 0 : t * m.A + item / chunks;
    const u8* run = is_shared ? m.shared : expert_run(m, ids[slot]);
    if (!run) continue;
    const Rows in = one_of(is_shared, shared_hidden, hidden);
    const int form = is_shared ? m.shared_form : m.form, F = is_shared ? m.shared_F : m.F;
    const int row[1] = {is_shared ? t : slot};
    float total[1][4];
    const u8* block = run + down_at(form, F, m.D) + static_cast<size_t>(b) * (F / kGroup) * run_bytes(form);
    chunk_total<1>(form, block, in, row, is_shared ? item - routed : item % chunks, quad, total);
#pragma unroll
    for (int r = 0; r < 4; ++r) parts[item * kRows + 4 * quad + r] = total[0][r];
  }
  for (int i = threadIdx.x; i < m.A * kRows; i += blockDim.x) {
    const int a = i / kRows, slot = t * m.A + a;
    weight[a] = weights[slot];
    here[a] = expert_run(m, ids[slot]) != nullptr;
    if (!here[a]) parts[a * chunks * kRows + i % kRows] = missing[static_cast<size_t>(slot) * m.D + b * kRows + i % kRows];
  }
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  const int row = b * kRows + threadIdx.x;
  float sum = 0.0f;
  for (int a = 0; a < m.A; ++a) {
    const float* of_chunk = parts + a * chunks * kRows + threadIdx.x;
    float part = 0.0f;
    if (here[a])
#pragma unroll 8
      for (int c = 0; c < chunks; ++c) part = part + of_chunk[c * kRows];
    else
      part = *of_chunk;
    sum = fmaf(weight[a], part, sum);
  }
  float* at = x + static_cast<size_t>(t) * m.D + row;
  float part = shared ? shared[static_cast<size_t>(t) * m.D + row] : 0.0f;
  for (int c = 0; c < shared_chunks; ++c) part = part + parts[(routed + c) * kRows + threadIdx.x];
  sum = fmaf(1.0f, part, sum);
  *at = *at + sum;
}

// For many tokens, expert by expert, so that each is read once: outputs [T · A][D] of the slots, then [T][D] of the
// shared MLP, unless it ran elsewhere. The grid: tiles of NT tokens, row blocks of D, jobs and the shared MLP.
template <int NT>
DEVICE void down_jobs(const Mlps& m, const Job* jobs, const int* slots, const Rows& hidden, const Rows& shared_hidden,
                      int T, float* outputs) {
  const int n_jobs = gridDim.z - 1, b = blockIdx.y * tall<NT>();
  const bool is_shared = static_cast<int>(blockIdx.z) == n_jobs;
  const Job job = is_shared ? Job{0, 0, m.shared_F ? T : 0} : jobs[blockIdx.z];
  const int base = job.first + blockIdx.x * NT, n = least(NT, job.first + job.count - base);
  if (n <= 0) return;
  const int count = least(tall<NT>(), m.D / kRows - b);
  const int form = is_shared ? m.shared_form : m.form, F = is_shared ? m.shared_F : m.F;
  const int stride = F / kGroup * run_bytes(form);
  const u8* run = is_shared ? m.shared : expert_run(m, job.expert);
  const u8* blocks = run + down_at(form, F, m.D) + static_cast<size_t>(b) * stride;
  const Rows in = one_of(is_shared, shared_hidden, hidden);
  const float* out = multiply<NT>(form, blocks, stride, count, in, n, [=](int t) {
    return is_shared ? base + t : slots[base + t];
  });
  for (int i = threadIdx.x; i < count * NT * kRows; i += blockDim.x) {
    const int t = i / kRows % NT, row = (b + i / (NT * kRows)) * kRows + i % kRows;
    if (t >= n) continue;
    const size_t to = is_shared ? T * m.A + base + t : slots[base + t];
    outputs[to * m.D + row] = out[i];
  }
}
KERNEL_OF_EIGHT down_jobs_8(Mlps m, const Job* jobs, const int* slots, Rows hidden, Rows shared_hidden, int T,
                       float* outputs) {
  down_jobs<8>(m, jobs, slots, hidden, shared_hidden, T, outputs);
}
KERNEL_OF_TILES down_jobs_32(Mlps m, const Job* jobs, const int* slots, Rows hidden, Rows shared_hidden, int T,
                        float* outputs) {
  down_jobs<32>(m, jobs, slots, hidden, shared_hidden, T, outputs);
}

// x [T][D] += the sum over the chosen experts in order of index, then the shared MLP.
KERNEL combine(Mlps m, const int* ids, const float* weights, const float* outputs, const float* missing,
               int T, float* x) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
  if (k >= m.D) return;
  float sum = 0.0f;
  for (int a = 0; a < m.A; ++a) {
    const size_t slot = static_cast<size_t>(t) * m.A + a;
    const bool here = expert_run(m, ids[slot]);
    const float part = (here ? outputs : missing)[slot * m.D + k];
    sum = fmaf(weights[slot], part, sum);
  }
  sum = fmaf(1.0f, outputs[(static_cast<size_t>(T) * m.A + t) * m.D + k], sum);
  float* at = x + static_cast<size_t>(t) * m.D + k;
  *at = *at + sum;
}
