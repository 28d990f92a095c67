"""Dense weights in bitsandbytes' formats: what they stand for, what their products may lose, and the engine with them.

Oracles: bitsandbytes' own decoder for nf4, PyTorch's rounding for bf16, float64 products, and the CPU engine's own layer
for the halves that are taken apart here. The engine runs on a simulated card, whose dense products are bitsandbytes' on
the CPU.
"""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional
import numpy as np
import pytest
import torch

import kimi_lite
from kimi_lite.api import nano_path
from kimi_lite.errors import DoesNotFitError, KimiLiteWarning, UsageError
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime import dense, kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.cost import layer_size, matrix_size, sizes_of
from kimi_lite.runtime.cuda.device import DeviceWrongError, NoDeviceError
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import PROOF, HybridModel
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.model import CpuModel, embedded, rope_tables
from kimi_lite.runtime.placement import MARGIN
from kimi_lite.runtime.weights import Weights, open_weights

CONTEXT = 300
CARD = 1_000_000_000
STEPS = len(PROOF) * (4 * 4 + 1)  # pieces of work of the two steps by which a card proves itself
# Rows and columns: whole blocks, blocks that cross rows, an odd half block, more scales than one float32 has.
SHAPES = ((64, 64), (48, 96), (3, 32), (512, 288))


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")
    monkeypatch.setenv("KIMI_LITE_DEVICE", "simulated:1G")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(nano_path())


def normal(seed: int, *shape: int) -> Float:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def prompt(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 800, n)]


# Formats


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_stands_for_what_bitsandbytes_decodes(shape: tuple[int, int]) -> None:
    w_OI = normal(1, *shape) * np.float32(0.03)
    # As one row, for bitsandbytes' AVX-512 code begins a block with each.
    values, state = bitsandbytes.functional.quantize_4bit(
        torch.from_numpy(w_OI).reshape(1, -1), quant_type="nf4", compress_statistics=True
    )
    theirs_OI = bitsandbytes.functional.dequantize_4bit(values, state).numpy().reshape(shape)
    matrix = dense.backend().quantized(w_OI, "nf4")
    np.testing.assert_array_equal(dense.floats(matrix), theirs_OI)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_loses_half_a_step_and_bf16_what_rounding_loses(shape: tuple[int, int]) -> None:
    w_OI = normal(2, *shape)
    as_int8 = dense.floats(dense.backend().quantized(w_OI, "int8"))
    # Half a step of largest / 127, and float16 before, of values up to the largest.
    most_O1 = np.abs(w_OI).max(1, keepdims=True).astype(np.float64)
    assert (np.abs(as_int8 - w_OI) <= most_O1 * (0.5 / 127 + 2 * dense.F16)).all()
    assert np.abs(as_int8 - w_OI).max() > 0.2 * most_O1.min() / 127  # it did round
    as_bf16 = dense.floats(dense.backend().quantized(w_OI, "bf16"))
    np.testing.assert_array_equal(as_bf16, torch.from_numpy(w_OI).bfloat16().float().numpy())


@pytest.mark.parametrize("layout", dense.LAYOUTS)
def test_sizes_are_those_of_the_data_and_bits_a_weight_as_said(weights: Weights, layout: str) -> None:
    outline = sizes_of(dense.outline(weights, layout))
    for index, layer in enumerate(weights.layers):
        quantized = dense.quantized(layer, layout)
        for matrix in dense.dense(quantized).values():
            assert matrix_size(matrix) == matrix.data.size
        assert layer_size(quantized) == outline.layers[index]
    head = dense.quantized_matrix(weights.head, layout)
    assert outline.head_bytes == head.data.size + weights.norm_D.nbytes
    assert outline.torch_bytes > 0 == sizes_of(weights).torch_bytes
    rows, columns = 11264, 2048
    bits = 8 * dense.n_bytes(layout, rows, columns) / (rows * columns)
    # nf4: 4 + 8 / 64 + 32 / (64 · 256), its table of 1 kB, and what aligning parts to 256 bytes leaves empty.
    said, tables = {
        "nf4": (4 + 8 / 64 + 32 / 64 / 256, 1024 + 4 + 4 * 256),
        "int8": (8 + 32 / columns, 256),
        "bf16": (16.0, 0),
    }[layout]
    assert said <= bits <= said + 8 * tables / (rows * columns)


def test_a_weight_that_float16_does_not_hold_is_refused_for_int8() -> None:
    with pytest.raises(UsageError, match="int8 rounds from float16, which ends at 65504"):
        dense.backend().quantized(np.full((32, 32), 7e4, np.float32), "int8")


# Products


