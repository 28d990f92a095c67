// The code of kernels_avxvnni.cpp in AVX-512's encoding: runs, and is tested, on processors that have no AVX-VNNI.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_avx2.h"
#define KIMI_MANY "many_unpacked.h"
#include "kernels_inl.h"
bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace

const kimi::Kernels kimi::kAvx512Vnni256 = KIMI_TABLE("avx512vnni256", runs_here);
