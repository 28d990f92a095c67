"""The driver without a card, built once for all tests here, and a machine of one's choice around it; or a real card."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from real_driver import RealDriver

from kimi_lite.runtime.cuda.driver import Card

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c++20 -O2 -ffp-contract=off -U_FORTIFY_SOURCE"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    if os.environ.get("KIMI_LITE_TEST_CARD"):
        return RealDriver()
    if sys.platform != "linux":
        pytest.skip("the driver without a card is built on Linux: it needs ucontext and mmap")
    here, out = ROOT / "tests" / "cuda", tmp_path_factory.mktemp("cuda") / "libfake_cuda.so"
    includes = [f"-I{ROOT / 'runtime' / 'cuda'}", f"-I{here}"]
    command = [
        "c++",
        *FLAGS.split(),
        "-shared",
        "-fPIC",
        *includes,
        str(here / "fake_cuda.cpp"),
        "-o",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return FakeDriver(out)


@pytest.fixture
def fake(built: FakeDriver, compiled_once: None) -> Iterator[FakeDriver]:
    """An ordinary machine with one card, on which no engine of an earlier test holds memory any more."""
    gc.collect()
    built.machine()
    built.order(backwards=False)
    yield built
    built.machine()


@pytest.fixture
def card(fake: FakeDriver) -> Iterator[Card]:
    """That card, opened; all that a test takes of its memory has to come back when it is closed."""
    card = Card(fake.path)
    yield card
    card.close()
    assert fake.used() == 0


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def compiled_once(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share compiled kernels among themselves, and nothing with whoever runs them."""
    monkeypatch.setenv("KIMI_LITE_KERNEL_CACHE", str(kernel_cache))
