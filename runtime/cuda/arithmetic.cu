// Numbers: what every kernel shares, in the order of sums that docs/kernels.md fixes.
//
// The five files arithmetic, products, attention, experts and vision are one program, in that order. They include nothing and
// are compiled without contraction, flushing or approximate division, so that each float operation below is the CPU
// engine's, and its bits are the result's. The tests compile them as plain C++ as well (tests/cuda/shim.h).
//
// Dimension key:  T tokens  D hidden  H heads  N, R, C, V no-rope, rope, latent and value width  E experts  A active
//                 F expert width  K channels of a product  S cached positions
#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
// A kernel that keeps some of one token's weights on the way: blocks of up to 256 threads.
#define KERNEL_OF_ONE extern "C" __global__ void __launch_bounds__(256, 2)
// A kernel that keeps sums of eight tokens: blocks of up to 128 threads, two of which share a multiprocessor's registers.
#define KERNEL_OF_EIGHT extern "C" __global__ void __launch_bounds__(128, 2)
// A kernel on the tensor cores: blocks of 128 threads, three of which share a multiprocessor's registers.
#define KERNEL_OF_TILES extern "C" __global__ void __launch_bounds__(128, 3)
// A kernel of a warp a head: blocks of up to 512 threads, three of which share a multiprocessor; Turing's takes two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define KERNEL_OF_HEADS extern "C" __global__ void __launch_bounds__(512, 2)
#else
#define KERNEL_OF_HEADS extern "C" __global__ void __launch_bounds__(512, 3)
#endif
#define DEVICE static __device__ __forceinline__
extern __shared__ uint4 shared_memory[];
#endif

using s8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kRows = 16;   // rows of a row block
constexpr int kGroup = 32;  // channels that share an activation scale; also the lanes of a warp
constexpr int kChunk = 8;   // groups between two roundings of the running total
constexpr u32 kAll = 0xffffffffu;

DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }
DEVICE int warps() { return blockDim.x / 32; }
DEVICE int ceil_div(int n, int unit) { return (n + unit - 1) / unit; }
DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory); }

#ifdef __CUDACC__
// d = a b + c on the tensor cores, exact: int8 of 16 rows × 32 channels times 32 channels × 8 tokens. All lanes of a warp
// call it and hold the parts that the PTX ISA gives them, lane 4 g + t (the shim of the tests has the whole table):
//
//   a[0], a[1]  channels 4 t..4 t + 3 of rows g and g + 8        b[0]        channels 4 t..4 t + 3 of token g
//   a[2], a[3]  the same, 16 channels further                    b[1]        the same, 16 channels further
//   c[0], c[1]  row g, tokens 2 t and 2 t + 1                    c[2], c[3]  row g + 8
DEVICE void mma_16x8x32(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
// Turing's step: rows g, tokens 2 t and 2 t + 1, 16 channels; d += a b.
DEVICE void mma_8x8x16(int& d0, int& d1, u32 a, u32 b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(d0), "+r"(d1)
               : "r"(a), "r"(b));
}

// What no kernel writes.
DEVICE uint2 read_8(const u8* at) {
  uint2 v;
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}
DEVICE u32 read_4(const u8* at) {
  u32 v;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}

DEVICE u32 read_2(const u8* at) {
  u16 v;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(at));
  return v;
}

// sum + the products of four int8 values in each. Compilers before CUDA 12.3 do not know the instruction's own name in C++.
DEVICE int dp4a(u32 a, u32 b, int sum) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
  return d;
}

DEVICE u32 and_xor(u32 a, u32 b, u32 c) {  // a & b ^ c
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Asks for a copy to shared memory, zeros if there is nothing, and goes on; the thread finds it there after all_brought(),
// the others after the next barrier. Turing waits for it at once.
DEVICE void bring_16(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ < 800
  *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}
DEVICE void bring_4(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ < 800
  *static_cast<u32*>(to) = there ? *static_cast<const u32*>(from) : 0;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 4 : 0) : "memory");
#endif
}
DEVICE void all_brought() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE u16 float_to_half(float f) {  // to nearest, ties to even; subnormals are kept
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#endif

// The large step as four of Turing's: its quarters lie in the same lanes.
DEVICE void mma_by_quarters(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 2; ++k) mma_8x8x16(d[2 * half], d[2 * half + 1], a[2 * k + half], b[k]);
}

