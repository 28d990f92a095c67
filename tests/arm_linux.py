"""A kernel for one program: runs a static executable for 64-bit Arm Linux in the Unicorn emulator and returns what it writes."""

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
HEAP, HEAP_SIZE = 0x6000_0000_0000, 64 << 20
DOT_PRODUCT = 1 << 20  # HWCAP_ASIMDDP
AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_HWCAP, AT_RANDOM = 3, 4, 5, 6, 16, 25
WRITE, WRITEV, EXIT_GROUP, SET_TID_ADDRESS, MUNMAP, MMAP = 64, 66, 94, 96, 215, 222  # system calls
NOT_IMPLEMENTED = -38  # ENOSYS


def run(program: Path) -> bytes:
    """What the program writes until it ends with status 0; RuntimeError if it ends otherwise."""
    machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM, UC_CPU_ARM64_MAX)
    elf = program.read_bytes()
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    table = 0
    for i in range(count):
        kind, _, offset, address, _, in_file, in_memory = struct.unpack_from(
            "<IIQQQQQ", elf, headers + i * size
        )
        if kind == 1:  # PT_LOAD
            first, last = address // PAGE * PAGE, -(-(address + in_memory) // PAGE) * PAGE
            machine.mem_map(first, last - first)
            machine.mem_write(address, elf[offset : offset + in_file])
            if offset <= headers < offset + in_file:
                table = address + headers - offset
    machine.mem_map(STACK, STACK_SIZE)
    machine.mem_map(HEAP, HEAP_SIZE)
    random = STACK + STACK_SIZE - 64
    auxiliary = {
        AT_PHDR: table,
        AT_PHENT: size,
        AT_PHNUM: count,
        AT_PAGESZ: PAGE,
        AT_HWCAP: DOT_PRODUCT,
        AT_RANDOM: random,
        0: 0,
    }
    words = [0, 0, 0, *(word for pair in auxiliary.items() for word in pair)]  # no arguments, no environment
    top = random - 512
    machine.mem_write(top, struct.pack(f"<{len(words)}Q", *words))
    machine.reg_write(UC_ARM64_REG_SP, top)

    written = bytearray()
    status: list[int] = []
    heap = HEAP

    def call(_machine: Uc, _number: int, _data: object) -> None:
        nonlocal heap
        x0, x1, x2, number = (
            machine.reg_read(r) for r in (UC_ARM64_REG_X0, UC_ARM64_REG_X1, UC_ARM64_REG_X2, UC_ARM64_REG_X8)
        )
        result = 0
        if number == WRITE:
            written.extend(machine.mem_read(x1, x2))
            result = x2
        elif number == WRITEV:
            for at, length in struct.iter_unpack("<QQ", machine.mem_read(x1, 16 * x2)):
                written.extend(machine.mem_read(at, length))
                result += length
        elif number == EXIT_GROUP:
            status.append(x0)
            machine.emu_stop()
        elif number == MMAP:
            result, heap = heap, heap + -(-x1 // PAGE) * PAGE
        elif number not in (MUNMAP, SET_TID_ADDRESS):
            result = NOT_IMPLEMENTED
        machine.reg_write(UC_ARM64_REG_X0, result & 0xFFFF_FFFF_FFFF_FFFF)

    machine.hook_add(UC_HOOK_INTR, call)
    machine.emu_start(entry, 0)
    if status != [0]:
        raise RuntimeError(f"{program} ended with {status}, at {machine.reg_read(UC_ARM64_REG_PC):#x}")
    return bytes(written)
