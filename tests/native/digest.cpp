// Runs every kernel of every instruction set of this machine on the same numbers and prints a digest of each result, one
// line a kernel: `name kernel digest`, where the image tower's names begin with `tower:`. Built for another processor and
// run under an emulator, it must print the same digests.
//
//   c++ -O2 -std=c++20 -ffp-contract=off -I runtime/native tests/native/digest.cpp kernels of that processor
//
// On x86, vpdpbusd.cpp goes with it, so that AVX-VNNI's kernels run on every processor with AVX2.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include <unistd.h>

#include "kernels.h"
#include "vision.h"

using namespace kimi;

void execute_vpdpbusd();  // vpdpbusd.cpp

// For another processor, arm_start.cpp is then all of C's and C++'s libraries.
void* operator new(size_t n) { return std::malloc(n); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

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
void print(std::initializer_list<const char*> texts) {  // printf would be more than arm_start.cpp has
  for (const char* text : texts)
    if (write(1, text, std::strlen(text)) < 0) __builtin_trap();
}
void say(std::initializer_list<const char*> name, const void* data, size_t n) {
  char hex[17] = {};
  for (uint64_t h = digest(data, n), i = 16; i-- > 0; h >>= 4) hex[i] = "0123456789abcdef"[h & 15];
  print(name);
  print({" ", hex, "\n"});
}
void say(const Kernels& k, const char* what, const void* data, size_t n, const char* which = "") {
  say({k.name, " ", what, which}, data, n);
}
template <typename T>
void say(const VisionKernels& k, const char* what, const std::vector<T>& data) {
  say({"tower:", k.name, " ", what}, data.data(), sizeof(T) * data.size());
}

void run(const Kernels& k, bool emulated = false) {
  if (!emulated && !k.runs_here()) {
    print({k.name, " does not run here\n"});
    return;
  }
  state = 1;
  constexpr int G = 24, I = G * kGroup, W = 8;
  std::vector<float> x(W * I), y(W * I);
  for (float& v : x) v = draw_float();
  std::vector<uint8_t> weights(G * sizeof(PanelRun));
  const char* names[] = {"q4g32", "q4b32", "q3b32", "q8g32", "q5g32", "i4g32", "q4k", "q6k", "panel", "panel_halves", "panel_offsets", "q8g32_positive"};
  for (int form = 0; form < static_cast<int>(Form::count); ++form)
    for (int n_tokens = 1; n_tokens <= 8; ++n_tokens) {
      std::vector<uint8_t> tiles(static_cast<size_t>(n_tokens) * G * kTokenGroup);
      const bool positive = form == static_cast<int>(Form::q8g32_positive);
      std::copy(x.begin(), x.end(), y.begin());
      if (positive) for (float& v : y) v = std::abs(v);
      const auto each_tile = [&](auto call) {  // one, or several where there are none so wide
        for (int first = 0, width; first < n_tokens; first += width)
          width = k.tile_width(n_tokens - first), call(first, width, tiles.data() + static_cast<size_t>(first) * G * kTokenGroup);
      };
      each_tile([&](int first, int width, uint8_t* tile) {
        k.quantize(y.data() + first * I, I, width, G, {tile, width}, 0);
      });
      for (uint8_t& b : weights) b = static_cast<uint8_t>(draw());
      if (form >= static_cast<int>(Form::panel) && !positive) {
        for (int g = 0; g < G; ++g) {
          PanelRun run;
          std::memcpy(run.q, weights.data() + g * sizeof run, sizeof run.q);
          for (int8_t& q : run.q) q = q == -128 ? int8_t{-127} : q;
          for (int r = 0; r < kRows; ++r) run.scale[0][r] = run.scale[1][r] = draw_float(), run.offset[r] = draw_float();
          std::memcpy(weights.data() + g * sizeof run, &run, sizeof run);
        }
      } else {
        if (form != static_cast<int>(Form::q4b32) && form != static_cast<int>(Form::q3b32))
          for (uint8_t& b : weights) b &= 0xbf;  // float16 scales stay finite, whatever bytes they are; signs stay
      }
      float out[8 * kMostBlocks * kRows];
      each_tile([&](int first, int width, const uint8_t* tile) {
        k.side_by_side(static_cast<Form>(form), weights.data(), 0, 1, tile, G, width, out + first * kRows, kRows);
      });
      const char tokens[] = {' ', 'x', static_cast<char>('0' + n_tokens), '\0'};
      say(k, names[form], out, sizeof(float) * n_tokens * kRows, tokens);
      std::vector<uint8_t> other = weights;  // run after run moved on by one
      std::rotate(other.begin(), other.begin() + sizeof(PanelRun), other.end());
      const void* blocks[kMostBlocks];
      float* to[kMostBlocks];
      for (int i = 0; i < kMostBlocks; ++i) {
        blocks[i] = i % 3 ? other.data() : weights.data();
        to[i] = out + (kMostBlocks - 1 - i) * kRows;
      }
      for (int n : {kMostBlocks - 1, kMostBlocks}) {
        std::fill(std::begin(out), std::end(out), 0.0f);
        each_tile([&](int first, int width, const uint8_t* tile) {
          float* from_first[kMostBlocks];
          for (int i = 0; i < kMostBlocks; ++i) from_first[i] = to[i] + first * kMostBlocks * kRows;
          k.blocks[form](blocks, blocks, n, tile, G, width, from_first, kMostBlocks * kRows);
        });
        say(k, names[form], out, sizeof(float) * n_tokens * kMostBlocks * kRows, " side by side");
      }
      std::vector<float> turned(static_cast<size_t>(I) * kRows);
      k.turned[form](weights.data(), G, turned.data(), kRows);
      say(k, names[form], turned.data(), sizeof(float) * turned.size(), " turned round");
    }
  // Many tokens, where there is a way of their own in several parts and with any number in the last tile; a last chunk of five groups.
  constexpr int few_groups = 21;
  for (const int many : {17, 18, 19, 20, 21, 22, 23, 24, 301})
    for (const Form form : {Form::q4b32, Form::q3b32}) {
      const int which = static_cast<int>(form);
      std::vector<uint8_t> tiles(static_cast<size_t>(many) * few_groups * kTokenGroup);
      std::vector<float> out(2 * many * kRows);
      const auto each_tile = [&](auto call) {
        for (int first = 0, width; first < many; first += width) {
          width = k.tile_width(many - first);
          call(first, k.many[which] ? Tile(tiles.data() + static_cast<size_t>(first) * kTokenGroup, width, many)
                                    : Tile(tiles.data() + static_cast<size_t>(first) * few_groups * kTokenGroup, width));
        }
      };
      each_tile([&](int first, Tile tile) { k.quantize(x.data() + first, 1, tile.W, few_groups, tile, 0); });
      for (uint8_t& b : weights) b = static_cast<uint8_t>(draw());
      const void *blocks[] = {weights.data(), weights.data() + few_groups * kQ4BRun}, *next[] = {blocks[1], blocks[0]};
      for (int n : {1, 2}) {
        const auto multiply = [&](BlocksKernel kernel, int first, int width, const uint8_t* tile) {
          float* to[] = {out.data() + first * n * kRows, out.data() + first * n * kRows + kRows};
          kernel(blocks, next, n, tile, few_groups, width, to, n * kRows);
        };
        if (k.many[which]) multiply(k.many[which], 0, many, tiles.data());
        else each_tile([&](int first, Tile tile) { multiply(k.blocks[which], first, tile.W, tile.at); });
        say(k, names[which], out.data(), sizeof(float) * n * many * kRows, " many tokens");
      }
    }
  std::vector<uint8_t> tile(static_cast<size_t>(W) * G * kTokenGroup);
  // A whole tile and token by token; values of all sizes, those around 1e-30 and zeros among them.
  for (int i = 0; i < W * I; ++i) {
    const uint32_t power = static_cast<uint32_t>(7 + i / kGroup * 53 % 230) << 23;  // 2^-120 to 2^109
    float by;
    std::memcpy(&by, &power, sizeof by);
    y[i] = i / kGroup % 31 ? x[i] * by : 0.0f;
  }
  for (int step : {W, 1}) {
    for (int t = 0; t < W; t += step) k.quantize(y.data() + t * I, I, step, G, {tile.data(), W}, t);
    for (int g = 0; g < G; ++g)  // but for the scales, which a tile may keep as exponents; `residual` multiplies by them
      std::memset(tile.data() + (g * kTokenGroup + kGroup) * W, 0, sizeof(float) * W);
    say(k, "quantize", tile.data(), tile.size(), step == W ? " a tile" : " tokens");
  }
  k.quantize(x.data(), I, W, G, {tile.data(), W}, 0);
  const float* tokens[W];
  for (int t = 0; t < W; ++t) tokens[t] = x.data() + t * I;
  float dots[5][7];
  k.dots(tokens, 5, tokens + 1, 7, I, dots[0], 7);
  say(k, "dots", dots, sizeof dots);
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
  for (int g = 0; g < G; ++g)
    for (int t = 0; t < W; ++t) k.residual(x.data() + t * I + g * kGroup, tile.data() + g * W * kTokenGroup, W, t, y.data() + t * I + g * kGroup);
  say(k, "residual", y.data(), 4 * W * I);
  std::vector<float> s(x.begin(), x.begin() + 128);
  const float total = k.softmax(s.data(), 101, 3.0f, nullptr);
  say(k, "softmax", s.data(), 4 * s.size());
  say(k, "softmax total", &total, sizeof total);
  constexpr int groups = 3;
  std::vector<uint8_t> rows(4 * groups * kQ8Run), turned(4 * kQ8Run);
  for (int r = 0; r < 61; ++r) k.store_row(x.data() + r * 64, groups, rows.data() + r / kRows * groups * kQ8Run, r % kRows);
  say(k, "store_row", rows.data(), rows.size());
  k.turn_rows(rows.data(), groups * kQ8Run, 32, 29, 64, turned.data(), kQ8Run);
  say(k, "turn_rows", turned.data(), turned.size());
  float scales[kGroup];
  for (int n : {29, 32}) {
    k.turn_values(x.data() + 5, 70, n, 64, turned.data(), kQ8Run, scales);
    say(k, "turn_values", turned.data(), turned.size());
    say(k, "turn_values' scales", scales, sizeof scales);
  }
}

// The image tower: rows, and pictures whose heads fill their last vector or not and whose blocks of keys are whole or not.
void run(const VisionKernels& k, const Kernels& same_isa) {
  if (!same_isa.runs_here()) return;
  state = 2;
  for (int W : {48, 72, 1152}) {
    std::vector<float> x(W), weight(W), bias(W), out(W);
    for (auto* v : {&x, &weight, &bias}) for (float& f : *v) f = draw_float();
    k.layer_norm(x.data(), weight.data(), bias.data(), W, 1e-5f, out.data());
    say(k, "layer_norm", out);
    for (float& f : x) f *= 6;
    for (bool exact : {false, true}) {
      k.gelu(x.data(), bias.data(), W, exact, out.data());
      say(k, exact ? "gelu, exact" : "gelu", out);
    }
    k.add(x.data(), bias.data(), W, out.data());
    say(k, "add", out);
  }
  constexpr int H = 2;
  for (const auto& [N, K] : {std::pair{300, 72}, {24, 4}, {128, 36}, {401, 128}, {129, 48}}) {
    const int Np = (N + kKeys - 1) / kKeys * kKeys, Kp = (K + 15) / 16 * 16;
    std::vector<int16_t> q(H * N * K), key(H * Np * K), v(H * Np * Kp);
    std::vector<float> q_scale(H * N), k_scale(H * Np), v_scale(H * Np / kKeys * Kp);
    Patches patches{N, H, K, Np, Kp, q.data(), key.data(), v.data(), q_scale.data(), k_scale.data(), v_scale.data()};
    std::vector<float> qkv(3 * H * N * K), bias(3 * H * K), cos(N * K / 2), sin(N * K / 2), out(H * N * K);
    for (auto* values : {&qkv, &bias, &cos, &sin}) for (float& f : *values) f = draw_float();
    for (int h = 0; h < H; ++h) {
      for (int first = 0; first < N; first += kKeys)
        k.place(patches, h, first, std::min(kKeys, N - first), qkv.data() + first * 3 * H * K, 3 * H * K, bias.data(),
                cos.data() + first * (K / 2), sin.data() + first * (K / 2));
      for (int first = 0; first < N; first += kQueries)
        k.attend(patches, h, first, std::min(kQueries, N - first), out.data() + first * H * K + h * K, H * K);
    }
    say(k, "q", q);
    say(k, "k", key);
    say(k, "v", v);
    q_scale.insert(q_scale.end(), k_scale.begin(), k_scale.end());
    q_scale.insert(q_scale.end(), v_scale.begin(), v_scale.end());
    say(k, "scales", q_scale);
    say(k, "attend", out);
  }
}
}  // namespace

int main() {
  run(kScalar);
  run(kVisionScalar, kScalar);
#if defined(__x86_64__)
  run(kAvx2);
  execute_vpdpbusd();
  run(kAvxVnni, kAvx2.runs_here());
  run(kAvx512Vnni256);
  run(kAvx512Vnni);
  run(kZen4);
  run(kVisionAvx2, kAvx2);
  run(kVisionAvx512Vnni, kAvx512Vnni);
#elif defined(__aarch64__)
  run(kNeon);
  run(kVisionNeon, kNeon);
#endif
}
