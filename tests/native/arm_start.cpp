// All of a C library that digest.cpp needs on 64-bit Arm Linux, so that the cross compiler has none to build: a program that
// writes, ends, and takes memory from a fixed piece and never gives it back.
#include <stddef.h>
#include <stdint.h>

extern "C" int main();

namespace {
long call(long number, long a, long b, long c) {
  register long x0 asm("x0") = a, x1 asm("x1") = b, x2 asm("x2") = c, x8 asm("x8") = number;
  asm volatile("svc 0" : "+r"(x0) : "r"(x1), "r"(x2), "r"(x8) : "memory");
  return x0;
}

const uint64_t* auxiliary;  // pairs of type and value, ending with type 0
alignas(64) uint8_t heap[64 << 20];
size_t taken = 0;
}  // namespace

extern "C" {
asm(".globl _start\n_start:\n  mov x0, sp\n  bl begin\n");

void begin(const uint64_t* stack) {  // the number of arguments, they, 0, the environment, 0, the auxiliary vector
  const uint64_t* at = stack + 1 + stack[0] + 1;
  while (*at) ++at;
  auxiliary = at + 1;
  call(93, main(), 0, 0);  // exit
}

unsigned long getauxval(unsigned long type) {
  for (const uint64_t* at = auxiliary; at[0]; at += 2)
    if (at[0] == type) return at[1];
  return 0;
}

long write(int file, const void* data, size_t n) { return call(64, file, reinterpret_cast<long>(data), static_cast<long>(n)); }

void* malloc(size_t n) {
  void* at = heap + taken;
  taken += (n + 63) / 64 * 64;
  if (taken > sizeof heap) __builtin_trap();
  return at;
}
void* calloc(size_t n, size_t size) { return malloc(n * size); }  // the heap begins as zeros and nothing is used twice
void free(void*) {}

void* memcpy(void* to, const void* from, size_t n) {
  for (size_t i = 0; i < n; ++i) static_cast<uint8_t*>(to)[i] = static_cast<const uint8_t*>(from)[i];
  return to;
}
void* memmove(void* to, const void* from, size_t n) {
  if (to <= from) return memcpy(to, from, n);
  while (n--) static_cast<uint8_t*>(to)[n] = static_cast<const uint8_t*>(from)[n];
  return to;
}
void* memset(void* to, int byte, size_t n) {
  for (size_t i = 0; i < n; ++i) static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(byte);
  return to;
}
size_t strlen(const char* text) {
  size_t n = 0;
  while (text[n]) ++n;
  return n;
}
}
