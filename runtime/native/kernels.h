// The contract between the instruction-set files and everything above them.
//
// Each kernels_<isa>.cpp fills one Kernels table. All tables give the same bits: integer sums are exact, and float sums
// follow one order, written once in kernels_inl.h over a vector of sixteen floats. A weight row is a vector lane.
//
//   y[t][o] = sum over chunks of 8 groups, in order, of
//             sum over the chunk's groups, in order, of  fma(float(isum), w_scale * x_scale, acc)
//   isum    = exact int32 dot product of 32 (or 16) stored weights and int8 activations
//   x_scale = a power of two, so the product of the scales is exact
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
constexpr int kQ4BRun = 272; // the same lines, 16 scales of one byte: a sign, four bits e, three bits m: (1 + m / 8) 2^(e - 15)
constexpr int kQ3BRun = 208; // 3 lines of three bits a channel, the same scales
constexpr int kQ8Run = 544;  // 8 lines of 64, 16 float16 scales
constexpr int kQ5Run = 352;  // 4 lines, one line of fifth bits, 16 float16 scales
// K-quants in sixteens: 256 channels share 16 float16 scales (and, in q4k, 16 scales of the minima), then come 8 runs.
constexpr int kQ4KHead = 64, kQ4KRun = 288;  // 4 lines, 16 scales and 16 minima of one byte
constexpr int kQ6KHead = 32, kQ6KRun = 416;  // 4 lines, 2 lines of upper bits, 2 x 16 signed scales of one byte
// What the 16 codes of IQ4_NL stand for.
constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int kTile = 8;     // tokens whose activations stand together

// A panel is one row block of a ggml type, decoded: what differs between the types is gone.
// w = scale * q + offset, q int8; one scale (and offset) for 32 channels, or for 16.
struct PanelRun {             // 32 channels of 16 rows
  int8_t q[512];              // as a q8g32 run: line j, byte 4r + c is channel 4j + c of row r
  float scale[2][kRows];      // channels 0-15 and 16-31; equal unless the type has 16-wide scales
  float offset[kRows];        // for all 32 channels; 0 unless the type has a minimum
};
static_assert(sizeof(PanelRun) == 512 + 4 * 3 * kRows, "PanelRun has no padding");

// Activations of W tokens (8, or fewer at the end) are a tile: for each group of 32 channels, W x 32 int8 values, W scales as
// floats (2^e, or e where multiplying by it is cheaper), W times -8 x (sum of the values), W times the same of the first 16
// channels. One pointer walks a tile.
constexpr int kTokenGroup = 32 + 4 + 4 + 4;  // bytes of one token's group
// Where a tile of W tokens stands, alone; or for `many`, in every group beside the other tiles of n tokens. Products begin with a sum
// there, so 16 times the second stands in the third's place.
struct Tile {
  uint8_t* at;
  int W;
  size_t step;  // bytes from group to group
  bool for_many;
  Tile(uint8_t* at, int W) : at(at), W(W), step(static_cast<size_t>(W) * kTokenGroup), for_many(false) {}
  Tile(uint8_t* at, int W, int n) : at(at), W(W), step(static_cast<size_t>(n) * kTokenGroup), for_many(true) {}
};

// The layouts, the three kinds of panels, and q8g32 times activations of which none is negative.
enum class Form { q4g32, q4b32, q3b32, q8g32, q5g32, i4g32, q4k, q6k, panel, panel_halves, panel_offsets, q8g32_positive, count };

// n row blocks times a tile of W tokens: token t's 16 floats of block i to out[i] + t * stride. Several go side by side for a few
// tokens, because they share what is read of the tile, and because memory gives many streams more than one. `next` are n blocks
// that are likely to be multiplied after these.
using BlocksKernel = void (*)(const void* const* w, const void* const* next, int n, const uint8_t* tile, int groups, int W,
                              float* const* out, size_t stride);
constexpr int kMostBlocks = 8;  // that a call is worth: of one token
constexpr int kPair = 2;        // of several tokens
// How a few tokens' weights are read: so many row blocks side by side, of which a line in every `step` bytes is asked for so many
// bytes ahead, across the ends of pages, where the processor's own prefetching stops; into cache `level` (3 is the first, 2 the second).
struct Reading { int streams, ahead, step, level; };