@pytest.mark.parametrize("layout", dense.LAYOUTS)
@pytest.mark.parametrize("T", [1, 2, 9, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_stay_within_the_bound(layout: str, T: int, shape: tuple[int, int]) -> None:
    matrix = dense.backend().quantized(normal(3, *shape), layout)
    x_TI = normal(4, T, shape[1])
    for outliers in (0, 1):
        x_TI[:: T // 2 + 1, 5] *= 1 + 40 * outliers  # in some tokens only
        exact_TO, bound_TO = dense.bound(matrix, x_TI)
        y_TO = dense.backend().on_cpu(matrix)(x_TI)
        assert (np.abs(y_TO - exact_TO) <= bound_TO).all()


def swapped_halves(matrix: kernels.Matrix) -> None:
    values = dense.arrays(matrix)["values"]
    values[...] = values << 4 | values >> 4


def scaled(matrix: kernels.Matrix) -> None:
    dense.arrays(matrix)["scales"][...] *= np.float32(1.5)


def shifted(matrix: kernels.Matrix) -> None:
    dense.arrays(matrix)["values"][...] += 4  # the last bits of a bfloat16: 3 %


@pytest.mark.parametrize(("layout", "damage"), [("nf4", swapped_halves), ("int8", scaled), ("bf16", shifted)])
def test_a_wrong_product_is_beyond_the_bound(layout: str, damage: Callable[[kernels.Matrix], None]) -> None:
    matrix = dense.backend().quantized(normal(5, 256, 256), layout)
    x_TI = normal(6, 9, 256)
    exact_TO, bound_TO = dense.bound(matrix, x_TI)
    damage(matrix)
    wrong_TO = dense.backend().on_cpu(matrix)(x_TI)
    assert (np.abs(wrong_TO - exact_TO) > bound_TO).any()


def test_silu_stays_within_its_bound() -> None:
    both_TF = np.concatenate([normal(7, 5, 96) * 20, normal(8, 5, 96)], 1)
    both_TF[0, :4] = (0, -200, 88, -88)
    exact_TF, bound_TF = dense.silu_bound(both_TF)
    y_TF = dense.backend().silu_on_cpu(both_TF)
    assert (np.abs(y_TF - exact_TF) <= bound_TF).all()
    assert not (np.abs(y_TF * (1 + 2e-6) - exact_TF) <= bound_TF).all()


def test_the_halves_around_our_own_products_have_the_bits_of_the_kernels(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_rounded", lambda x_TI: x_TI)  # our own product rounds by itself
    ours, theirs = (LatentCache(weights.config, 64) for _ in range(2))
    start = 0
    for n in (9, 1, 20):
        x_TD = embedded(weights, np.asarray(prompt(n, n), np.int32), None)
        y_TD = x_TD.copy()
        cos_TR, sin_TR = rope_tables(weights.config, start, n)
        for index, layer in enumerate(weights.layers):
            matrices = dense.dense(layer)
            attention, f = layer.attention, layer.feed_forward
            dense.attend(
                attention,
                x_TD,
                cos_TR,
                sin_TR,
                ours.layers[index],
                start,
                lambda name, rows_TI, m=matrices: kernels.linear(m[name], rows_TI),  # type: ignore[misc]
            )
            kernels.attend(attention, y_TD, cos_TR, sin_TR, theirs.layers[index], start)
            np.testing.assert_array_equal(x_TD, y_TD)
            h_TD = kernels.rms_norm(x_TD, f.norm_D, f.eps)
            every_T = np.arange(n, dtype=np.int32)
            shared_TD = kernels.expert_outputs(f.shared, h_TD, np.zeros_like(every_T), every_T)
            dense.combine(f, h_TD, shared_TD, x_TD)
            kernels.feed_forward(f, y_TD)
            np.testing.assert_array_equal(x_TD, y_TD)
        start += n


def test_matrices_of_a_packed_mlp_are_those_that_it_multiplies(weights: Weights) -> None:
    f = weights.layers[1].feed_forward
    gate, up, down = (dense.floats(m).astype(np.float64) for m in dense.matrices(f.shared))
    h_TD = normal(9, 3, f.shared.D)
    every_T = np.arange(3, dtype=np.int32)
    y_TD = kernels.expert_outputs(f.shared, h_TD, np.zeros_like(every_T), every_T)
    g_TF = h_TD @ gate.T
    exact_TD = (g_TF / (1 + np.exp(-g_TF)) * (h_TD @ up.T)) @ down.T
    # int8 activations lose at most 1 / 127 of a group's largest twice: far less than any two matrices in a wrong place.
    assert np.linalg.norm(y_TD - exact_TD) < 0.02 * np.linalg.norm(exact_TD)


# The engine


def on_card(gpu_dense: str, path: Path | None = None, vram: int | None = None) -> Engine:
    engine = Engine(path or nano_path(), context=CONTEXT, vram=vram, gpu_dense=gpu_dense)
    assert isinstance(engine.model, HybridModel)
    return engine


@pytest.mark.parametrize("layout", dense.LAYOUTS)
def test_logits_do_not_depend_on_where_experts_lie_nor_on_going_back(weights: Weights, layout: str) -> None:
    sizes = sizes_of(dense.outline(weights, layout))
    least = sizes.fixed_bytes + sizes.cache_bytes(CONTEXT) + sizes.workspace_bytes(CONTEXT)
    some = round((least + 9.5 * sizes.layers[-1].expert_bytes) / (1 - MARGIN))
    all_here, few_here = on_card(layout), on_card(layout, vram=some)
    for engine, n_resident in ((all_here, 24), (few_here, 9)):
        assert isinstance(engine.model, HybridModel)
        assert engine.model.plan.n_resident == n_resident
        assert f"dense weights in {layout} by bitsandbytes" in engine.placement
    for step, n in enumerate([1, 30, 2, 200, 1, 1]):
        ids = prompt(step, n)
        assert np.array_equal(all_here.append(ids), few_here.append(ids))
    all_here.rewind(17)
    few_here.rewind(17)
    assert np.array_equal(all_here.append([5]), few_here.append([5]))


def test_the_error_falls_with_the_bits_and_none_has_the_bits_of_the_cpu(tmp_path: Path) -> None:
    """Against bf16 products of bf16 weights, on a file that holds them."""
    path = tmp_path / "bf16.gguf"
    quantize(nano_path().parent, path, to="bf16")
    ids = prompt(11, 60)
    cpu = Engine(path, context=CONTEXT)
    exact_V = cpu.append(ids).astype(np.float64)
    errors = {
        layout: float(np.linalg.norm(on_card(layout, path).append(ids) - exact_V)) for layout in dense.LAYOUTS
    }
    assert errors["nf4"] > 2 * errors["int8"] > 0
    assert errors["nf4"] > 2 * errors["bf16"] > 0
    assert errors["nf4"] < 0.5 * np.linalg.norm(exact_V)


def test_an_answer_says_in_what_format_and_a_card_that_fails_what_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = kimi_lite.load(context=CONTEXT, gpu_dense="int8")
    answer = model.ask("What is 38 + 47?")
    assert (answer.text, answer.stats.gpu_dense) == ("85", "int8")
    assert kimi_lite.load(context=CONTEXT, vram=0).ask("What is 38 + 47?").stats.gpu_dense is None
    monkeypatch.setattr(
        "kimi_lite.runtime.hybrid.find_device", lambda: SimulatedDevice(CARD, lost_after=STEPS + 30)
    )
    model = kimi_lite.load(context=CONTEXT, gpu_dense="int8")
    with pytest.warns(
        KimiLiteWarning, match=r"the CPU goes on.*with the file's own dense weights in place of int8"
    ):
        answer = model.ask("What is 38 + 47?")
    assert answer.stats.gpu_dense is None
    assert isinstance(model.engine, Engine)
    assert isinstance(model.engine.model, CpuModel)


class WrongProduct(SimulatedDevice):
    """One product of one layer is off, in a step as in the proof."""

    def run_dense(self, index: int | None, name: str, x_TI: Float) -> Float:
        y_TO = super().run_dense(index, name, x_TI)
        return y_TO * np.float32(1.3) if (index, name) == (self.at, self.product) else y_TO

    at: int | None = None
    product = "head"


class WrongKernel(SimulatedDevice):
    def add_experts(self, index: int, outputs_MD: Float | None) -> None:
        super().add_experts(index, outputs_MD)
        if len(self._x_TD) == 1:
            self._x_TD[0, 7] += 0.1


@pytest.mark.parametrize("layout", ["nf4", "bf16"])
@pytest.mark.parametrize(("index", "name"), [(None, "head"), (0, "up"), (2, "kv_a"), (3, "o"), (1, "silu")])
def test_a_card_with_a_wrong_product_is_not_used(
    monkeypatch: pytest.MonkeyPatch, layout: str, index: int | None, name: str
) -> None:
    class Wrong(WrongProduct):
        at, product = index, name

    card = Wrong(CARD)
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: card)
    with pytest.raises(DeviceWrongError, match=rf"products of {layout} weights \({name}\) beyond what"):
        on_card(layout)
    assert card.free_bytes() == CARD


def test_a_card_with_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: WrongKernel(CARD))
    with pytest.raises(DeviceWrongError, match="computes other values than the CPU"):
        on_card("nf4")


# What cannot be


def test_a_format_that_is_none_and_a_card_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--gpu-dense is 'fp4'; give nf4, int8 or bf16"):
        on_card("fp4")
    with pytest.raises(UsageError, match="--vram 0 keeps all on the CPU"):
        on_card("nf4", vram=0)
    with pytest.raises(UsageError, match=r"llama\.cpp runs the file as it is"):
        kimi_lite.load(nano_path(), engine="llama.cpp", gpu_dense="nf4")
    with pytest.raises(DoesNotFitError, match=r"are needed at least"):
        on_card("nf4", vram=100_000_000)  # PyTorch alone takes more
    monkeypatch.delenv("KIMI_LITE_DEVICE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NoDeviceError, match=r"a card was asked for, but.*--vram 0 without --gpu-dense runs"):
        on_card("nf4")


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(UsageError, match=r"bitsandbytes is not installed; pip install 'kimi-lite\[bnb\]'"):
        on_card("nf4")
    assert isinstance(Engine(nano_path(), context=CONTEXT, vram=0).model, CpuModel)
