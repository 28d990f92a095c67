// CUDA C++ as plain C++: the device code of runtime/cuda runs on the CPU, every thread of every block.
//
// The threads of a block are fibres, each with a stack of its own, and run one at a time until they wait: at
// __syncthreads for the whole block, at a shuffle for their warp. A warp runs as far as it can before the next one
// starts, in either order, so that a missing barrier shows as a wrong bit; shared memory is filled with NaN, so that an
// unwritten value does too. Threads that wait for each other at different places end the process with a sentence.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define KERNEL extern "C" void
#define KERNEL_OF_ONE extern "C" void
#define KERNEL_OF_EIGHT extern "C" void
#define KERNEL_OF_TILES extern "C" void
#define KERNEL_OF_HEADS extern "C" void
#define DEVICE static inline

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kSharedLimit = 48 << 10;  // what a block may have without asking for more
inline uint4 shared_memory[2 * kSharedLimit / sizeof(uint4)];

namespace shim {

enum class State { ready, at_block, at_warp, done };

struct Copy {  // to shared memory, asked for and not waited for yet; from nowhere: zeros
  void* to;
  const void* from;
  size_t n;
};

struct Fibre {
  ucontext_t entry;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::done;
  int turn = 0;  // of the warp's two exchange buffers
  std::vector<Copy> asked;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline size_t running;
inline bool backwards = false;  // blocks and warps from the last to the first
inline uint32_t exchanged[32][2][32];
struct Fragments { int8_t a[16][32], b[8][32]; };  // of a tensor core's step; b token by token
inline Fragments fragments[32][2];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "shim: %s\n", what);
  std::abort();
}

// Gives the processor back until the scheduler comes round again.
__attribute__((noinline)) inline void wait(State state) {
  Fibre& self = *fibres[running];
  self.state = state;
  if (!_setjmp(self.place)) _longjmp(scheduler, 1);
}

inline void fibre_main() {
  for (;;) {
    body();
    if (!fibres[running]->asked.empty()) fail("a thread ended before what it had asked for was brought");
    wait(State::done);
  }
}

__attribute__((noinline)) inline void resume(size_t i) {
  running = i;
  threadIdx = {static_cast<unsigned>(i), 0, 0};
  Fibre& fibre = *fibres[i];
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.entry);
}

inline void make_fibres(size_t n) {
  constexpr size_t stack_bytes = 64 << 10;
  while (fibres.size() < n) {
    auto fibre = std::make_unique<Fibre>();
    fibre->stack = std::make_unique<char[]>(stack_bytes);
    getcontext(&fibre->entry);
    fibre->entry.uc_stack.ss_sp = fibre->stack.get();
    fibre->entry.uc_stack.ss_size = stack_bytes;
    fibre->entry.uc_link = nullptr;
    makecontext(&fibre->entry, fibre_main, 0);
    fibres.push_back(std::move(fibre));
  }
}

// Runs a warp until each of its threads has ended or waits for the block.
inline void run_warp(size_t warp) {
  for (;;) {
    size_t at_warp = 0, done = 0;
    for (size_t k = 0; k < 32; ++k) {
      const size_t i = warp * 32 + (backwards ? 31 - k : k);
      if (fibres[i]->state == State::ready) resume(i);
      at_warp += fibres[i]->state == State::at_warp;
      done += fibres[i]->state == State::done;
    }
    if (at_warp == 0) return;
    if (at_warp != 32) fail("a shuffle was reached by some threads of a warp only");
    for (size_t k = 0; k < 32; ++k) fibres[warp * 32 + k]->state = State::ready;
  }
}

inline void run_block(size_t n) {
  for (size_t i = 0; i < n; ++i) fibres[i]->state = State::ready;
  for (;;) {
    for (size_t w = 0; w < n / 32; ++w) run_warp(backwards ? n / 32 - 1 - w : w);
    size_t done = 0;
    for (size_t i = 0; i < n; ++i) done += fibres[i]->state == State::done;
    if (done == n) return;
    if (done) fail("a barrier was reached by some threads of a block only");
    for (size_t i = 0; i < n; ++i) fibres[i]->state = State::ready;
  }
}

// A launch: the body once for every thread of every block.
inline void launch(Index grid, unsigned threads, size_t shared_bytes, std::function<void()> call) {
  make_fibres(threads);
  body = std::move(call);
  gridDim = grid;
  blockDim = {threads, 1, 1};
  const size_t n = static_cast<size_t>(grid.x) * grid.y * grid.z;
  for (size_t i = 0; i < n; ++i) {
    const size_t b = backwards ? n - 1 - i : i;
    const auto part = [](size_t k) { return static_cast<unsigned>(k); };
    blockIdx = {part(b % grid.x), part(b / grid.x % grid.y), part(b / grid.x / grid.y)};
    const size_t poisoned = shared_bytes + 256;
    std::memset(shared_memory, 0xff, poisoned);
    run_block(threads);
    const auto* bytes = reinterpret_cast<const unsigned char*>(shared_memory);
    for (size_t k = shared_bytes; k < poisoned; ++k)
      if (bytes[k] != 0xff) fail("a block wrote behind its shared memory");
  }
}

// What lane `from` of the warp put in. Two buffers in turn: a lane may be one exchange ahead of the others.
template <typename T>
T exchange(T value, unsigned from) {
  Fibre& self = *fibres[running];
  auto& buffer = exchanged[threadIdx.x / 32][self.turn ^= 1];
  std::memcpy(&buffer[threadIdx.x % 32], &value, 4);
  wait(State::at_warp);
  std::memcpy(&value, &buffer[from], 4);
  return value;
}

}  // namespace shim