struct Kernels {
  const char* name;
  bool (*runs_here)();        // the processor and the operating system support it
  bool every_width;           // tiles of 3, 5, 6 and 7 tokens too, not only of 8, 4, 2 and 1
  int many_from;              // tokens from which `many` pays
  BlocksKernel blocks[static_cast<int>(Form::count)];
  // The same of W tokens, in each group in tiles side by side, and at most kPair row blocks, where many have a way of their own; null
  // where not. A group's term that is no float by itself, beyond 3.4e38, may be infinite here and in `acc` not.
  BlocksKernel many[static_cast<int>(Form::count)];
  // n tokens' floats, `stride` from token to token, into the lanes from `lane` on of a tile: scale = the least power of two
  // that takes a group's largest value to at most 127, q = nearest even of x / scale. A group with nothing above 1e-30 is zeros
  // with the scale 1; one with an infinite value, or with values that are no numbers only, has a scale that is not a number.
  void (*quantize)(const float* x, size_t stride, int n, int groups, Tile to, int lane);
  // out[i * stride + j] = dot product of a[i] and b[j], n floats each; n is a multiple of 16 here and below.
  void (*dots)(const float* const* a, int n_a, const float* const* b, int n_b, int n, float* out, size_t stride);
  void (*half_to_float)(const uint16_t* x, int n, float* out);
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  void (*sigmoid)(const float* x, int n, float* out);
  void (*axpy)(float a, const float* x, int n, float* y);  // y = fma(a, x, y)
  // Adds what one token's group lost when it was quantized: x - scale * q, 32 floats, to be quantized once more.
  void (*residual)(const float* x, const uint8_t* tile, int W, int lane, float* out);
  // s = exp(scale * (s - the largest of the first n)), 0 from n up to the next multiple of 32; returns their sum. With `times`, each
  // is multiplied by its float there, after the sum.
  float (*softmax)(float* s, int n, float scale, const float* times);
  // One row of `groups` * 32 floats as row r of a q8g32 row block.
  void (*store_row)(const float* x, int groups, uint8_t* block, int r);
  // Rows first..first+n-1 of a q8g32 matrix, turned round: channel block b of C / 16 becomes one q8g32 run of 16 channels
  // by 32 rows at out + b * out_stride, rows past n being 0. `first` is a multiple of 32, n at most 32.
  void (*turn_rows)(const uint8_t* rows, size_t block_stride, int first, int n, int C, uint8_t* out, size_t out_stride);
  // The values x [n][V], `stride` floats apart, of n positions (at most 32) and V channels (a multiple of 16), turned round:
  // channel block b becomes one q8g32 run of 16 channels by 32 positions at out + b * out_stride, with scales of 1. Position
  // i's own scale is scale[i], absmax / 127; of the 32, those past n are 0.
  void (*turn_values)(const float* x, size_t stride, int n, int V, uint8_t* out, size_t out_stride, float* scale);
  // A row block's weights as floats, turned round: row r's channel k to out[k * stride + r].
  void (*turned[static_cast<int>(Form::count)])(const uint8_t* w, int groups, float* out, size_t stride);

  // n tokens stand in tiles: as many of 8 as there are, then the rest, in one or of 4, 2, 1. How many the first takes.
  int tile_width(int n) const { return n >= kTile ? kTile : every_width ? n : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

  void quantize_row(const float* x, int groups, Tile to, int lane) const { quantize(x, 0, 1, groups, to, lane); }  // one token's

  // `blocks` for n neighbours, at most kPair, `block_stride` bytes apart, whose floats are neighbours too.
  void side_by_side(Form form, const uint8_t* w, size_t block_stride, int n, const uint8_t* tile, int groups, int W, float* out,
                    size_t stride) const {
    const void *these[kPair], *next[kPair];
    float* to[kPair];
    for (int i = 0; i < n; ++i) these[i] = w + i * block_stride, next[i] = w + (i + n) * block_stride, to[i] = out + i * kRows;
    blocks[static_cast<int>(form)](these, next, n, tile, groups, W, to, stride);
  }
};

extern const Kernels kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni256, kAvx512Vnni, kZen4;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kNeon;
#endif
}  // namespace kimi
