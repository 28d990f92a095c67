// Every kernel but the products (products_inl.h), once, over the sixteen-float vector V. Included inside an unnamed namespace
// after a vec_<isa>.h, so nothing here is shared between instruction sets.

#include "vec_exp.h"

static inline V vsigmoid(V x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vset(0.0f), x)))); }

static inline float two_to(int32_t e) {
  const int32_t bits = (e + 127) << 23;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
#ifndef KIMI_EXPONENTS
static inline float kept(int32_t e) { return two_to(e); }  // what a tile keeps of a scale; `vscale` multiplies by it
#endif

// The least e for which 127 * 2^e is not below a positive float, 127 being 1.984375 * 2^6: what a mantissa has above that carries
// into the exponent.
static inline int32_t exponent_of(float absmax) {
  int32_t bits;
  __builtin_memcpy(&bits, &absmax, 4);
  return ((bits + 0x1ffff) >> 23) - 133;
}

// One token's groups into a tile.
static inline void quantize_token(const float* x, int groups, Tile to, int lane) {
  const int W = to.W;
  uint8_t* tile = to.at;
  for (int g = 0; g < groups; ++g, x += kGroup, tile += to.step) {
    const V a = vload(x), b = vload(x + 16);
    const float absmax = lane_max(vmax(vabs(a), vabs(b)));
    const bool some = absmax > 1e-30f;
    const int32_t e = some ? exponent_of(absmax) : 0;
    const V inverse = vset(some ? two_to(-e) : 0.0f);
    int8_t* q = reinterpret_cast<int8_t*>(tile) + lane * kGroup;
    const int32_t low = -8 * store_int8(q, vround(vmul(a, inverse)));
    const int32_t whole = low - 8 * store_int8(q + 16, vround(vmul(b, inverse)));
    float* scales = reinterpret_cast<float*>(tile + W * kGroup);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + W);
    scales[lane] = kept(e) + (absmax - absmax);  // which is 0, or not a number
    sums[lane] = whole;
    sums[W + lane] = to.for_many ? 16 * whole : low;
  }
}

#ifdef KIMI_QUANTIZE_TILE
#include KIMI_QUANTIZE_TILE
#endif
static void quantize(const float* x, size_t stride, int n, int groups, Tile to, int lane) {
#ifdef KIMI_QUANTIZE_TILE
  if (n == kTile) return quantize_tile(x, stride, groups, to);
#endif
  for (int i = 0; i < n; ++i) quantize_token(x + i * stride, groups, to, lane + i);
}

namespace products {
#ifdef KIMI_PRODUCT_VECTOR  // narrower than V, where a vector is several registers
#include KIMI_PRODUCT_VECTOR
#endif
#include "products_inl.h"
#ifdef KIMI_MANY
// Of so many tokens, how many the next part has: as few parts of at most `at_once` as can be, all about as long, in whole tiles.
static inline int part_of(int tokens, int at_once) {
  const int tiles = (tokens + kTile - 1) / kTile, parts = (tiles * kTile + at_once - 1) / at_once;
  const int part = (tiles + parts - 1) / parts * kTile;
  return part < tokens ? part : tokens;
}
#include KIMI_MANY
#else
constexpr int kManyFrom = 0;
#endif
}  // namespace products

static float dot(const float* a, const float* b, int n) {
  V acc = vset(0.0f);
  for (int k = 0; k < n; k += 16) acc = vfma(vload(a + k), vload(b + k), acc);
  return lane_sum(acc);
}

// All pairs of A rows and B rows, each in the order of `dot`: its sum waits for itself, so several go at once.
template <int A, int B>
static inline void dots_of(const float* const* a, const float* const* b, int n, float* out, size_t stride) {
  V acc[A][B];
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) acc[i][j] = vset(0.0f);
  for (int k = 0; k < n; k += 16) {
    V y[B];
    for (int j = 0; j < B; ++j) y[j] = vload(b[j] + k);
    for (int i = 0; i < A; ++i) {
      const V x = vload(a[i] + k);
      for (int j = 0; j < B; ++j) acc[i][j] = vfma(x, y[j], acc[i][j]);
    }
  }
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) out[i * stride + j] = lane_sum(acc[i][j]);
}

