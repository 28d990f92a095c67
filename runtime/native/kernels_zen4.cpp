// AVX-512 with VNNI, as Zen 4 (2022) is fastest: the code of kernels_avx512vnni.cpp, but for scales and the reading of memory.
#define KIMI_ZEN4
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
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace

const kimi::Kernels kimi::kZen4 = KIMI_TABLE("zen4", runs_here);