inline uint2 read_8(const uint8_t* at) {
  uint2 v;
  std::memcpy(&v, at, 8);
  return v;
}
inline uint32_t read_4(const uint8_t* at) {
  uint32_t v;
  std::memcpy(&v, at, 4);
  return v;
}
inline uint32_t read_2(const uint8_t* at) {
  uint16_t v;
  std::memcpy(&v, at, 2);
  return v;
}
inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

// Copies that were asked for are made when the thread waits for them, and not before.
inline void bring(void* to, const void* from, size_t n, bool there) {
  shim::fibres[shim::running]->asked.push_back({to, there ? from : nullptr, n});
}
inline void bring_16(void* to, const void* from, bool there) { bring(to, from, 16, there); }
inline void bring_4(void* to, const void* from, bool there) { bring(to, from, 4, there); }
inline void all_brought() {
  for (const shim::Copy& copy : shim::fibres[shim::running]->asked)
    if (copy.from) std::memcpy(copy.to, copy.from, copy.n);
    else std::memset(copy.to, 0, copy.n);
  shim::fibres[shim::running]->asked.clear();
}

inline void __syncthreads() { shim::wait(shim::State::at_block); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return shim::exchange(value, (threadIdx.x % 32) ^ mask); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int step, int width) {
  const unsigned lane = threadIdx.x % 32;
  return shim::exchange(value, static_cast<int>(lane) % width + step < width ? lane + step : lane);
}
inline int dp4a(uint32_t a, uint32_t b, int sum) {
  for (int k = 0; k < 32; k += 8) sum += static_cast<int>(static_cast<int8_t>(a >> k)) * static_cast<int8_t>(b >> k);
  return sum;
}
// The tensor cores' steps on int8, d = a b + c in 32 bits, from the PTX ISA's tables of fragments ("Matrix Fragments for
// mma.m16n8k32" and "for mma.m8n8k16", types .s8 and .s32). What lane 4 g + t holds, element i being byte i % 4 of
// register i / 4, the lowest byte first:
//
//                  m16n8k32                                              m8n8k16
//   a  row         g for i in 0..3 and 8..11, else g + 8    16 elements  g                 4 elements
//      column      4 t + i % 4, and 16 more from i = 8                   4 t + i
//   b  row         4 t + i % 4, and 16 more from i = 4       8 elements  4 t + i           4 elements
//      column      g                                                     g
//   c  row         g for i in 0..1, else g + 8               4 elements  g                 2 elements
//      column      2 t + i % 2                                           2 t + i
//
// A row of a meets a column of b. Sums wrap as the card's do; products of one step cannot.
inline int8_t byte_of(const uint32_t* registers, unsigned i) {
  return static_cast<int8_t>(registers[i / 4] >> 8 * (i % 4));
}
inline shim::Fragments& next_fragments() {
  return shim::fragments[threadIdx.x / 32][shim::fibres[shim::running]->turn ^= 1];
}
inline int dotted(int sum, const int8_t* row, const int8_t* column, unsigned n) {
  for (unsigned k = 0; k < n; ++k) sum += row[k] * column[k];
  return sum;
}
inline void mma_16x8x32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  shim::Fragments& all = next_fragments();
  for (unsigned i = 0; i < 16; ++i) {
    const bool upper = i < 4 || (8 <= i && i < 12);
    all.a[upper ? g : g + 8][4 * t + i % 4 + (i < 8 ? 0 : 16)] = byte_of(a, i);
  }
  for (unsigned i = 0; i < 8; ++i) all.b[g][4 * t + i % 4 + (i < 4 ? 0 : 16)] = byte_of(b, i);
  shim::wait(shim::State::at_warp);
  for (unsigned i = 0; i < 4; ++i) d[i] = dotted(c[i], all.a[i < 2 ? g : g + 8], all.b[2 * t + i % 2], 32);
}
inline void mma_8x8x16(int& d0, int& d1, uint32_t a, uint32_t b) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  shim::Fragments& all = next_fragments();
  for (unsigned i = 0; i < 4; ++i) all.a[g][4 * t + i] = byte_of(&a, i);
  for (unsigned i = 0; i < 4; ++i) all.b[g][4 * t + i] = byte_of(&b, i);
  shim::wait(shim::State::at_warp);
  d0 = dotted(d0, all.a[g], all.b[2 * t], 16);
  d1 = dotted(d1, all.a[g], all.b[2 * t + 1], 16);
}
inline int __float_as_int(float f) {
  int bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// IEEE half precision by arithmetic on powers of two; the kernels use the card's own instructions.
inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float f = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24);
  if (exponent == 31) f = mantissa ? NAN : INFINITY;
  return h >> 15 ? -f : f;
}
inline uint16_t float_to_half(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (std::isnan(f)) return sign | 0x7e00;
  f = std::fabs(f);
  if (f >= 65520.0f) return sign | 0x7c00;
  if (f < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::rint(std::ldexp(f, 24)));
  int exponent;
  const float fraction = std::frexp(f, &exponent);  // in [0.5, 1)
  const int steps = static_cast<int>(std::rint(std::ldexp(fraction, 11)));  // 1024 to 2048
  return sign | static_cast<uint16_t>(steps - 1024 + ((exponent + 14) << 10));
}
