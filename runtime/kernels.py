"""The Python face of the C++ kernels: allocates results, names types, chooses instruction set and threads.

All products quantize their float32 input to int8 once, in groups of 32, and add in one fixed order; the bits do not
depend on instruction set, thread count or how tokens were dealt to calls (docs/kernels.md). There is no slower path in Python:
without the compiled module nothing runs, and the import says so.

KIMI_LITE_ISA forces an instruction set by name; an unknown name is an error. `describe` says what is in use.

Dimension key:  T tokens   I, O in and out   D model width   E experts   A active   H heads   C latent   R rope
                M (token, expert) pairs   N, V a head's keys and values
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.packed import LAYOUTS, matrix_bytes, mlp_bytes, row_block_bytes

try:
    from kimi_lite.runtime import _kernels
except ImportError as error:  # a checkout that was never built
    raise ImportError(
        f"the compiled kernels are missing ({error}); run `pip install .` in the checkout"
    ) from error

Float = NDArray[np.float32]


def use_isa(name: str | None, said_by: str = "isa") -> None:
    """Use an instruction set by name, or the best for None. Raises UsageError for one that does not run here."""
    if name and name not in usable_isas():
        raise UsageError(
            f"{said_by} is {name!r}; on this machine it may be {', '.join(usable_isas())}, or unset for the best"
        )
    _kernels.use_isa(name or usable_isas()[0])


def usable_isas() -> list[str]:
    """Instruction sets that run here, best first."""
    return list(_kernels.usable_isas())


def isa() -> str:
    """The instruction set in use."""
    return str(_kernels.isa())


def set_threads(n: int | None) -> None:
    """Use n threads; by default one per physical core that this process may run on."""
    if n is not None and not 1 <= n <= 1024:
        raise UsageError(f"{n} threads were asked for; give a number from 1 to 1024")
    _kernels.set_threads(n or default_threads())


def default_threads() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def threads() -> int:
    return int(_kernels.threads())


def describe() -> dict[str, str]:
    """What is in use, for `kimi-lite doctor` and benchmark records."""
    return {"isa": isa(), "usable": ", ".join(usable_isas()), "threads": str(threads())}


@dataclass(frozen=True)
class Matrix:
    """`count` matrices [rows, columns] of one layout, one after the other in `data`, which is never copied.

    `layout` is a packed layout's name or a ggml type's. `data` is uint8.
    """

    layout: str
    data: NDArray[np.uint8]
    rows: int
    columns: int
    count: int = 1

    @cached_property
    def handles(self) -> list[Any]:
        """What the C++ functions take, one each."""
        size = self.data.size // self.count
        packed = self.layout in LAYOUTS
        stride = row_block_bytes(self.layout, self.columns) if packed else 0
        assert not packed or size == matrix_bytes(self.layout, self.rows, self.columns)
        return [
            _kernels.Weights(self.layout, self.data, i * size, stride, self.rows, self.columns)
            for i in range(self.count)
        ]


def packed_as(layout: str) -> str | None:
    """The packed layout that holds a ggml type bit for bit, or None."""
    return None if layout in LAYOUTS else _kernels.packed_as(layout)


def pack(matrix: Matrix) -> Matrix:
    """The same matrices in their packed layout, in memory of their own; the type must have one."""
    layout = packed_as(matrix.layout)
    assert layout is not None, f"{matrix.layout} has no packed layout"
    size = matrix_bytes(layout, matrix.rows, matrix.columns)
    data = np.empty(matrix.count * size, np.uint8)
    for i, handle in enumerate(matrix.handles):
        _kernels.pack(handle, data[i * size : (i + 1) * size])
    return Matrix(layout, data, matrix.rows, matrix.columns, matrix.count)


@dataclass(frozen=True)
class Mlp:
    """`count` SwiGLU experts of width F on model width D: packed runs one after the other, or three stacked matrices."""

    F: int
    D: int
    count: int
    layout: str = ""  # of packed runs
    data: NDArray[np.uint8] | None = None  # `count` runs of `formats.packed.mlp_bytes` bytes
    matrices: tuple[Matrix, Matrix, Matrix] | None = None  # gate, up, down, as a standard GGUF has them

    @cached_property
    def handle(self) -> Any:
        """What the C++ functions take."""
        handle = _kernels.Mlp()
        if self.matrices is not None:
            for parts in zip(*(matrix.handles for matrix in self.matrices), strict=True):
                handle.add(*parts)
            return handle
        assert self.data is not None
        block, size = row_block_bytes(self.layout, self.D), matrix_bytes(self.layout, self.F, self.D)
        for expert in range(self.count):
            at = expert * mlp_bytes(self.layout, self.F, self.D)
            handle.add(
                _kernels.Weights(self.layout, self.data, at, 2 * block, self.F, self.D),
                _kernels.Weights(self.layout, self.data, at + block, 2 * block, self.F, self.D),
                _kernels.Weights(
                    self.layout,
                    self.data,
                    at + 2 * size,
                    row_block_bytes(self.layout, self.F),
                    self.D,
                    self.F,
                ),
            )
        return handle


def linear(matrix: Matrix, x_TI: Float) -> Float:
    """x times the transposed matrix: float32 [T, O]."""
    y_TO = np.empty((len(x_TI), matrix.rows), np.float32)
    _kernels.linear(matrix.handles[0], x_TI, y_TO)
    return y_TO


def linear_heads(matrix: Matrix, x_THI: Float) -> Float:
    """Matrix h times x[:, h], for each head: float32 [T, H, O]."""
    y_THO = np.empty((*x_THI.shape[:2], matrix.rows), np.float32)
    _kernels.linear_heads(matrix.handles, x_THI, y_THO)
    return y_THO


def embed(matrix: Matrix, ids_T: NDArray[np.int32]) -> Float:
    """The matrix's rows, dequantized: float32 [T, I]."""
    y_TI = np.empty((len(ids_T), matrix.columns), np.float32)
    _kernels.embed(matrix.handles[0], ids_T, y_TI)
    return y_TI