DEVICE void mma(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  mma_by_quarters(d, a, b, c);
#else
  mma_16x8x32(d, a, b, c);
#endif
}

DEVICE float largest(float v) {  // of a warp; every lane gets it
  for (int step = 16; step; step /= 2) {
    const float other = __shfl_xor_sync(kAll, v, step);
    v = other > v ? other : v;
  }
  return v;
}

DEVICE float largest_magnitude(float v) {  // likewise; floats without a sign have the order of their bits
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __int_as_float(__reduce_max_sync(kAll, __float_as_int(fabsf(v))));
#else
  return largest(fabsf(v));
#endif
}

DEVICE int sum_of(int v) {  // of a warp; exact, every lane gets it
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAll, v);
#else
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
#endif
}

// Sixteen running sums to one, 8 + 8, 4 + 4, 2 + 2, 1 + 1: right in the lowest lane of each sixteen.
DEVICE float lane_sum(float v) {
  for (int step = 8; step; step /= 2) v = v + __shfl_down_sync(kAll, v, step, 16);
  return v;
}

DEVICE float two_to(int e) { return __int_as_float((e + 127) << 23); }

// e^x by the polynomial of kernels_inl.h, operation for operation.
DEVICE float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  const float n = rintf(x * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.0f / 720;
  p = fmaf(p, r, 1.0f / 120);
  p = fmaf(p, r, 1.0f / 24);
  p = fmaf(p, r, 1.0f / 6);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  return p * two_to(static_cast<int>(n));
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(0.0f - x)); }

// Activations: rows of `groups` groups of 32 int8 values; per group a scale and -8 times the sum of its values. The three
// arrays hold all rows, one row after the other.
struct Rows {
  s8* q;
  float* scale;
  int* sum;
  int groups;
};

// The least e for which 127 * 2^e is not below a positive float: what its mantissa has above 127's carries into the exponent.
DEVICE int exponent_of(float most) { return ((__float_as_int(most) + 0x1ffff) >> 23) - 133; }

// One group, a lane each channel. Returns what the rounding lost.
DEVICE float quantize(float v, const Rows& to, size_t row, int group) {
  const float most = largest_magnitude(v);
  const bool some = most > 1e-30f;
  const int e = some ? exponent_of(most) : 0;
  const int q = static_cast<int>(rintf(v * (some ? two_to(-e) : 0.0f)));
  const int sum = sum_of(q);
  const size_t at = row * to.groups + group;
  const float scale = two_to(e) + (most - most);  // which is 0, or not a number
  to.q[at * kGroup + lane()] = static_cast<s8>(q);
  if (lane() == 0) {
    to.scale[at] = scale;
    to.sum[at] = -8 * sum;
  }
  return fmaf(-scale, static_cast<float>(q), v);
}

// 1 / sqrt(mean(x²) + eps) of n values in shared memory. All threads of the block; `at` is a free float of theirs.
DEVICE float inverse_norm(const float* x, int n, float eps, float* at) {
  if (threadIdx.x < 32) {
    float sum = 0.0f;
#pragma unroll 16
    for (int k = lane() % 16; k < n; k += 16) sum = fmaf(x[k], x[k], sum);
    sum = lane_sum(sum);
    if (threadIdx.x == 0) *at = 1.0f / sqrtf(sum / static_cast<float>(n) + eps);
  }
  __syncthreads();
  return *at;
}

// A row of D floats: normalised, as floats where `out` is given, and quantized. The grid: rows, shares of their groups;
// each block sums the whole row for itself. Shared: D + 1 floats.
KERNEL rms_norm(const float* x, const float* weight, int D, float eps, float* out, Rows rows) {
  float* staged = shared_floats();
  const size_t row = blockIdx.x;
  const float4* from = reinterpret_cast<const float4*>(x + row * D);
  for (int k = threadIdx.x; k < D / 4; k += blockDim.x) reinterpret_cast<float4*>(staged)[k] = from[k];
  __syncthreads();
  const float r = inverse_norm(staged, D, eps, staged + D);
  for (int g = blockIdx.y * warps() + warp(); g < D / kGroup; g += gridDim.y * warps()) {
    const int k = g * kGroup + lane();
    const float v = staged[k] * r * weight[k];
    if (out) out[row * D + k] = v;
    quantize(v, rows, row, g);
  }
}
