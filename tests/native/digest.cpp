// Runs every kernel of every instruction set of this machine on the same numbers and prints a digest of each result, one
// line a kernel: `name digest`. Built for another processor and run under an emulator, it must print the same digests.
//
//   c++ -O2 -std=c++20 -ffp-contract=off -I runtime/native tests/native/digest.cpp kernels of that processor
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace kimi;

namespace {
uint64_t state = 1;
uint32_t draw() {  // a linear congruential generator's upper half: the same numbers everywhere
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}
float draw_float() { return static_cast<float>(static_cast<int32_t>(draw())) * 0x1p-30f; }

uint64_t digest(const void* data, size_t n) {
  uint64_t h = 14695981039346656037u;
  for (size_t i = 0; i < n; ++i) h = (h ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return h;
}
void say(const Kernels& k, const char* what, const void* data, size_t n) {
  std::printf("%s %s %016llx\n", k.name, what, static_cast<unsigned long long>(digest(data, n)));
}

void run(const Kernels& k) {
  if (!k.runs_here()) {
    std::printf("%s does not run here\n", k.name);
    return;
  }
  state = 1;
  constexpr int G = 24, I = G * kGroup, W = 8;
  std::vector<float> x(W * I), y(W * I);
  for (float& v : x) v = draw_float();
  std::vector<uint8_t> weights(G * sizeof(PanelRun));
  const char* names[] = {"q4g32", "q8g32", "q5g32", "i4g32", "q4k", "q6k", "panel", "panel_halves", "panel_offsets"};
  for (int form = 0; form < static_cast<int>(Form::count); ++form)
    for (int width : {1, 2, 4, 8}) {
      std::vector<uint8_t> tile(static_cast<size_t>(width) * G * kTokenGroup);
      for (int t = 0; t < width; ++t) k.quantize(x.data() + t * I, G, tile.data(), width, t);
      for (uint8_t& b : weights) b = static_cast<uint8_t>(draw());
      if (form >= static_cast<int>(Form::panel)) {
        for (int g = 0; g < G; ++g) {
          PanelRun run;
          std::memcpy(run.q, weights.data() + g * sizeof run, sizeof run.q);
          for (int8_t& q : run.q) q = q == -128 ? int8_t{-127} : q;
          for (int r = 0; r < kRows; ++r) run.scale[0][r] = run.scale[1][r] = draw_float(), run.offset[r] = draw_float();
          std::memcpy(weights.data() + g * sizeof run, &run, sizeof run);
        }
      } else {
        for (uint8_t& b : weights) b &= 0x3b;  // float16 scales stay finite, whatever bytes they are
      }
      float out[8 * kRows];
      k.block[form](weights.data(), tile.data(), G, width, out, kRows);
      char name[40];
      std::snprintf(name, sizeof name, "%s x%d", names[form], width);
      say(k, name, out, sizeof(float) * width * kRows);
    }
  std::vector<uint8_t> tile(static_cast<size_t>(W) * G * kTokenGroup);
  for (int t = 0; t < W; ++t) k.quantize(x.data() + t * I, G, tile.data(), W, t);
  say(k, "quantize", tile.data(), tile.size());
  const float d = k.dot(x.data(), x.data() + I, I);
  say(k, "dot", &d, sizeof d);
  std::vector<uint16_t> halves(I);
  for (uint16_t& h : halves) h = static_cast<uint16_t>(draw() & 0xfbff);
  k.half_to_float(halves.data(), I, y.data());
  say(k, "half_to_float", y.data(), 4 * I);
  k.rms_norm(x.data(), x.data() + I, I, 1e-5f, y.data());
  say(k, "rms_norm", y.data(), 4 * I);
  k.silu_mul(x.data(), x.data() + I, I, y.data());
  say(k, "silu_mul", y.data(), 4 * I);
  k.sigmoid(x.data(), I, y.data());
  say(k, "sigmoid", y.data(), 4 * I);
  k.axpy(0.7f, x.data(), I, y.data());
  say(k, "axpy", y.data(), 4 * I);
  k.residual(x.data(), tile.data(), W, 0, y.data());
  say(k, "residual", y.data(), 4 * kGroup);
  std::vector<float> s(x.begin(), x.begin() + 128);
  const float total = k.softmax(s.data(), 101, 3.0f);
  say(k, "softmax", s.data(), 4 * s.size());
  say(k, "softmax total", &total, sizeof total);
  constexpr int groups = 3;
  std::vector<uint8_t> rows(4 * groups * kQ8Run), turned(4 * kQ8Run);
  for (int r = 0; r < 61; ++r) k.store_row(x.data() + r * 64, groups, rows.data() + r / kRows * groups * kQ8Run, r % kRows);
  say(k, "store_row", rows.data(), rows.size());
  k.turn_rows(rows.data(), groups * kQ8Run, 32, 29, 64, turned.data(), kQ8Run);
  say(k, "turn_rows", turned.data(), turned.size());
}
}  // namespace

int main() {
  run(kScalar);
#if defined(__x86_64__)
  run(kAvx2);
  run(kAvxVnni);
  run(kAvx512Vnni256);
  run(kAvx512Vnni);
#elif defined(__aarch64__)
  run(kNeon);
#endif
}
