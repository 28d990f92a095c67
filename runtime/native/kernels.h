// The contract between the instruction-set files and everything above them.
//
// Each kernels_<isa>.cpp fills one Kernels table. All tables give the same bits: integer sums are exact, and float sums
// follow one order, written once in kernels_inl.h over a vector of sixteen floats. A weight row is a vector lane.
//
//   y[t][o] = sum over chunks of 8 groups, in order, of
//             sum over the chunk's groups, in order, of  fma(float(isum), w_scale * x_scale, acc)
//   isum    = exact int32 dot product of 32 (or 16) stored weights and int8 activations
//
// These files see shapes and layouts, never the model. They allocate nothing and throw nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kimi {

constexpr int kRows = 16;    // rows of a row block
constexpr int kGroup = 32;   // input channels that share an activation scale
constexpr int kChunk = 8;    // groups between two roundings of the running total
constexpr int kQ4Run = 288;  // bytes of 16 rows x 32 channels: 4 lines of 64, 16 float16 scales
constexpr int kQ8Run = 544;  // 8 lines of 64, 16 float16 scales

// A panel is one row block of a ggml type, decoded: what differs between the types is gone.
// w = scale * q + offset, q int8; one scale (and offset) for 32 channels, or for 16.
struct PanelRun {             // 32 channels of 16 rows
  int8_t q[512];              // as a q8g32 run: line j, byte 4r + c is channel 4j + c of row r
  float scale[2][kRows];      // channels 0-15 and 16-31; equal unless the type has 16-wide scales
  float offset[kRows];        // for all 32 channels; 0 unless the type has a minimum
};
static_assert(sizeof(PanelRun) == 512 + 4 * 3 * kRows, "PanelRun has no padding");

struct Activations {          // T rows of int8, quantized per group of 32
  const int8_t* q;            // [T][32 G]
  const float* scale;         // [T][G]
  const int32_t* sum;         // [T][G], sum of a group's q
  int groups;                 // G
};

struct Kernels {
  const char* name;
  bool (*runs_here)();        // the processor and the operating system support it
  // One row of floats to int8: scale = absmax / 127, q = nearest even of x / scale. n is a multiple of 32.
  void (*quantize_row)(const float* x, int n, int8_t* q, float* scale, int32_t* sum);
  // One row block times the n tokens whose rows are listed; out[i * stride + row], 16 floats each.
  void (*q4_block)(const uint8_t* w, const Activations& a, const int32_t* tokens, int n, float* out, size_t stride);
  void (*q8_block)(const uint8_t* w, const Activations& a, const int32_t* tokens, int n, float* out, size_t stride);
  void (*panel_block)(const PanelRun* w, bool halves, bool offsets, const Activations& a, const int32_t* tokens, int n,
                      float* out, size_t stride);
  float (*dot)(const float* a, const float* b, int n);  // n a multiple of 16
  void (*half_to_float)(const uint16_t* x, int n, float* out);
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);  // n a multiple of 16
  void (*sigmoid)(const float* x, int n, float* out);                       // n a multiple of 16
  void (*axpy)(float a, const float* x, int n, float* y);                   // y = fma(a, x, y), n a multiple of 16
  // One head of one token over n cached rows: u[C] = softmax(scale * (q . c + qr . r)) c.
  void (*attend)(const float* q, const float* qr, const uint16_t* cache, const uint16_t* rope, int n, int C, int R,
                 float scale, float* u);
};

extern const Kernels kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2, kAvx512Vnni;
#endif
}  // namespace kimi