static void dots(const float* const* a, int n_a, const float* const* b, int n_b, int n, float* out, size_t stride) {
  const auto row = [&]<int A>(int i) {
    int j = 0;
    for (; j + kDots <= n_b; j += kDots) dots_of<A, kDots>(a + i, b + j, n, out + i * stride + j, stride);
    for (; j < n_b; ++j) dots_of<A, 1>(a + i, b + j, n, out + i * stride + j, stride);
  };
  int i = 0;
  for (; i + kDots <= n_a; i += kDots) row.template operator()<kDots>(i);
  for (; i < n_a; ++i) row.template operator()<1>(i);
}

static void half_to_float(const uint16_t* x, int n, float* out) {
  for (int k = 0; k < n; k += 16) vstore(out + k, vhalf(x + k));
}

static void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  const float mean = dot(x, x, n) / static_cast<float>(n);
  const V r = vset(1.0f / __builtin_sqrtf(mean + eps));
  for (int k = 0; k < n; k += 16) vstore(out + k, vmul(vmul(vload(x + k), r), vload(weight + k)));
}

static void silu_mul(const float* gate, const float* up, int n, float* out) {
  for (int k = 0; k < n; k += 16) {
    const V g = vload(gate + k);
    vstore(out + k, vmul(vmul(g, vsigmoid(g)), vload(up + k)));
  }
}

static void sigmoid(const float* x, int n, float* out) {
  for (int k = 0; k < n; k += 16) vstore(out + k, vsigmoid(vload(x + k)));
}

static void axpy(float a, const float* x, int n, float* y) {
  for (int k = 0; k < n; k += 16) vstore(y + k, vfma(vset(a), vload(x + k), vload(y + k)));
}

static void residual(const float* x, const uint8_t* tile, int W, int lane, float* out) {
  const V scale = vscale(vset(-1.0f), vset(reinterpret_cast<const float*>(tile + W * kGroup)[lane]));
  for (int k = 0; k < kGroup; k += 16) vstore(out + k, vfma(scale, load_int8(tile + lane * kGroup + k), vload(x + k)));
}

static float softmax(float* s, int n, float scale, const float* times) {
  const int padded = (n + kGroup - 1) / kGroup * kGroup;
  for (int k = n; k < padded; ++k) s[k] = -INFINITY;
  V top = vload(s);
  for (int k = 16; k < padded; k += 16) top = vmax(top, vload(s + k));
  const V most = vset(lane_max(top)), by = vset(scale);
  for (int k = 0; k < padded; k += 16) vstore(s + k, vexp(vmul(by, vsub(vload(s + k), most))));
  for (int k = n; k < padded; ++k) s[k] = 0.0f;
  V total = vset(0.0f);
  for (int k = 0; k < padded; k += 16) {
    const V x = vload(s + k);
    total = vadd(total, x);
    if (times) vstore(s + k, vmul(x, vload(times + k)));
  }
  return lane_sum(total);
}

// Scale in float16, and the factor that takes a value to its step; a group of zeros, or of values too small for a
// float16 scale, is stored as zeros.
static inline V step_of(V absmax, uint16_t* halves) {
  store_half(halves, vmul(absmax, vset(1.0f / 127.0f)));
  return vdiv(vset(1.0f), vmax(vhalf(halves), vset(1e-30f)));
}
static inline V to_step(V x, V inverse) { return vround(vmax(vmin(vmul(x, inverse), vset(127.0f)), vset(-127.0f))); }

