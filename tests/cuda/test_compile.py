"""The device program through NVIDIA's own compilers, for every generation of cards: it compiles, nothing spills."""

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_lite.runtime.cuda import program
from kimi_lite.runtime.cuda.program import Nvrtc

CARDS = {75: "RTX 20", 80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100", 120: "RTX 50"}
REGISTERS = 1 << 16  # of a multiprocessor, and the most that one block can have
# The low twelve bits of a machine instruction; what they are for the tensor cores' step on 8-bit integers was read off a
# kernel that does two of them and nothing else, compiled for each of the cards above.
OPCODE, IMMA = 0xFFF, 0x237
FORMS = {"product_32": 4, "heads_32": 4, "gate_up_32": 4, "down_jobs_32": 4, "scores_32": 1, "weigh_32": 1}
STEPS = 8  # of a tile's group: two row blocks, four times eight tokens


@pytest.mark.parametrize("target", CARDS)
def test_nvrtc_compiles_every_kernel(target: int) -> None:
    nvrtc = Nvrtc()
    assert nvrtc.target_for(target) == target
    cubin = nvrtc.compile(program.source(), target)
    assert cubin.startswith(b"\x7fELF")
    for kernel in program.signatures():
        assert f".text.{kernel}\0".encode() in cubin, f"{kernel} is not in the code for sm_{target}"
    steps = {kernel: n for kernel, n in tensor_core_steps(cubin).items() if n}
    assert set(steps) == set(FORMS)
    for kernel, forms in FORMS.items():  # Turing's steps are quarters; a compiler may unroll a loop
        assert steps[kernel] >= forms * STEPS * (4 if target < 80 else 1), kernel


def test_compilers_since_cuda_11_know_every_name_in_the_source() -> None:
    # A driver for CUDA 11 takes no newer compiler's code. With NVRTC 11.8 and 12.0 to 12.2 all of it compiled; they did not know
    # __dp4a, for one. A name that is added here has to be tried there.
    names = set(re.findall(r"\b__[a-z]\w+(?=\()", program.source()))
    assert names == {
        "__cvta_generic_to_shared",
        "__float_as_int",
        "__int_as_float",
        "__launch_bounds__",
        "__reduce_add_sync",
        "__reduce_max_sync",
        "__shfl_down_sync",
        "__shfl_xor_sync",
        "__syncthreads",
    }


@pytest.mark.parametrize(
    ("version", "options"), [((11, 8), []), ((12, 0), []), ((12, 1), ["--split-compile=0"])]
)
def test_compilers_that_can_use_all_cores(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], options: list[str]
) -> None:
    nvrtc, asked = Nvrtc(), list[list[str]]()
    compile_program = nvrtc._library.nvrtcCompileProgram

    def listening(made: Any, n: int, array: Any) -> Any:
        asked.append([option.decode() for option in array])
        return compile_program(made, n, array)

    monkeypatch.setattr(nvrtc._library, "nvrtcCompileProgram", listening)
    monkeypatch.setattr(nvrtc, "version", version)
    assert nvrtc.compile('extern "C" __global__ void nothing() {}', 86).startswith(b"\x7fELF")
    assert asked == [["--gpu-architecture=sm_86", *program.OPTIONS, *options]]


def tensor_core_steps(cubin: bytes) -> dict[str, int]:
    """How many each kernel's code has, from the sections of the ELF file; an instruction is 16 bytes."""
    table, n, names = (
        struct.unpack_from(kind, cubin, at)[0] for kind, at in (("<Q", 40), ("<H", 60), ("<H", 62))
    )
    sections = [struct.unpack_from("<II4Q", cubin, table + 64 * i) for i in range(n)]
    found = {}
    for name_at, _, _, _, at, size in sections:
        start = sections[names][4] + name_at
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            codes = np.frombuffer(cubin, "<u2", size // 2, at)[::8] & OPCODE
            found[name.removeprefix(".text.")] = int((codes == IMMA).sum())
    return found


def test_no_step_is_contracted_approximated_or_flushed() -> None:
    # Without a rounding mode in its name, a product or a sum may be fused with the next by the assembler.
    nvrtc = Nvrtc()
    words = ptx(nvrtc).decode()
    steps = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rsqrt|rcp|ex2|lg2)\.[\w.]*f32\b", words))
    assert steps == {
        "add.rn.f32",
        "sub.rn.f32",
        "mul.rn.f32",
        "fma.rn.f32",
        "div.rn.f32",
        "sqrt.rn.f32",
        "rcp.rn.f32",
    }


def ptx(nvrtc: Nvrtc) -> bytes:
    """What NVRTC hands to the assembler."""
    library, made, size = ctypes.CDLL(nvrtc.path), ctypes.c_void_p(), ctypes.c_size_t()
    options = [b"--gpu-architecture=compute_86", *(option.encode() for option in program.OPTIONS)]
    array = (ctypes.c_char_p * len(options))(*options)
    library.nvrtcCreateProgram(ctypes.byref(made), program.source().encode(), b"kernels.cu", 0, None, None)
    assert library.nvrtcCompileProgram(made, len(options), array) == 0
    library.nvrtcGetPTXSize(made, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(made, text)
    library.nvrtcDestroyProgram(ctypes.byref(made))
    return text.value


def test_a_card_between_two_targets_takes_the_older_of_its_own_generation() -> None:
    nvrtc = Nvrtc()
    assert nvrtc.target_for(121) in (120, 121)
    assert nvrtc.target_for(125) // 10 == 12


@pytest.mark.parity
@pytest.mark.parametrize("target", CARDS)
def test_nvcc_spills_nothing_and_every_block_fits_a_multiprocessor(target: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("spills were not looked at: that needs nvcc, of the CUDA toolkit")
    (tmp_path / "kernels.cu").write_text(program.source())
    command = [
        nvcc,
        *program.OPTIONS,
        f"-arch=sm_{target}",
        "-cubin",
        "-Xptxas",
        "-v",
        "kernels.cu",
        "-o",
        "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout + done.stderr
    assert "warning" not in words
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        words,
        re.DOTALL,
    )
    assert {kernel for kernel, *_ in found} == set(program.signatures())
    for kernel, stores, loads, registers in found:
        assert (stores, loads) == ("0", "0"), f"{kernel} spills on sm_{target}"
        # They are given out in eights. Two have more threads than 256; the others' launch bounds are arithmetic.cu's.
        per_thread = -(-int(registers) // 8) * 8
        bounds = {
            "KERNEL": 256,
            "KERNEL_OF_ONE": 2 * 256,
            "KERNEL_OF_EIGHT": 2 * 128,
            "KERNEL_OF_TILES": 3 * 128,
            "KERNEL_OF_HEADS": (2 if target < 80 else 3) * 512,
        }
        kind = re.search(rf"^(KERNEL\w*) {kernel}\(", program.source(), re.MULTILINE)
        assert kind
        threads = {"softmax": 1024, "deal": 1024}.get(kernel, bounds[kind[1]])
        assert per_thread * threads <= REGISTERS, f"{kernel}: {registers} registers"
