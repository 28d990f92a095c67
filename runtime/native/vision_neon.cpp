// NEON: a long multiply-add takes four int16 by one value, so that pairs of channels, which stand side by side, are first
// drawn apart: the dot-product extension has no 16-bit form.
#include <arm_neon.h>
#include <math.h>

#include "kernels.h"
#include "vision.h"

namespace {
using namespace kimi;
#include "vec_neon.h"
constexpr int kTileQ = 4, kTileK = 1, kTileP = 1;  // 16 or 20 of 32 registers hold sums
inline I dot_s16(I acc, L line, const int16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
  const int16x4_t both = vreinterpret_s16_s32(vdup_n_s32(two));
  for (int half = 0; half < 2; ++half) {
    const int16x8_t a = vreinterpretq_s16_u8(line.v[2 * half]), b = vreinterpretq_s16_u8(line.v[2 * half + 1]);
    const int16x8_t even = vuzp1q_s16(a, b), odd = vuzp2q_s16(a, b);
    int32x4_t low = vmlal_lane_s16(acc.v[2 * half], vget_low_s16(even), both, 0);
    int32x4_t high = vmlal_high_lane_s16(acc.v[2 * half + 1], even, both, 0);
    acc.v[2 * half] = vmlal_lane_s16(low, vget_low_s16(odd), both, 1);
    acc.v[2 * half + 1] = vmlal_high_lane_s16(high, odd, both, 1);
  }
  return acc;
}
inline void vstore_s16(int16_t* p, V x) {
  for (int k = 0; k < 4; ++k) vst1_s16(p + 4 * k, vmovn_s32(vcvtnq_s32_f32(x.v[k])));
}
#include "vision_inl.h"
}  // namespace

const kimi::VisionKernels kimi::kVisionNeon = KIMI_VISION_TABLE("neon");
