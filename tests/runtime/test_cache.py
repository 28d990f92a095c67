"""The latent cache as memory: reserved whole, taken as it fills."""

import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from kimi_lite.errors import DoesNotFitError
from kimi_lite.runtime import cache as module
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.weights import open_weights

NANO = Path(__file__).parents[2] / "kimi_lite" / "nano" / "kimi-vl-nano-int4.gguf"
CONTEXT, L, C, R = 131_072, 27, 512, 64  # full size: 4.1 GB if all of it were touched
FULL = replace(open_weights(NANO).config, n_layers=L, kv_rank=C, rope_dim=R, context_length=CONTEXT)


def test_a_long_context_takes_memory_only_where_it_is_filled() -> None:
    n = 64
    row_TX = np.random.default_rng(1).standard_normal((n, C + R), np.float32)
    kernels.remember(LatentCache(FULL, n).layers[0], row_TX, 0)  # so that buffers and code are there
    cache = LatentCache(FULL, CONTEXT)
    before = psutil.Process().memory_info().rss
    for layer in cache.layers:
        kernels.remember(layer, row_TX, 0)
    taken = psutil.Process().memory_info().rss - before
    rows, columns = kernels.latent_cache_bytes(n, C, R)
    # Every page that a filled byte lies on: the rows are one run, the columns one run for each block of 16 channels. A run
    # may begin inside a page and so touch one more.
    page, blocks = mmap.PAGESIZE, C // 16
    most = L * page * (-(-rows // page) + 1 + blocks * (-(-columns // blocks // page) + 1))
    assert L * (rows + columns) <= taken <= most, f"{taken} bytes for {n} positions, of at most {most}"


def test_a_context_that_the_system_does_not_reserve_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module, "mmap", SimpleNamespace(mmap=refuse))
    with pytest.raises(DoesNotFitError, match=r"131072 tokens needs 4\.1 GB.*Cannot allocate.*--context"):
        LatentCache(FULL, CONTEXT)