def copy(to: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    """Bytes to another place, by all threads. Raises ValueError for different sizes."""
    _kernels.copy(to, source)


def rms_norm(x_TD: Float, weight_D: Float, eps: float) -> Float:
    """x / sqrt(mean(x²) + eps) · weight."""
    y_TD = np.empty_like(x_TD)
    _kernels.rms_norm(x_TD, weight_D, eps, y_TD)
    return y_TD


def route(
    x_TD: Float, router_ED: Float, bias_E: Float, n_active: int, scale: float
) -> tuple[NDArray[np.int32], Float]:
    """Expert ids [T, A], ascending, and their weights [T, A], which sum to `scale`."""
    ids_TA = np.empty((len(x_TD), n_active), np.int32)
    weights_TA = np.empty((len(x_TD), n_active), np.float32)
    _kernels.route(x_TD, router_ED, bias_E, scale, ids_TA, weights_TA)
    return ids_TA, weights_TA


def mixture(routed: Mlp, shared: Mlp, x_TD: Float, ids_TA: NDArray[np.int32], weights_TA: Float) -> Float:
    """The weighted sum of the chosen experts, in order of index, plus the shared MLP."""
    y_TD = np.zeros_like(x_TD)
    _kernels.mixture(routed.handle, ids_TA, weights_TA, shared.handle, x_TD, y_TD)
    return y_TD


def expert_outputs(mlp: Mlp, x_TD: Float, experts_M: NDArray[np.int32], tokens_M: NDArray[np.int32]) -> Float:
    """Expert experts_M[m] applied to x[tokens_M[m]], not weighted: float32 [M, D]."""
    y_MD = np.empty((len(experts_M), mlp.D), np.float32)
    _kernels.expert_outputs(mlp.handle, experts_M, tokens_M, x_TD, y_MD)
    return y_MD


def combine(outputs_TAD: Float, weights_TA: Float, shared_TD: Float, x_TD: Float) -> None:
    """x += the weighted sum of the outputs in order, plus shared; in place, with the bits of `mixture`."""
    _kernels.combine(outputs_TAD, weights_TA, shared_TD, x_TD)


def latent_cache(
    rows: NDArray[np.uint8], columns: NDArray[np.uint8], context: int, C: int, R: int
) -> "_kernels.LatentCache":
    """One layer's cache over its own bytes: `latent_cache_bytes` says how many."""
    return _kernels.LatentCache(rows, columns, context, C, R)


def latent_cache_bytes(context: int, C: int, R: int) -> tuple[int, int]:
    """Bytes of the rows (one for each position, C + R channels) and of the columns (one row for each latent channel)."""
    return matrix_bytes("q8g32", context, C + R), matrix_bytes("q8g32", C, context)


def remember(cache: "_kernels.LatentCache", rows_TX: Float, start: int) -> None:
    """Store T positions from `start` on; a row is the latent and the rotated key, X = C + R."""
    _kernels.remember(cache, rows_TX, start)


def turn_columns(cache: "_kernels.LatentCache", first: int, end: int) -> None:
    """Make the columns of those whole groups of 32 positions that first..end completes, from the rows."""
    _kernels.turn_columns(cache, first, end)


def latent_attention(
    cache: "_kernels.LatentCache", q_THC: Float, qr_THR: Float, start: int, scale: float
) -> Float:
    """Absorbed attention: token t stands at start + t and sees the cached rows up to itself. float32 [T, H, C]."""
    u_THC = np.empty_like(q_THC)
    _kernels.attention(cache, q_THC, qr_THR, start, scale, u_THC)
    return u_THC


def expanded_attention(
    cache: "_kernels.LatentCache",
    k_b: Matrix,
    v_b: Matrix,
    q_THN: Float,
    qr_THR: Float,
    start: int,
    scale: float,
) -> Float:
    """Expanded attention: the same over keys k_b ᵀ c and values v_b c of each head, made from the cache. float32 [T, H, V]."""
    o_THV = np.empty((*q_THN.shape[:2], v_b.rows), np.float32)
    _kernels.expanded_attention(cache, k_b.handles, v_b.handles, q_THN, qr_THR, start, scale, o_THV)
    return o_THV


@dataclass(frozen=True)
class Router:
    """Which routed experts act, and how much they count."""

    weight_ED: Float
    bias_E: Float
    n_active: int
    scale: float  # what the acting experts' weights sum to


@dataclass(frozen=True)
class AttentionLayer:
    """A layer's attention: q [H·(N+R), D], kv_a [C+R, D], k_b H × [C, N], v_b H × [V, C], o [D, H·V]."""

    norm_D: Float
    q: Matrix
    kv_a: Matrix
    kv_norm_C: Float
    k_b: Matrix
    v_b: Matrix
    o: Matrix
    eps: float
    kv_eps: float
    scale: float  # of the softmax

    @cached_property
    def handle(self) -> Any:
        """What the C++ functions take."""
        return _kernels.AttentionLayer(
            self.norm_D,
            self.q.handles[0],
            self.kv_a.handles[0],
            self.kv_norm_C,
            self.k_b.handles,
            self.v_b.handles,
            self.o.handles[0],
            self.eps,
            self.kv_eps,
            self.scale,
        )


@dataclass(frozen=True)
class FeedForwardLayer:
    """A layer's feed-forward half; a dense layer is its shared MLP alone."""

    norm_D: Float
    eps: float
    shared: Mlp
    routed: Mlp | None = None
    router: Router | None = None
    used_E: NDArray[np.int64] | None = (
        None  # counts how often each expert was chosen for a token that came alone
    )

    @cached_property
    def handle(self) -> Any:
        """What the C++ functions take."""
        if self.routed is None or self.router is None:
            return _kernels.FeedForwardLayer(
                self.norm_D, self.shared.handle, self.eps, None, None, None, 0, 0.0, None
            )
        return _kernels.FeedForwardLayer(
            self.norm_D,
            self.shared.handle,
            self.eps,
            self.router.weight_ED,
            self.router.bias_E,
            self.routed.handle,
            self.router.n_active,
            self.router.scale,
            self.used_E,
        )


def attend(
    layer: AttentionLayer,
    x_TD: Float,
    cos_TR: Float,
    sin_TR: Float,
    cache: "_kernels.LatentCache",
    start: int,
    expanded: bool = False,
) -> None:
    """x += attention(norm(x)), in place; the tokens' latents and rotated keys are cached from position `start` on.

    cos and sin are [T, R/2]: the angles by which the pairs (x[2i], x[2i+1]) turn. The expanded form makes keys and
    values of all heads from the cache: fewer products for many tokens, other roundings.
    """
    _kernels.attention_layer(layer.handle, x_TD, cos_TR, sin_TR, cache, start, expanded)


def feed_forward(layer: FeedForwardLayer, x_TD: Float) -> None:
    """x += experts(norm(x)), in place."""
    _kernels.feed_forward_layer(layer.handle, x_TD)


def layers(
    attention: Sequence[AttentionLayer],
    feed_forward: Sequence[FeedForwardLayer],
    caches: Sequence["_kernels.LatentCache"],
) -> "_kernels.Layers":
    """A model's layers as `run_layers` takes them."""
    return _kernels.Layers([a.handle for a in attention], [f.handle for f in feed_forward], list(caches))


def run_layers(
    layers: "_kernels.Layers",
    first: int,
    end: int,
    x_TD: Float,
    cos_TR: Float,
    sin_TR: Float,
    start: int,
    expanded: bool = False,
    asking: int = 1,
) -> None:
    """`attend` and `feed_forward` of the layers from `first` up to `end`, one after the other.

    The last of all gives its output for the last `asking` tokens only, for no other's is read; unless those are all, its
    attention is absorbed.
    """
    _kernels.run_layers(layers, first, end, x_TD, cos_TR, sin_TR, start, expanded, asking)


use_isa(os.environ.get("KIMI_LITE_ISA"), "KIMI_LITE_ISA")
