// AVX-512 with VNNI: one instruction multiplies and adds thirty-two pairs of int16.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"
#include "vision.h"

namespace {
using namespace kimi;
#include "vec_avx512.h"
constexpr int kTileQ = 6, kTileK = 4, kTileP = 4;  // 24 or 20 of 32 registers hold sums
inline I dot_s16(I acc, L line, const int16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
  const I both = _mm512_set1_epi32(two);
#if defined(__GNUC__) && !defined(__clang__)
  // GCC copies the sums of a large tile to memory and back around the intrinsic: twice the time.
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(line), "v"(both));
  return acc;
#else
  return _mm512_dpwssd_epi32(acc, line, both);
#endif
}
inline void vstore_s16(int16_t* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}
#include "vision_inl.h"
}  // namespace

const kimi::VisionKernels kimi::kVisionAvx512Vnni = KIMI_VISION_TABLE("avx512vnni");
