"""What the host side does on bad days, and what it keeps between runs; the driver is tests/cuda/fake_cuda.cpp."""

import ctypes
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver

from kimi_lite.errors import KimiLiteError
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda import program
from kimi_lite.runtime.cuda.cuda import CudaDevice
from kimi_lite.runtime.cuda.device import DeviceLostError, DeviceMemoryError, NoDeviceError
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.program import NoCompilerError, Nvrtc
from kimi_lite.runtime.kernels import latent_cache_bytes
from kimi_lite.runtime.weights import Weights, open_weights

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(NANO)


@pytest.fixture
def loaded(fake: FakeDriver, weights: Weights) -> Iterator[CudaDevice]:
    """Nano's first two layers, one dense, ready for a step."""
    device = CudaDevice(fake.path)
    for index in range(2):
        device.load_layer(index, weights.layers[index], None)
    device.load_ends(weights)
    device.reserve_cache(64, streams=False)
    yield device
    device.close()


def begin(device: CudaDevice, weights: Weights, T: int = 1) -> None:
    c = weights.config
    angle_TR = np.zeros((T, c.rope_dim // 2), np.float32)
    device.begin(np.ones((T, c.hidden_size), np.float32), angle_TR, angle_TR, 0)


# ---- no card


def test_a_driver_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoDeviceError, match=r"driver's library .*libcuda.* does not load .*run on the CPU$"):
        Card(str(tmp_path / "libcuda.so.1"))


def test_a_driver_that_shows_no_card(fake: FakeDriver) -> None:
    fake.machine(devices=0)
    with pytest.raises(NoDeviceError, match=r"shows no card.*CUDA_VISIBLE_DEVICES"):
        Card(fake.path)


@pytest.mark.parametrize("ordinal", [2, -1])
def test_a_card_that_is_not_among_those_shown(fake: FakeDriver, ordinal: int) -> None:
    fake.machine(devices=2)
    with pytest.raises(NoDeviceError, match=f"^card {ordinal} was asked for, the driver shows 2"):
        Card(fake.path, ordinal)


def test_the_roomiest_of_several_cards_is_taken_unless_one_is_named(fake: FakeDriver) -> None:
    fake.machine(devices=3)  # each has more memory than the one before
    for ordinal, name in ((None, "paper card 2"), (1, "paper card 1")):
        card = Card(fake.path, ordinal)
        assert card.name == name
        card.close()


def test_a_driver_that_does_not_start(fake: FakeDriver) -> None:
    fake.fail("cuInit", 999)
    with pytest.raises(NoDeviceError, match=r"does not start .*CUDA error 999"):
        Card(fake.path)


def test_a_driver_that_is_too_old_for_graphs(fake: FakeDriver) -> None:
    fake.machine(version=11020)
    with pytest.raises(NoDeviceError, match=r"supports CUDA 11\.2; kimi-lite needs 11\.4"):
        Card(fake.path)


def test_a_driver_that_is_too_old_for_the_compiler_beside_us(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    fake.machine(version=11080)
    with pytest.raises(
        NoCompilerError, match=r"supports CUDA 11\.8, but NVRTC .*pip install nvidia-cuda-nvrtc-cu11$"
    ):
        Card(fake.path)


@pytest.mark.parametrize(
    ("capability", "words"), [(61, r"6\.1; .*need 7\.5"), (990, r"99\.0; install a newer one")]
)
def test_cards_too_old_and_too_new(fake: FakeDriver, capability: int, words: str) -> None:
    fake.machine(capability=capability)
    with pytest.raises(NoCompilerError, match=words):
        Card(fake.path)


# ---- memory


def test_a_layer_that_does_not_fit_leaves_nothing_behind(fake: FakeDriver, weights: Weights) -> None:
    fake.machine(memory=300_000)
    device = CudaDevice(fake.path)
    with pytest.raises(
        DeviceMemoryError, match=r"layer 0 takes \d\.\d MB of graphics memory, 0\.3 MB are free; .*--context"
    ):
        device.load_layer(0, weights.layers[0], None)
    assert fake.used() == 0
    assert device.free_bytes() == 300_000
    device.close()


def test_a_cache_that_does_not_fit_says_so_and_a_smaller_one_then_works(
    fake: FakeDriver, weights: Weights
) -> None:
    fake.machine(memory=100_000_000)
    device = CudaDevice(fake.path)
    device.load_layer(0, weights.layers[0], None)
    device.load_ends(weights)
    before = fake.used()
    with pytest.raises(DeviceMemoryError, match="the cache of 1000000 tokens takes"):
        device.reserve_cache(1_000_000, streams=False)
    with pytest.raises(DeviceMemoryError, match="working memory for a context of 200000 tokens"):
        device.reserve_cache(200_000, streams=False)
    assert fake.used() == before
    device.reserve_cache(64, streams=False)
    small = fake.used()
    device.reserve_cache(96, streams=False)  # instead of the other
    assert fake.used() - small < small - before
    begin(device, weights)
    device.attend(0)
    assert np.isfinite(device.logits()).all()
    device.close()
    assert fake.used() == 0


def test_what_a_planner_is_told_is_what_is_taken(fake: FakeDriver, weights: Weights) -> None:
    c, context = weights.config, 300
    device = CudaDevice(fake.path)
    for index, layer in enumerate(weights.layers):
        device.load_layer(index, layer, None)
    device.load_ends(weights)
    before = fake.used()
    device.reserve_cache(context, streams=False)
    caches = c.n_layers * sum(latent_cache_bytes(context, c.kv_rank, c.rope_dim))
    assert fake.used() - before == caches + sizes_of(weights).workspace_bytes(context)
    device.close()


# ---- accidents


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("cuLaunchKernel", r"launching rms_norm: .*CUDA error 719"),
        ("cuStreamSynchronize", r"cuStreamSynchronize: .*CUDA error 719"),
        ("cuMemcpyHtoDAsync_v2", "CUDA error 719"),
        ("cuGraphLaunch", "CUDA error 719"),
        ("cuGraphInstantiateWithFlags", "CUDA error 719"),
    ],
)
def test_a_failure_loses_the_card_for_good(
    fake: FakeDriver, loaded: CudaDevice, weights: Weights, function: str, words: str
) -> None:
    fake.fail(function, 719)
    with pytest.raises(
        DeviceLostError, match=f"^paper card 0 failed .*{words}.*start again, or run on the CPU$"
    ):
        step(loaded, weights)
    fake.machine()  # whatever the driver says from now on
    with pytest.raises(DeviceLostError, match="CUDA error 719"):
        step(loaded, weights)
    with pytest.raises(DeviceLostError, match="CUDA error 719"):
        loaded.free_bytes()


