// AVX2 with VNNI at 256 bits: Intel since Alder Lake (2021), AMD since Zen 5 (2024). Laptops are the reason.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_avx2.h"
#include "kernels_inl.h"
bool runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avxvnni");
}
}  // namespace

const kimi::Kernels kimi::kAvxVnni = KIMI_TABLE("avxvnni", runs_here);
