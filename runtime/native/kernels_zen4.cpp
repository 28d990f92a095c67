// The code of kernels_avx512vnni.cpp as Zen 4 (2022) is fastest: other scales and another reading of memory (vec_avx512.h).
#define KIMI_ZEN4
#define KIMI_MANY "many_zen4.h"
#include "kernels_avx512vnni.cpp"