def step(device: CudaDevice, weights: Weights) -> None:
    begin(device, weights)
    device.attend(0)
    device.logits()


def test_close_gives_everything_back_even_after_a_loss_and_twice(
    fake: FakeDriver, loaded: CudaDevice, weights: Weights
) -> None:
    fake.fail("cuStreamSynchronize", 719)
    with pytest.raises(DeviceLostError):
        step(loaded, weights)
    fake.machine()
    loaded.close()
    loaded.close()
    assert fake.used() == 0
    assert fake.calls("cuDevicePrimaryCtxRelease_v2") == 1
    with pytest.raises(DeviceLostError, match="CUDA error 719"):
        loaded.free_bytes()


def test_a_failure_while_opening_gives_the_context_back(fake: FakeDriver) -> None:
    fake.fail("cuModuleGetFunction", 500, after=3)
    with pytest.raises(DeviceLostError, match="cuModuleGetFunction"):
        Card(fake.path)
    assert fake.calls("cuDevicePrimaryCtxRelease_v2") == 1


# ---- launches


def test_one_token_is_one_graph_and_no_waiting_in_between(
    fake: FakeDriver, loaded: CudaDevice, weights: Weights
) -> None:
    def whole_step(T: int) -> None:
        begin(loaded, weights, T)
        for index in range(2):
            loaded.attend(index)
            loaded.route(index, wanted=False)
            loaded.run_experts(index)
            loaded.add_experts(index, None)
        loaded.logits()

    whole_step(1)
    kernels, waits = fake.calls("cuLaunchKernel"), fake.calls("cuStreamSynchronize")
    for n in (2, 3):
        whole_step(1)
        assert fake.calls("cuGraphLaunch") == n
        assert fake.calls("cuStreamSynchronize") == waits + n - 1  # for the logits
    assert fake.calls("cuLaunchKernel") == kernels  # captured once, never launched one by one
    whole_step(2)
    assert fake.calls("cuGraphLaunch") == 3


