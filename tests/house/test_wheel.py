"""The wheel installs exactly one name, and carries the small model but not its training checkpoint."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kimi_lite.runtime.cuda.program import FILES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    # Two paths of its own: an editable install must not find its build folder rewritten under it. What that has compiled is
    # taken along.
    for built in (ROOT / "build").glob("cp{}{}-*".format(*sys.version_info)):
        shutil.copytree(built, out / "build")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)]
    command += ["--config-settings", f"build-dir={out / 'build'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.parity
def test_the_wheel_installs_exactly_one_name(wheel_names: list[str]) -> None:
    assert {n.split("/")[0] for n in wheel_names if ".dist-info" not in n} == {"kimi_lite"}


@pytest.mark.parity
def test_the_wheel_carries_what_people_run(wheel_names: list[str]) -> None:
    names = set(wheel_names)
    assert "kimi_lite/nano/kimi-vl-nano-int4.gguf" in names
    beside = "kimi_lite/nano/kimi-vl-nano-int4-mmproj.gguf"  # unless the file holds its image side itself
    assert (beside in names) == (ROOT / beside).exists()
    assert "kimi_lite/py.typed" in names
    assert any(n.startswith("kimi_lite/runtime/_kernels") for n in names)
    assert {f"kimi_lite/runtime/cuda/{file}" for file in FILES} <= names  # compiled on the user's machine
    assert not [n for n in names if n.endswith((".safetensors", ".cpp", ".h"))]
