"""Our GGUF files in ik_llama.cpp, and files of llama.cpp's quantizer in our runtime.

ik_llama.cpp accepts this architecture only with the real head sizes, so the model here has them, over 27 thin layers.
"""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from numpy_model import NumpyModel
from tolerance import U16

from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, write_checkpoint

pytestmark = pytest.mark.parity
THIN = replace(
    TINY_TEXT,
    n_layers=27,
    n_heads=16,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    kv_rank=512,
    dense_hidden_size=512,
)
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 512, 20)]
Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
    checkpoint = write_checkpoint(folder / "checkpoint", text=THIN, vision=None, shard_bytes=256 << 20)
    for to in ("f16", "q8_0"):
        quantize(checkpoint, folder / f"{to}.gguf", to=to)
    return folder


def theirs(path: Path, ids: list[int]) -> Logits:
    from ik_llama_cpp import IkLlama
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import make_batch_range

    model = IkLlama(str(path), n_ctx=64, n_threads=2, verbose=False, flash_attn=False)
    batch = make_batch_range(ids, pos_start=0, logits_last=True)
    assert model._context.decode(batch) == 0
    api.llama_batch_free(batch)
    pointer = ctypes.cast(model._context.get_logits(-1), ctypes.POINTER(ctypes.c_float))
    logits = np.ctypeslib.as_array(pointer, (THIN.vocab_size,)).copy()
    model.close()
    return logits


def rms(x: NDArray[Any]) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


def test_f16_logits_and_greedy_tokens_agree(folder: Path) -> None:
    # ggml rounds activations to float16 in front of each product with float16 weights: 27 layers of 8 products, each
    # with an independent relative error of at most 2^-11, walk sqrt(216) of them far from exact arithmetic on the file.
    # Our attention rounds to int8, which 27 random layers amplify; the slow model says how much that costs, and we may
    # be as far from it as two such roundings are from each other.
    bound, path = (27 * 8) ** 0.5 * U16, folder / "f16.gguf"
    ids, engine, exact_model, rounded_model = (
        list(IDS[:6]),
        Engine(path),
        NumpyModel(path, contract=False),
        NumpyModel(path, contract=True),
    )
    for _ in range(3):
        ours, other = engine.prefill(ids), theirs(path, ids)
        exact, rounded = exact_model.logits(ids)[-1], rounded_model.logits(ids)[-1]
        cost = rms(rounded - exact)
        assert 0 < rms(exact - other) < bound * rms(other)
        assert 0 < rms(ours - other) < 2 * cost
        best, second = np.sort(other)[[-1, -2]]
        if best - second > 4 * cost:  # else rounding decides
            assert int(ours.argmax()) == int(other.argmax())
        ids.append(int(other.argmax()))


def test_q8_0_files_lose_as_much_here_as_there(folder: Path) -> None:
    # Both round activations to int8, in different ways, and 27 random layers amplify it: neither is nearer the truth.
    exact = Engine(folder / "f16.gguf").append(IDS)
    ours, other = Engine(folder / "q8_0.gguf").append(IDS), theirs(folder / "q8_0.gguf", IDS)
    assert 0.5 < rms(ours - exact) / rms(other - exact) < 2


@pytest.mark.parametrize(
    ("kind", "types"), [("Q4_K_M", {"Q4_K", "Q5_0", "Q6_K"}), ("Q4_0", {"Q4_0", "Q6_K"})]
)
def test_files_of_llama_cpps_quantizer_run_here(folder: Path, kind: str, types: set[str]) -> None:
    import ik_llama_cpp

    path = folder / f"{kind}.gguf"
    ik_llama_cpp.quantize(folder / "f16.gguf", path, kind)
    assert types <= {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    exact = Engine(folder / "f16.gguf").append(IDS)
    ours, other = Engine(path).append(IDS), theirs(path, IDS)
    # The two runtimes differ by how they round activations, which must cost less than quantizing the weights did.
    assert 0 < rms(ours - other) < 0.8 * rms(ours - exact)
