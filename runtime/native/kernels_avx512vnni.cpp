// AVX-512 with VNNI: Intel since Ice Lake (2019), AMD since Zen 4 (2022), for which kernels_zen4.cpp is faster.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_avx512.h"
#include "kernels_inl.h"
bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
#ifdef KIMI_ZEN4
         __builtin_cpu_supports("avx512vbmi") &&
#endif
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace

#ifdef KIMI_ZEN4
const kimi::Kernels kimi::kZen4 = KIMI_TABLE("zen4", runs_here);
#else
const kimi::Kernels kimi::kAvx512Vnni = KIMI_TABLE("avx512vnni", runs_here);
#endif
