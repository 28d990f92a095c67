// AVX2 with FMA and F16C: Intel since Haswell (2013), AMD since Zen (2017). Built with its own flags; includes nothing
// that could leave an inline function behind for other processors.
#include <immintrin.h>
#include <math.h>

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_avx2.h"
#define KIMI_MANY "many_unpacked.h"
#include "kernels_inl.h"
bool runs_here() {
  // GCC and clang also ask the operating system whether it saves these registers (XCR0).
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

const kimi::Kernels kimi::kAvx2 = KIMI_TABLE("avx2", runs_here);