def test_an_interruption_while_recording_leaves_the_card_usable(
    fake: FakeDriver, loaded: CudaDevice, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kimi_lite.runtime.cuda.halves.product", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(loaded, weights)
    step(loaded, weights)
    assert np.isfinite(loaded.residual()).all()


def test_another_thread_may_go_on(fake: FakeDriver, loaded: CudaDevice, weights: Weights) -> None:
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(step, loaded, weights).result()
            step(loaded, weights)
    assert fake.calls("cuCtxSetCurrent") == 5


def test_experts_on_the_cpu_make_two_graphs_a_layer(fake: FakeDriver, weights: Weights) -> None:
    device = CudaDevice(fake.path)
    device.load_layer(0, weights.layers[1], [])
    device.load_ends(weights)
    device.reserve_cache(64, streams=False)
    A, D = weights.config.n_active, weights.config.hidden_size
    for _ in range(3):
        begin(device, weights)
        device.attend(0)
        assert device.route(0, wanted=True) is not None
        launched = fake.calls("cuGraphLaunch")
        device.run_experts(0)
        assert fake.calls("cuGraphLaunch") == launched + 1  # at once, beside the CPU's experts
        device.add_experts(0, np.zeros((A, D), np.float32))
        device.logits()
    assert fake.calls("cuStreamEndCapture") == 3
    device.close()


def test_what_a_kernel_takes_is_read_from_its_source(fake: FakeDriver) -> None:
    signatures = program.signatures()
    written = re.findall(r"^KERNEL", program.source(), re.MULTILINE)
    assert len(signatures) == len(written)
    c_int, c_u64, c_float = ctypes.c_int, ctypes.c_uint64, ctypes.c_float
    assert signatures["rms_norm"] == (c_u64, c_u64, c_int, c_float, c_u64, program.Rows)
    assert signatures["heads_8"] == (program.Matrix, c_u64, program.Rows, c_int, program.Rows)
    card = Card(fake.path)
    with pytest.raises(AssertionError, match="rms_norm takes 6 arguments, 1 were given"):
        card.launch("rms_norm", (1,), 32, 0, 1)
    card.close()


# ---- compiled kernels, kept


def test_compiled_kernels_are_kept_checked_and_safe_to_lose(
    fake: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def compile_quickly(self: Nvrtc, text: str, target: int) -> bytes:
        asked.append(target)
        return b"\x7fELF" + str(target).encode()

    monkeypatch.setattr(Nvrtc, "compile", compile_quickly)
    monkeypatch.setenv("KIMI_LITE_KERNEL_CACHE", str(tmp_path / "kernels"))
    nvrtc = Nvrtc()
    first = program.compiled(86, nvrtc)
    assert (first.cubin, first.from_cache) == (b"\x7fELF86", False)
    assert program.compiled(86, nvrtc) == program.Program(first.cubin, True)
    assert not program.compiled(89, nvrtc).from_cache  # another card, another entry
    monkeypatch.setattr(nvrtc, "version", (1, 0))
    assert not program.compiled(86, nvrtc).from_cache  # another compiler, another entry
    entries = sorted((tmp_path / "kernels").iterdir())
    assert len(entries) == 3
    assert all(entry.suffix == ".cubin" and entry.stat().st_mode & 0o077 == 0 for entry in entries)
    nvrtc = Nvrtc()
    for damage in (b"", b"\x7fELF86", entries[0].read_bytes()[:-1], bytes(100)):
        for entry in entries:
            entry.write_bytes(damage)
        assert program.compiled(86, nvrtc) == program.Program(b"\x7fELF86", False)
    for entry in (tmp_path / "kernels").iterdir():
        entry.unlink()
    assert not program.compiled(86, nvrtc).from_cache
    monkeypatch.setenv("KIMI_LITE_KERNEL_CACHE", "off")
    assert not program.compiled(86, nvrtc).from_cache
    monkeypatch.setenv("KIMI_LITE_KERNEL_CACHE", str(NANO / "below a file"))
    assert program.compiled(86, nvrtc).cubin == b"\x7fELF86"
    assert asked == [86, 89, 86, 86, 86, 86, 86, 86, 86, 86]


def test_a_kernel_that_does_not_compile_says_what_the_compiler_says() -> None:
    with pytest.raises(KimiLiteError, match=r"do not compile for sm_86: kernels\.cu\(1\): error: .*unknown"):
        Nvrtc().compile("__device__ int x = unknown;", 86)


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(NoCompilerError, match=r"not installed: pip install nvidia-cuda-nvrtc$"):
        Nvrtc()
    with pytest.raises(NoCompilerError, match=r"does not load .*install it again"):
        Nvrtc(str(tmp_path / "libnvrtc.so.13"))
