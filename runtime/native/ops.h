// Products, mixtures of experts and attention over whole arrays: cuts the work into tasks for the pool.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "blocks.h"
#include "kernels.h"
#include "pool.h"

namespace kimi {

// One matrix [rows, columns], where it lies. Packed layouts: `stride` bytes from row block to row block.
struct Weights {
  const Block* block;
  const uint8_t* data;
  size_t stride;
  int rows, columns;
};

struct Mlp {                      // gate and up [F, D], down [D, F], for each expert
  std::vector<Weights> gate, up, down;
};

extern const Kernels* chosen;     // null until one is asked for
const Kernels& choose_kernels();
inline const Kernels& kernels() { return chosen ? *chosen : choose_kernels(); }  // those in use
void use_kernels(const char* name);  // throws std::invalid_argument
std::vector<const char*> usable_kernels();  // best first
Pool& pool();
void set_threads(int n);

// Calls task(t) for T tokens; the pool takes part if they are worth it.
template <typename Task>
void each_token(int T, const Task& task) {
  if (T < 4) for (int t = 0; t < T; ++t) task(t);
  else pool().run(T, [&](int t, int) { task(t); });
}

// Memory that is kept between calls and only ever grows; never cleared.
template <typename T>
class Buffer {
 public:
  T* get(size_t n) {
    if (n > size_) {
      data_.reset();  // the old block is gone before the new one comes
      data_.reset(new T[n]);
      size_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  size_t size_ = 0;
};

inline int tile_width(int n, int first) { return kernels().tile_width(n - first); }  // of the tile that begins with token `first`
inline size_t token_bytes(int columns) { return static_cast<size_t>(columns) / kGroup * kTokenGroup; }

struct Product {                  // y (+)= w x; `stride` floats from one token's y to the next
  const Weights* w;
  float* y;
  size_t stride;
  bool add;
};
// Several matrices that read the same rows x, x_stride floats apart, as one call of the pool.
void products(const std::vector<Product>& all, const float* x, size_t x_stride, int T);
void linear(const Weights& w, const float* x, int T, float* y);                         // [T][I] -> [T][O]
void linear_heads(const std::vector<Weights>& w, const float* x, int T, float* y);      // [T][H][I] -> [T][H][O]
void embed(const Weights& w, const int32_t* ids, int T, float* y);  // rows, dequantized; q4g32, q8g32 or a ggml type
void pack(const Weights& w, uint8_t* out);  // a ggml matrix in its packed layout
void rms_norm(const float* x, const float* weight, int T, int D, float eps, float* y);
// Sigmoid scores of x [T][D] against router [E][D]; the A largest of score + bias, ties to the lower index, listed by
// index; weights are their unbiased scores over their sum, times scale.
void route(const float* x, const float* router, const float* bias, int T, int D, int E, int A, float scale,
           int32_t* ids, float* weights);
// y += sum over the chosen experts, in order of index, of weight * expert(x), plus shared(x) if there is one. The sum is
// complete before it is added to y.
void mixture(const Mlp& routed, const int32_t* ids, const float* weights, int A, const Mlp* shared, const float* x,
             int T, int D, float* y);
// The two parts that a mixture falls into where its experts lie apart: y[i] = expert experts[i] of x[tokens[i]], for
// n_slots of them; and x[t] += sum over A outputs of token t, in order, of weight * output, plus shared[t].
void expert_outputs(const Mlp& mlp, const int32_t* experts, const int32_t* tokens, int n_slots, const float* x, int T,
                    int D, float* y);
void combine(const float* outputs, const float* weights, int A, const float* shared, int T, int D, float* x);
// The latent cache of one layer, in the packed layout q8g32: `rows` has a row for each position, its latent of C
// channels and its rotated key of R (padded to whole groups); `columns` has a row for each channel of the latent, its
// columns being positions, of which whole groups of 32 are stored.
struct LatentCache {
  uint8_t *rows, *columns;
  int context, C, R;
  int row_groups() const { return C / kGroup + (R + kGroup - 1) / kGroup; }
  size_t rows_stride() const { return static_cast<size_t>(row_groups()) * kQ8Run; }  // from 16 positions to the next
  size_t columns_stride() const { return static_cast<size_t>((context + kGroup - 1) / kGroup) * kQ8Run; }
};
// Stores T positions from `start` on; row t is the latent and the rotated key, one after the other.
void remember(const LatentCache& cache, const float* latent_and_key, int T, int start);
// The columns of those whole groups of 32 positions that first..end completes, from the rows.
void turn_columns(const LatentCache& cache, int first, int end);

struct Heads {                    // rows of all tokens' heads: floats from token to token, and from head to head
  const float* x;
  size_t token, head;
  const float* at(int t, int h) const { return x + t * token + h * head; }
  Heads from(int t, int h) const { return {at(t, h), token, head}; }
};

// Absorbed attention: token t stands at start + t and sees the positions up to itself. q [T][H][C], qr: rows of R. Of up to kTile
// tokens, absorb(h) is called before head h of q is read, by the thread that reads it.
using Absorb = std::function<void(int h)>;
void attention(const LatentCache& cache, const Absorb& absorb, const float* q, const Heads& qr, int start, int T, int H, float scale,
               float* u);

// The same in the expanded form, with a head's own keys and values; o [T][H][V]. Queries are asked for as they are needed, for at
// most kPart tokens and a few heads together, and need not outlive the next question.
struct Queries { Heads q, qr; };  // rows of N and, rotated, of R
using Asking = std::function<Queries(int first, int n, int head, int n_heads)>;
void expanded_attention(const LatentCache& cache, const std::vector<Weights>& k_b, const std::vector<Weights>& v_b, const Asking& ask,
                        int start, int T, float scale, float* o);

// Many tokens go through a layer in parts: what lies between its products is kept for so many, and at full size each expert meets
// about 96 of them. Only keys and values are made for all at once.
constexpr int kPart = 1024;
extern void (*between_parts)();   // hears of every part but the first, on the calling thread; may throw, and all that was begun is let go
// Calls part(first, n) for T tokens, for as few parts as can be, all about as long.
template <typename Part>
void in_parts(int T, const Part& part) {
  for (int first = 0, n; first < T; first += n) {
    const int left = T - first, n_parts = (left + kPart - 1) / kPart;
    if (first) between_parts();
    part(first, n = (left + n_parts - 1) / n_parts);
  }
}

// The two halves of a layer, each adding to the residual stream x [T][D] in place. docs/architecture.md has the steps.
struct AttentionLayer {
  const float *norm, *kv_norm;    // [D], [C]
  float eps, kv_eps, scale;       // scale: of the softmax
  Weights q, kv_a, o;             // [H (N + R), D], [C + R, D], [D, H V]
  std::vector<Weights> k_b, v_b;  // H of [C, N]; H of [V, C]
};
// Remembers T tokens from `start` on; attention is absorbed or expanded, and of the last `asking` of them. cos, sin: [T][R / 2].
void attention_layer(const AttentionLayer& layer, float* x, int T, const float* cos, const float* sin,
                     const LatentCache& cache, int start, bool expanded, int asking);

struct FeedForwardLayer {
  const float* norm;              // [D]
  float eps;
  const float *router, *bias;     // [E, D], [E]; null in a dense layer
  int active;
  float scale;                    // of the routed experts' weights
  Mlp routed, shared;
  int64_t* used;                  // [E] or null: how often each expert was chosen for a token that came alone
};
void feed_forward_layer(const FeedForwardLayer& layer, float* x, int T, bool counts);  // counts: in `used`

struct Layer {
  const AttentionLayer* attention;
  const FeedForwardLayer* feed_forward;
  const LatentCache* cache;
};
struct Layers { std::vector<Layer> all; };
// Layers first..end. Of the model's last one, only what it gives for the last `asking` tokens is read, so only its cache hears of others.
void run_layers(const Layers& layers, int first, int end, float* x, int T, const float* cos, const float* sin, int start, bool expanded,
                int asking);
}  // namespace kimi