static void store_row(const float* x, int groups, uint8_t* block, int r) {
  for (int g = 0; g < groups; ++g, x += kGroup, block += kQ8Run) {
    const V a = vload(x), b = vload(x + 16);
    uint16_t halves[16];
    const V inverse = step_of(vset(lane_max(vmax(vabs(a), vabs(b)))), halves);
    int8_t q[kGroup];
    store_int8(q, to_step(a, inverse));
    store_int8(q + 16, to_step(b, inverse));
    for (int j = 0; j < 8; ++j) __builtin_memcpy(block + 64 * j + 4 * r, q + 4 * j, 4);
    __builtin_memcpy(block + 512 + 2 * r, halves, 2);
  }
}

static void turn_rows(const uint8_t* rows, size_t block_stride, int first, int n, int C, uint8_t* out, size_t out_stride) {
  for (int b = 0; b < C / kRows; ++b, out += out_stride) {
    V value[kGroup], absmax = vset(0.0f);
    for (int i = 0; i < n; ++i) {
      const uint8_t* run = rows + (first + i) / kRows * block_stride + static_cast<size_t>(b / 2) * kQ8Run;
      const int r = (first + i) % kRows;
      uint8_t bytes[16];
      for (int j = 0; j < 4; ++j) __builtin_memcpy(bytes + 4 * j, run + 64 * (b % 2 * 4 + j) + 4 * r, 4);
      value[i] = vmul(vset(half_value(run + 512 + 2 * r)), load_int8(bytes));
      absmax = vmax(absmax, vabs(value[i]));
    }
    for (int i = n; i < kGroup; ++i) value[i] = vset(0.0f);
    uint16_t halves[16];
    const V inverse = step_of(absmax, halves);
    for (int j = 0; j < 8; ++j)
      store_four(out + 64 * j, to_step(value[4 * j], inverse), to_step(value[4 * j + 1], inverse),
                 to_step(value[4 * j + 2], inverse), to_step(value[4 * j + 3], inverse));
    __builtin_memcpy(out + 512, halves, 32);
  }
}

static void turn_values(const float* x, size_t stride, int n, int C, uint8_t* out, size_t out_stride, float* scale) {
  float inverse[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    V absmax = vset(0.0f);
    for (int k = 0; i < n && k < C; k += 16) absmax = vmax(absmax, vabs(vload(x + i * stride + k)));
    const float most = lane_max(absmax);
    scale[i] = most / 127.0f;
    inverse[i] = most > 1e-30f ? 127.0f / most : 0.0f;
  }
  constexpr uint16_t one = 0x3C00;  // as a half
  for (int b = 0; b < C / kRows; ++b, x += kRows, out += out_stride) {
    const auto step = [&](int i) { return i < n ? vround(vmul(vload(x + i * stride), vset(inverse[i]))) : vset(0.0f); };
    for (int j = 0; j < 8; ++j) store_four(out + 64 * j, step(4 * j), step(4 * j + 1), step(4 * j + 2), step(4 * j + 3));
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(out + 512 + 2 * r, &one, 2);
  }
}

#define KIMI_FORMS(call)                                                                                              \
  {products::call<products::Q4>, products::call<products::Q4B>, products::call<products::Q3B>, products::call<products::Q8>, products::call<products::Q5>, \
   products::call<products::I4>, products::call<products::Q4K>, products::call<products::Q6K>, products::call<products::Panel<false, false>>,        \
   products::call<products::Panel<true, false>>, products::call<products::Panel<false, true>>, products::call<products::Q8Positive>}
#ifndef KIMI_MANY
#define KIMI_MANY_FORMS {}
#endif
#define KIMI_TABLE(name, runs_here)                                                                                      \
  {name, runs_here, products::kEveryWidth, products::kManyFrom, KIMI_FORMS(blocks), KIMI_MANY_FORMS,                     \
   quantize, dots, half_to_float, rms_norm, silu_mul, sigmoid, axpy, residual, softmax, store_row, turn_rows, turn_values, KIMI_FORMS(turned)}
