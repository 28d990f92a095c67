// Plain C++: what the other instruction sets are held against. Read vision_inl.h first.
#include <math.h>

#include "kernels.h"
#include "vision.h"

namespace {
using namespace kimi;
#include "vec_scalar.h"
constexpr int kTileQ = 2, kTileK = 1, kTileP = 2;
// acc[lane] += the dot product of the lane's two weights and the two values at x.
inline I dot_s16(I acc, const L& line, const int16_t* x) {
  for (int k = 0; k < 16; ++k) {
    int16_t w[2];
    __builtin_memcpy(w, line.b + 4 * k, 4);
    acc.v[k] += static_cast<int32_t>(w[0]) * x[0] + static_cast<int32_t>(w[1]) * x[1];
  }
  return acc;
}
inline void vstore_s16(int16_t* p, V x) {  // nearest even; |x| < 32768
  for (int k = 0; k < 16; ++k) p[k] = static_cast<int16_t>(__builtin_rintf(x.v[k]));
}
#include "vision_inl.h"
}  // namespace

const kimi::VisionKernels kimi::kVisionScalar = KIMI_VISION_TABLE("scalar");
