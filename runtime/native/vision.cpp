#include "vision_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"

namespace kimi {
namespace {

// The widest table that the instruction set in use allows: those between the two names here have AVX2.
const VisionKernels& table() {
#if defined(__x86_64__) || defined(_M_X64)
  if (&kernels() == &kAvx512Vnni || &kernels() == &kZen4) return kVisionAvx512Vnni;
  if (std::strcmp(kernels().name, kVisionScalar.name) != 0) return kVisionAvx2;
#elif defined(__aarch64__) || defined(_M_ARM64)
  if (std::strcmp(kernels().name, kVisionNeon.name) == 0) return kVisionNeon;
#endif
  return kVisionScalar;
}

// float32 to float16, nearest even; values are finite and at least 0.
uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bits < 0x38800000u) {  // below 2^-14 a float16 counts steps of 2^-24
    return static_cast<uint16_t>(std::nearbyintf(x * 0x1p24f));
  }
  bits -= 0x38000000u;  // the exponent's bias: 127 - 15
  return static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1)) >> 13);
}

template <typename F>
void rows(int T, const F& task) {  // a few rows a task, so that handing out costs little
  constexpr int kStep = 8;
  pool().run((T + kStep - 1) / kStep, [&](int i, int) {
    for (int t = i * kStep; t < std::min(T, (i + 1) * kStep); ++t) task(static_cast<size_t>(t));
  });
}

}  // namespace

PatchStore::PatchStore(int N, int H, int K) {
  const size_t heads = static_cast<size_t>(H), Np = (N + kKeys - 1) / kKeys * kKeys, Kp = (K + 15) / 16 * 16;
  q_.resize(heads * N * K);
  k_.resize(heads * Np * K);
  v_.resize(heads * Np * Kp);
  q_scale_.resize(heads * N);
  k_scale_.resize(heads * Np);
  v_scale_.resize(heads * (Np / kKeys) * Kp);
  view = {N, H, K, static_cast<int>(Np), static_cast<int>(Kp), q_.data(), k_.data(), v_.data(), q_scale_.data(), k_scale_.data(), v_scale_.data()};
}

void pack_q8(const float* w, int n_rows, int columns, uint8_t* out) {
  const int G = (columns + kGroup - 1) / kGroup;
  pool().run((n_rows + kRows - 1) / kRows, [&](int b, int) {
    for (int g = 0; g < G; ++g) {
      uint8_t* run = out + (static_cast<size_t>(b) * G + g) * kQ8Run;
      std::memset(run, 0, kQ8Run);
      const int width = std::min(kGroup, columns - g * kGroup);
      for (int r = 0; r < std::min(kRows, n_rows - b * kRows); ++r) {
        const float* x = w + (static_cast<size_t>(b) * kRows + r) * columns + g * kGroup;
        float most = 0.0f;
        for (int k = 0; k < width; ++k) most = std::max(most, std::fabs(x[k]));
        alignas(64) uint16_t half[kRows] = {half_of(most / 127.0f)};
        float step[kRows];
        kernels().half_to_float(half, kRows, step);
        const float inverse = step[0] != 0 ? 1.0f / step[0] : 0.0f;
        for (int k = 0; k < width; ++k) {
          const float q = std::min(127.0f, std::max(-127.0f, std::nearbyintf(x[k] * inverse)));
          run[64 * (k / 4) + 4 * r + k % 4] = static_cast<uint8_t>(static_cast<int8_t>(q));
        }
        std::memcpy(run + 512 + 2 * r, half, 2);
      }
    }
  });
}

void norm_rows(const float* x, const float* weight, const float* bias, int T, int W, float eps, float* out, int stride) {
  rows(T, [&](size_t t) {
    float* to = out + t * stride;
    table().layer_norm(x + t * W, weight, bias, W, eps, to);
    std::fill(to + W, to + stride, 0.0f);
  });
}

void gelu_rows(const float* x, const float* bias, int T, int F, bool exact, float* out, int stride) {
  rows(T, [&](size_t t) {
    float* to = out + t * stride;
    table().gelu(x + t * F, bias, F, exact, to);
    std::fill(to + F, to + stride, 0.0f);
  });
}

void add_rows(const float* y, const float* bias, int T, int W, float* x) {
  rows(T, [&](size_t t) { table().add(y + t * W, bias, W, x + t * W); });
}

void place_patches(Patches& patches, const float* qkv, const float* bias, const float* cos, const float* sin, int first, int T) {
  const int blocks = (T + kKeys - 1) / kKeys;
  const size_t stride = 3 * static_cast<size_t>(patches.H) * patches.K;
  pool().run(patches.H * blocks, [&](int i, int) {
    const int head = i % patches.H, at = i / patches.H * kKeys;
    const size_t angle = static_cast<size_t>(at) * (patches.K / 2);
    table().place(patches, head, first + at, std::min(kKeys, T - at), qkv + at * stride, stride, bias, cos + angle, sin + angle);
  });
}

void attend_patches(const Patches& patches, int first, int T, float* out, int stride) {
  const int tiles = (T + kQueries - 1) / kQueries, W = patches.H * patches.K;
  // Head by head, so that the tasks at work share one head's keys and values.
  pool().run(patches.H * tiles, [&](int i, int) {
    const int head = i / tiles, at = i % tiles * kQueries;
    float* to = out + static_cast<size_t>(at) * stride;
    const int n = std::min(kQueries, T - at);
    table().attend(patches, head, first + at, n, to + head * patches.K, stride);
    if (head == 0)
      for (int t = 0; t < n; ++t) std::fill(to + static_cast<size_t>(t) * stride + W, to + static_cast<size_t>(t + 1) * stride, 0.0f);
  });
}

}  // namespace kimi
