// NEON with the dot-product extension: Apple since the M1, Snapdragon and Graviton since 2018 to 2019.
#include <arm_neon.h>
#include <math.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_neon.h"
#include "kernels_inl.h"
bool runs_here() {
#ifdef __linux__
  constexpr unsigned long dot_product = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & dot_product;
#else
  return true;  // every processor that macOS runs on
#endif
}
}  // namespace

const kimi::Kernels kimi::kNeon = KIMI_TABLE("neon", runs_here);
