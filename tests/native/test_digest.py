"""The kernels without Python around them: every instruction set gives the same digests.

No processor is needed that has them: AVX-VNNI's one instruction is executed by vpdpbusd.cpp where it is missing, and NEON
runs in an emulator, built by clang, the compiler of the machines that have it.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from arm_linux import run

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "native"
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", f"-I{NATIVE}"]
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
X86 = {
    "kernels_scalar.cpp": "",
    "kernels_avx2.cpp": AVX2,
    "kernels_avxvnni.cpp": f"{AVX2} -mavxvnni",
    "kernels_avx512vnni256.cpp": f"{AVX2} -mavx512vl -mavx512vnni",
    "kernels_avx512vnni.cpp": AVX512,
    "kernels_zen4.cpp": f"{AVX512} -mavx512vbmi",
    "vision_scalar.cpp": "",
    "vision_avx2.cpp": AVX2,
    "vision_avx512vnni.cpp": AVX512,
}
ARM = dict.fromkeys(
    ("kernels_scalar.cpp", "kernels_neon.cpp", "vision_scalar.cpp", "vision_neon.cpp"),
    "-mcpu=generic+dotprod",
)
# Of C's and C++'s libraries only headers are used, so that the cross compiler need not build them; what stands in for C's must not
# be compiled into calls of itself.
START = {str(Path(__file__).with_name("arm_start.cpp")): "-ffreestanding -fno-builtin"}
FOR_ARM = ["-target", "aarch64-linux-musl"]
HEADERS_ONLY = ["-fno-exceptions", "-fno-rtti", "-D_LIBCPP_VERBOSE_ABORT(...)=__builtin_trap()"]

Digests = dict[str, list[str]]


def by_name(lines: str) -> Digests:
    """Instruction set -> its digests; those that cannot run here are left out."""
    out: Digests = {}
    for line in lines.splitlines():
        name, _, rest = line.partition(" ")
        if rest != "does not run here":
            out.setdefault(name, []).append(rest)
    return out


def compile_all(compiler: list[str], flags: list[str], sources: dict[str, str], folder: Path) -> list[str]:
    """The driver and each source with its flags: the object files."""
    all_sources = {str(Path(__file__).with_name("digest.cpp")): "", **sources}

    def compiled(source: str) -> str:
        out = str(folder / f"{Path(source).name}.o")
        own_flags = all_sources[source].split()
        subprocess.run(
            [*compiler, *FLAGS, *flags, *own_flags, "-c", str(NATIVE / source), "-o", out], check=True
        )
        return out

    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        return list(compilers.map(compiled, all_sources))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Digests:
    folder = tmp_path_factory.mktemp("here")
    emulator = str(Path(__file__).with_name("vpdpbusd.cpp"))
    objects = compile_all(["c++"], [], {**X86, emulator: ""}, folder)
    subprocess.run(["c++", *objects, "-o", str(folder / "digest")], check=True)
    done = subprocess.run([str(folder / "digest")], capture_output=True, text=True, check=True)
    return by_name(done.stdout)


@pytest.mark.parity
def test_every_instruction_set_of_this_processor_and_avx_vnni_give_the_bits_of_plain_cpp(
    here: Digests,
) -> None:
    assert len(here["scalar"]) == 437
    assert len(here["tower:scalar"]) == 37
    assert "avxvnni" in here
    for name, lines in here.items():
        assert lines == here["tower:scalar" if name.startswith("tower:") else "scalar"], name


@pytest.mark.parity
def test_neon_in_an_emulator_gives_the_bits_of_plain_cpp_here(
    here: Digests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    zig = [sys.executable, "-m", "ziglang"]
    objects = compile_all([*zig, "c++"], [*FOR_ARM, *HEADERS_ONLY], {**ARM, **START}, tmp_path)
    program = tmp_path / "digest"
    subprocess.run([*zig, "cc", *FOR_ARM, "-static", "-nostdlib", *objects, "-o", str(program)], check=True)
    there = by_name(run(program).decode())
    assert set(there) == {"scalar", "neon", "tower:scalar", "tower:neon"}
    assert there["neon"] == there["scalar"] == here["scalar"]
    assert there["tower:neon"] == there["tower:scalar"] == here["tower:scalar"]
