"""What tests of single kernels put on a card and get back, and int8 rows by their definition."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from numpy_model import activation_scale

from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.program import Rows

F32 = NDArray[np.float32]


def put(card: Card, array: NDArray[Any]) -> int:
    at = card.allocate(array.nbytes, "a test")
    card.upload(at, array)
    card.synchronize()
    return at


def get(card: Card, at: int, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    out = np.empty(shape, dtype)
    card.download(out, at)
    card.synchronize()
    return out


def empty_rows(card: Card, n: int, K: int) -> Rows:
    at = card.allocate(n * K + n * K // 4, "a test")
    return Rows(at, at + n * K, at + n * K + n * K // 8, K // 32)


def int8_rows(x_XK: F32) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """Quantized rows by their definition: values, scales, and -8 times the sums."""
    grouped_XG32 = x_XK.reshape(len(x_XK), -1, 32)
    most_XG = np.abs(grouped_XG32).max(-1)
    scale_XG = activation_scale(most_XG.astype(np.float64)).astype(np.float32)
    q_XG32 = np.rint(grouped_XG32 / scale_XG[..., None])
    return q_XG32.astype(np.int8), scale_XG, -8 * q_XG32.astype(np.int32).sum(-1)


def fetched(card: Card, rows: Rows, n: int) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    G = rows.groups
    return (
        get(card, rows.q, (n, G, 32), np.int8),
        get(card, rows.scale, (n, G)),
        get(card, rows.sum, (n, G), np.int32),
    )
