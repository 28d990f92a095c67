// The image tower's steps over whole arrays: cuts the work into tasks for the pool.
#pragma once
#include <vector>

#include "vision.h"

namespace kimi {

class PatchStore {  // owns what a Patches points to
 public:
  PatchStore(int N, int H, int K);
  PatchStore(const PatchStore&) = delete;
  Patches view;

 private:
  std::vector<int16_t> q_, k_, v_;
  std::vector<float> q_scale_, k_scale_, v_scale_;
};

// Float rows to q8g32, the columns padded with zeros: what quantize's encoder gives, in parallel.
void pack_q8(const float* w, int rows, int columns, uint8_t* out);
void norm_rows(const float* x, const float* weight, const float* bias, int T, int W, float eps, float* out, int stride);
void gelu_rows(const float* x, const float* bias, int T, int F, bool exact, float* out, int stride);
void add_rows(const float* y, const float* bias, int T, int W, float* x);
void place_patches(Patches& patches, const float* qkv, const float* bias, const float* cos, const float* sin, int first, int T);
void attend_patches(const Patches& patches, int first, int T, float* out, int stride);
}  // namespace kimi
