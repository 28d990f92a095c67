// Executes the one instruction of AVX-VNNI that the kernels use, VEX-encoded vpdpbusd, for a processor that has AVX2 but
// not this: `execute_vpdpbusd()` installs a handler of the invalid-instruction signal that decodes it, changes the saved
// registers and goes on behind it. Linux on x86-64. Written from Intel's manual (volume 2, vpdpbusd, and volume 1,
// chapter 13, for where the saved state has the registers); anything else that is invalid ends the program.
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

namespace {
uint32_t upper_halves;  // where the saved state has bits 128 to 255 of the registers
constexpr int kGeneral[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

[[noreturn]] void give_up() {
  constexpr char text[] = "an invalid instruction that is not vpdpbusd at 256 bits\n";
  (void)!write(2, text, sizeof text - 1);
  _exit(1);
}

void execute(int, siginfo_t*, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* code = reinterpret_cast<const uint8_t*>(machine.gregs[REG_RIP]);
  // C4, inverted R X B and the map 0F38, then W = 0, inverted vvvv, L = 1 for 256 bits, the prefix 66; opcode 50.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x50) give_up();
  const int r = code[1] & 0x80 ? 0 : 8, x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
  const int mode = code[4] >> 6, low = code[4] & 7;
  const int sums = (code[4] >> 3 & 7) | r, unsigned_bytes = ~code[2] >> 3 & 15;
  code += 5;

  auto* state = reinterpret_cast<uint8_t*>(machine.fpregs);
  auto* present = reinterpret_cast<uint64_t*>(state + 512);  // components that are not in their initial state, zeros
  auto* xmm = state + 160;
  auto* ymm = state + upper_halves;
  if (!(*present & 2)) memset(xmm, 0, 256);
  if (!(*present & 4)) memset(ymm, 0, 256);
  *present |= 6;
  auto load = [&](int n, uint8_t* to) {
    memcpy(to, xmm + 16 * n, 16);
    memcpy(to + 16, ymm + 16 * n, 16);
  };

  uint8_t u[32];
  int8_t s[32];
  int32_t sum[8];
  load(unsigned_bytes, u);
  load(sums, reinterpret_cast<uint8_t*>(sum));
  if (mode == 3) {
    load(low | b, reinterpret_cast<uint8_t*>(s));
  } else {
    uint64_t address = 0;
    const bool next_instruction = mode == 0 && low == 5;
    bool no_base = next_instruction;
    int base = low | b;
    if (low == 4) {
      const uint8_t sib = *code++;
      const int index = (sib >> 3 & 7) | x;
      if (index != 4) address = static_cast<uint64_t>(machine.gregs[kGeneral[index]]) << (sib >> 6);
      base = (sib & 7) | b;
      no_base = mode == 0 && (sib & 7) == 5;
    }
    if (!no_base) address += static_cast<uint64_t>(machine.gregs[kGeneral[base]]);
    if (mode == 1) {
      address += static_cast<int8_t>(*code++);
    } else if (mode == 2 || no_base) {
      int32_t displacement;
      memcpy(&displacement, code, 4);
      code += 4;
      address += displacement;
    }
    if (next_instruction) address += reinterpret_cast<uint64_t>(code);
    memcpy(s, reinterpret_cast<const void*>(address), sizeof s);
  }
  for (int i = 0; i < 32; ++i) sum[i / 4] += u[i] * s[i];
  memcpy(xmm + 16 * sums, sum, 16);
  memcpy(ymm + 16 * sums, sum + 4, 16);
  machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(code);
}
}  // namespace

void execute_vpdpbusd() {
  uint32_t size, ignored;
  __cpuid_count(0xd, 2, size, upper_halves, ignored, ignored);
  struct sigaction action{};
  action.sa_sigaction = execute;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}
