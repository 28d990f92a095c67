"""The kernels without Python around them: every instruction set gives the same digests, NEON too, under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "native"
FLAGS = ["-O2", "-std=c++20", "-ffp-contract=off", f"-I{NATIVE}"]
X86 = {
    "kernels_scalar.cpp": "",
    "kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "kernels_avxvnni.cpp": "-mavx2 -mfma -mf16c -mavxvnni",
    "kernels_avx512vnni256.cpp": "-mavx2 -mfma -mf16c -mavx512vl -mavx512vnni",
    "kernels_avx512vnni.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
    "vision_scalar.cpp": "",
    "vision_avx2.cpp": "-mavx2 -mfma -mf16c",
    "vision_avx512vnni.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni",
}
ARM = {
    "kernels_scalar.cpp": "",
    "kernels_neon.cpp": "-march=armv8.2-a+dotprod",
    "vision_scalar.cpp": "",
    "vision_neon.cpp": "-march=armv8.2-a+dotprod",
}


def digests(compiler: str, sources: dict[str, str], run: list[str], folder: Path) -> dict[str, list[str]]:
    """Build the driver with each source's flags, run it: instruction set -> its lines."""
    objects = []
    for source, flags in sources.items():
        objects.append(str(folder / f"{source}.o"))
        subprocess.run(
            [compiler, *FLAGS, *flags.split(), "-c", str(NATIVE / source), "-o", objects[-1]], check=True
        )
    program = str(folder / "digest")
    driver = str(Path(__file__).with_name("digest.cpp"))
    static = ["-static"] if run else []
    subprocess.run([compiler, *FLAGS, *static, driver, *objects, "-o", program], check=True)
    out: dict[str, list[str]] = {}
    for line in subprocess.run([*run, program], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    ):
        name, _, rest = line.partition(" ")
        if rest and rest != "does not run here":
            out.setdefault(name, []).append(rest)
    return out


@pytest.mark.parity
def test_neon_under_an_emulator_gives_the_bits_of_plain_cpp_here(tmp_path: Path) -> None:
    here = digests("c++", X86, [], tmp_path)
    assert len(here["scalar"]) == 48
    assert len(here["tower:scalar"]) == 37
    for name, lines in here.items():
        assert lines == here["tower:scalar" if name.startswith("tower:") else "scalar"], name
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("NEON was not run: it needs g++-aarch64-linux-gnu and qemu-user")
    there = digests(compiler, ARM, [emulator, "-cpu", "max"], tmp_path)
    assert set(there) == {"scalar", "neon", "tower:scalar", "tower:neon"}
    assert there["neon"] == there["scalar"] == here["scalar"]
    assert there["tower:neon"] == there["tower:scalar"] == here["tower:scalar"]
