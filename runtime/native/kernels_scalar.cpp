// Plain C++: runs everywhere, and is what the other instruction sets are held against. Read kernels_inl.h first.
#include <math.h>

#include "kernels.h"

namespace {
using namespace kimi;
#include "vec_scalar.h"
#include "kernels_inl.h"
bool always() { return true; }
}  // namespace

const kimi::Kernels kimi::kScalar = KIMI_TABLE("scalar", always);
