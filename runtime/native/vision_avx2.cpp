// AVX2: pairs of int16 are multiplied and added by madd, sixteen lanes as two registers.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"
#include "vision.h"

namespace {
using namespace kimi;
#include "vec_avx2.h"
constexpr int kTileQ = 2, kTileK = 2, kTileP = 1;  // 8 or 10 of 16 registers hold sums
inline I dot_s16(I acc, L line, const int16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
  const __m256i b = _mm256_set1_epi32(two);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(line.a, b)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(line.b, b))};
}
inline void vstore_s16(int16_t* p, V x) {
  // packs works in halves of 128 bits: 0-3, 8-11 | 4-7, 12-15; the permutation puts them in order.
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
}
#include "vision_inl.h"
}  // namespace

const kimi::VisionKernels kimi::kVisionAvx2 = KIMI_VISION_TABLE("avx2");
