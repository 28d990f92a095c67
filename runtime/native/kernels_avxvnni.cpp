// AVX2 with VNNI at 256 bits: Intel since Alder Lake (2021), AMD since Zen 5 (2024). Laptops are the reason.
#include <cpuid.h>
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
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return false;
  unsigned a = 0, b, c, d;  // clang before 19 has no name for it
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
}
}  // namespace

const kimi::Kernels kimi::kAvxVnni = KIMI_TABLE("avxvnni", runs_here);
