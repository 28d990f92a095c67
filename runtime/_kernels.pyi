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
        used: NDArray[np.int64] | None,
    ) -> None: ...

def isa() -> str: ...
def usable_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(n: int) -> None: ...
def pool_times() -> tuple[int, int]: ...
def empty_calls(repeats: int) -> None: ...
def linear(w: Weights, x: Floats, y: Floats) -> None: ...
def linear_heads(w: list[Any], x: Floats, y: Floats) -> None: ...
def embed(w: Weights, ids: NDArray[np.int32], y: Floats) -> None: ...
def copy(to: NDArray[np.uint8], from_: NDArray[np.uint8]) -> None: ...
def packed_as(type: str) -> str | None: ...
def pack(w: Weights, out: NDArray[np.uint8]) -> None: ...
def rms_norm(x: Floats, weight: Floats, eps: float, y: Floats) -> None: ...
def route(
    x: Floats, router: Floats, bias: Floats, scale: float, ids: NDArray[np.int32], weights: Floats
) -> None: ...
def mixture(
    routed: Mlp, ids: NDArray[np.int32], weights: Floats, shared: Mlp | None, x: Floats, y: Floats
) -> None: ...
def expert_outputs(
    mlp: Mlp, experts: NDArray[np.int32], tokens: NDArray[np.int32], x: Floats, y: Floats
) -> None: ...
def combine(outputs: Floats, weights: Floats, shared: Floats, x: Floats) -> None: ...
def remember(cache: LatentCache, rows: Floats, start: int) -> None: ...
def turn_columns(cache: LatentCache, first: int, end: int) -> None: ...
def attention(cache: LatentCache, q: Floats, qr: Floats, start: int, scale: float, u: Floats) -> None: ...
def expanded_attention(
    cache: LatentCache,
    k_b: list[Weights],
    v_b: list[Weights],
    q: Floats,
    qr: Floats,
    start: int,
    scale: float,
    o: Floats,
) -> None: ...
def attention_layer(
    layer: AttentionLayer,
    x: Floats,
    cos: Floats,
    sin: Floats,
    cache: LatentCache,
    start: int,
    expanded: bool,
) -> None: ...
def feed_forward_layer(layer: FeedForwardLayer, x: Floats) -> None: ...

class Layers:
    def __init__(
        self,
        attention: list[AttentionLayer],
        feed_forward: list[FeedForwardLayer],
        caches: list[LatentCache],
    ) -> None: ...

def run_layers(
    layers: Layers,
    first: int,
    end: int,
    x: Floats,
    cos: Floats,
    sin: Floats,
    start: int,
    expanded: bool,
    asking: int,
) -> None: ...

# The image tower's own steps; see runtime/native/vision.h.
PATCH_BLOCK: int

class PatchStore:
    def __init__(self, patches: int, heads: int, width: int) -> None: ...
    def place(self, first: int, qkv: Floats, bias: Floats, cos: Floats, sin: Floats) -> None: ...
    def attend(self, first: int, out: Floats) -> None: ...

def pack_q8(w: Floats, out: NDArray[np.uint8]) -> None: ...
def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None: ...
def gelu(x: Floats, bias: Floats, exact: bool, out: Floats) -> None: ...
def add_bias(y: Floats, bias: Floats, x: Floats) -> None: ...
