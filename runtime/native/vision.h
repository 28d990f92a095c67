// The image tower's own steps: layer norm, the two GELUs, packing of q, k and v, and attention of all patches to all.
//
// Attention runs on 16-bit integers, whose sums are exact: every instruction set gives the same bits.
//
//   q, k     13 bits with sign, one scale a row and head: |q k'| over K <= 128 channels stays below 2^31
//   weights  exp(score - top of the block) in 15 bits; v in 10 bits with sign, one scale for each channel of a block of
//            128 keys: 32767 * 511 * 128 < 2^31
//   blocks   each has a top of its own, so a weight is rounded by at most 1/65534 of the largest in its block; blocks
//            meet in float32 as in any online softmax
//
// vision_inl.h holds each kernel once over the vector of sixteen floats, as kernels_inl.h does; vision_<isa>.cpp
// compile it. Nothing here knows the model.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kimi {

constexpr int kKeys = 128;      // keys of a block
constexpr int kQueries = 24;    // queries that pass over the keys together
constexpr int kMaxHead = 128;   // channels of a head
constexpr int kQkLimit = 4095, kVLimit = 511, kWeightLimit = 32767;
static_assert(static_cast<int64_t>(kQkLimit) * kQkLimit * kMaxHead < (1LL << 31), "a score fits in int32");
static_assert(static_cast<int64_t>(kVLimit) * kWeightLimit * kKeys < (1LL << 31), "a weighted sum fits in int32");

// One picture's q, k and v of one layer. N patches, H heads of K channels; Np is N in whole blocks, Kp K in vectors.
struct Patches {
  int N, H, K, Np, Kp;
  int16_t* q;      // [H][N][K]
  int16_t* k;      // [H][Np/16][K/2][16 keys][2 channels]
  int16_t* v;      // [H][Np/2][Kp][2 keys]
  float* q_scale;  // [H][N], with log2(e) / sqrt(K)
  float* k_scale;  // [H][Np]
  float* v_scale;  // [H][Np/128][Kp]
};

struct VisionKernels {
  const char* name;
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);
  void (*gelu)(const float* x, const float* bias, int n, bool exact, float* out);
  void (*add)(const float* y, const float* bias, int n, float* x);  // x += y + bias
  // Rows first..first+n-1 of one head: n <= 128, first a multiple of 128. qkv is [n] rows of [3][H][K], `stride` apart.
  void (*place)(Patches& patches, int head, int first, int n, const float* qkv, size_t stride, const float* bias,
                const float* cos, const float* sin);
  // Queries first..first+n-1 of one head, n <= 24; out[i * stride + channel].
  void (*attend)(const Patches& patches, int head, int first, int n, float* out, size_t stride);
};
extern const VisionKernels kVisionScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const VisionKernels kVisionAvx2, kVisionAvx512Vnni;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const VisionKernels kVisionNeon;
#endif

}  // namespace kimi
