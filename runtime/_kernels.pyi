"""CPU kernels on packed and ggml weights; see docs/kernels.md. Outputs are the last arguments, written in place."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

class Weights:
    rows: int
    columns: int
    def __init__(
        self, type: str, data: NDArray[np.uint8], offset: int, stride: int, rows: int, columns: int
    ) -> None: ...

class Mlp:
    def __init__(self) -> None: ...
    def add(self, gate: Weights, up: Weights, down: Weights) -> None: ...

class LatentCache:
    def __init__(
        self, rows: NDArray[np.uint8], columns: NDArray[np.uint8], context: int, C: int, R: int
    ) -> None: ...

class AttentionLayer:
    def __init__(
        self,
        norm: Floats,
        q: Weights,
        kv_a: Weights,
        kv_norm: Floats,
        k_b: list[Any],
        v_b: list[Any],
        o: Weights,
        eps: float,
        kv_eps: float,
        scale: float,
    ) -> None: ...

class FeedForwardLayer:
    def __init__(
        self,
        norm: Floats,
        shared: Mlp,
        eps: float,
        router: Floats | None,
        bias: Floats | None,
        routed: Mlp | None,
        active: int,
        scale: float,
    ) -> None: ...

def isa() -> str: ...
def usable_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(n: int) -> None: ...
def linear(w: Weights, x: Floats, y: Floats) -> None: ...
def linear_heads(w: list[Any], x: Floats, y: Floats) -> None: ...
def embed(w: Weights, ids: NDArray[np.int32], y: Floats) -> None: ...
def packed_as(type: str) -> str | None: ...
def pack(w: Weights, out: NDArray[np.uint8]) -> None: ...
def rms_norm(x: Floats, weight: Floats, eps: float, y: Floats) -> None: ...
def route(
    x: Floats, router: Floats, bias: Floats, scale: float, ids: NDArray[np.int32], weights: Floats
) -> None: ...
def mixture(
    routed: Mlp, ids: NDArray[np.int32], weights: Floats, shared: Mlp | None, x: Floats, y: Floats
) -> None: ...
def remember(cache: LatentCache, rows: Floats, start: int) -> None: ...
def attention(cache: LatentCache, q: Floats, qr: Floats, start: int, scale: float, u: Floats) -> None: ...
def attention_layer(
    layer: AttentionLayer,
    x: Floats,
    cos: Floats,
    sin: Floats,
    cache: LatentCache,
    start: int,
) -> None: ...
def feed_forward_layer(layer: FeedForwardLayer, x: Floats) -> None: ...
