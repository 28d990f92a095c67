"""A kernel for one program: runs a static executable for 64-bit Arm Linux, which may write and end, in the Unicorn emulator."""

import struct
from pathlib import Path

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc
from unicorn.arm64_const import (
    UC_ARM64_REG_PC,
    UC_ARM64_REG_SP,
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X1,
    UC_ARM64_REG_X2,
    UC_ARM64_REG_X8,
    UC_CPU_ARM64_MAX,
)

PAGE = 4096
STACK, STACK_SIZE = 0x7000_0000_0000, 1 << 20
DOT_PRODUCT = 1 << 20  # HWCAP_ASIMDDP
AT_HWCAP = 16
WRITE, EXIT = 64, 93  # system calls


def run(program: Path) -> bytes:
    """What the program writes until it ends with status 0; RuntimeError if it ends otherwise."""
    machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM, UC_CPU_ARM64_MAX)
    elf = program.read_bytes()
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    for i in range(count):
        kind, _, offset, address, _, in_file, in_memory = struct.unpack_from(
            "<IIQQQQQ", elf, headers + i * size
        )
        if kind == 1:  # PT_LOAD
            first, last = address // PAGE * PAGE, -(-(address + in_memory) // PAGE) * PAGE
            machine.mem_map(first, last - first)
            machine.mem_write(address, elf[offset : offset + in_file])
    machine.mem_map(STACK, STACK_SIZE)
    words = (0, 0, 0, AT_HWCAP, DOT_PRODUCT, 0, 0)  # no arguments, no environment, the auxiliary vector
    top = STACK + STACK_SIZE - 64
    machine.mem_write(top, struct.pack("<7Q", *words))
    machine.reg_write(UC_ARM64_REG_SP, top)

    written = bytearray()
    status: list[int] = []

    def call(_machine: Uc, _number: int, _data: object) -> None:
        x0, x1, x2, number = (
            machine.reg_read(r) for r in (UC_ARM64_REG_X0, UC_ARM64_REG_X1, UC_ARM64_REG_X2, UC_ARM64_REG_X8)
        )
        if number == WRITE:
            written.extend(machine.mem_read(x1, x2))
            machine.reg_write(UC_ARM64_REG_X0, x2)
        else:
            status.append(x0 if number == EXIT else -1)
            machine.emu_stop()

    machine.hook_add(UC_HOOK_INTR, call)
    machine.emu_start(entry, 0)
    if status != [0]:
        raise RuntimeError(f"{program} ended with {status}, at {machine.reg_read(UC_ARM64_REG_PC):#x}")
    return bytes(written)
