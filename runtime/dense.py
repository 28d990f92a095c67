"""Dense weights in bitsandbytes' formats, for a card: `--gpu-dense nf4|int8|bf16`.

Dense is what every token reads: attention's projections q, kv_a and o, the shared experts, the dense layer, the head. On
a card, PyTorch and bitsandbytes can multiply them in place of our kernels; all else stays where it is. k_b and v_b, one
small matrix a head (a sixth of attention's weights), keep the file's layout: bitsandbytes has no product by heads.

    nf4    4 bits that index 16 quantiles of the normal distribution; blocks of 64 weights share a scale of 8 bits, and 256
           of those a float32, about their mean (QLoRA, arXiv 2305.14314, double quantization)     4.13 bits a weight
    int8   LLM.int8 (arXiv 2208.07339): 8 bits, a float32 scale a row; activations rounded to 8 bits a token, but for those
           channels in which one exceeds OUTLIER, which are multiplied in float16                   8 bits and 32 a row
    bf16   bfloat16, multiplied as it is                                                           16 bits a weight

Here, without torch, are the formats: what a matrix takes, what it stands for, and how far a product may be from the exact
one. A matrix is a `kernels.Matrix` of such a layout, all parts in one piece of `data`; bnb.py makes and multiplies them.
Rounding a file's 4 or 8 bits again adds an error to what the file has lost already: it is smallest for a file that holds
these weights in more bits than asked for.

This is another arithmetic than our kernels', so a card with it does not have the CPU's bits. `attend` and `mlp` are the
two halves of a layer around such products on the CPU's own kernels: with the card's products in them, they must have the
card's bits (hybrid.py).

Dimension key:  T tokens   O, I out and in   D hidden   H heads   N, R, C, V no-rope, rope, latent and value width   F width
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.packed import GROUP, split_mlp
from kimi_lite.runtime import kernels
from kimi_lite.runtime.kernels import AttentionLayer, FeedForwardLayer, Float, Matrix, Mlp
from kimi_lite.runtime.weights import Layer, Weights

LAYOUTS = ("nf4", "int8", "bf16")
BLOCK, SCALES = 64, 256  # nf4: weights that share a scale, and scales that share a float32
OUTLIER = 6.0  # int8: as published
ALIGNED = 256  # bytes at which each part of a matrix begins, as card memory does
# The quantiles of nf4, QLoRA's appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

Multiply = Callable[[str, Float], Float]  # a product's name and its rows [T, I] -> [T, O]


@dataclass(frozen=True)
class Part:
    """One array of a matrix; bfloat16 is told by its two bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes into the matrix's data

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize


def parts(layout: str, rows: int, columns: int) -> dict[str, Part]:
    """What a matrix [rows, columns] consists of."""
    n = rows * columns
    blocks = -(-n // BLOCK)
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "nf4": {
            "values": ("u1", (-(-n // 2), 1)),  # the earlier weight in the high half
            "scales": ("u1", (blocks,)),
            "outer": ("f4", (-(-blocks // SCALES),)),
            "code": ("f4", (256,)),  # what the scales' 8 bits stand for
            "mean": ("f4", (1,)),
        },
        "int8": {"values": ("i1", (rows, columns)), "scales": ("f4", (rows,))},  # 127 stands for the scale
        "bf16": {"values": ("i2", (rows, columns))},
    }[layout]  # type: ignore[assignment]
    out, at = dict[str, Part](), 0
    for name, (dtype, shape) in arrays.items():
        out[name] = part = Part(dtype, shape, at)
        at = -(-part.end // ALIGNED) * ALIGNED
    return out


def n_bytes(layout: str, rows: int, columns: int) -> int:
    """Of a whole matrix."""
    return max(part.end for part in parts(layout, rows, columns).values())


def arrays(matrix: Matrix) -> dict[str, NDArray[Any]]:
    """A matrix's parts, as views of its data."""
    return {
        name: matrix.data[part.offset : part.end].view(part.dtype).reshape(part.shape)
        for name, part in parts(matrix.layout, matrix.rows, matrix.columns).items()
    }


def joined(layout: str, rows: int, columns: int, values: Mapping[str, NDArray[Any]]) -> Matrix:
    """The inverse of `arrays`."""
    matrix = Matrix(layout, np.zeros(n_bytes(layout, rows, columns), np.uint8), rows, columns)
    for name, view in arrays(matrix).items():
        view[...] = values[name].reshape(view.shape)
    return matrix


def floats(matrix: Matrix) -> Float:
    """What a matrix of any layout stands for, float32 [O, I]."""
    O, I = matrix.rows, matrix.columns
    if matrix.layout not in LAYOUTS:
        return kernels.embed(matrix, np.arange(O, dtype=np.int32))
    a = arrays(matrix)
    if matrix.layout == "bf16":
        return (a["values"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if matrix.layout == "int8":
        return np.asarray(a["values"] * (a["scales"] / np.float32(127))[:, None], np.float32)
    outer = np.repeat(a["outer"], SCALES)[: a["scales"].size]
    scales = a["code"][a["scales"]] * outer + a["mean"]
    codes = np.stack([a["values"] >> 4, a["values"] & 15], 1).reshape(-1)[: O * I]
    return np.asarray((NF4[codes] * np.repeat(scales, BLOCK)[: O * I]).reshape(O, I), np.float32)


def matrices(mlp: Mlp) -> tuple[Matrix, Matrix, Matrix]:
    """Gate, up and down of a single MLP."""
    if mlp.matrices is not None:
        return mlp.matrices
    assert mlp.data is not None
    F, D = mlp.F, mlp.D
    gate, up, down = split_mlp(mlp.data, mlp.layout, F, D)
    return Matrix(mlp.layout, gate, F, D), Matrix(mlp.layout, up, F, D), Matrix(mlp.layout, down, D, F)


def dense(layer: Layer) -> dict[str, Matrix]:
    """A layer's dense matrices by the names that their products go by."""
    a = layer.attention
    gate, up, down = matrices(layer.feed_forward.shared)
    return {"q": a.q, "kv_a": a.kv_a, "o": a.o, "gate": gate, "up": up, "down": down}


def is_dense(layer: Layer) -> bool:
    """Whether its dense matrices are of one of these layouts."""
    return layer.attention.q.layout in LAYOUTS


def quantized(layer: Layer, layout: str) -> Layer:
    """The layer with its dense matrices in another layout; the rest is shared with it."""
    return with_dense(
        layer, {name: quantized_matrix(matrix, layout) for name, matrix in dense(layer).items()}
    )


def quantized_matrix(matrix: Matrix, layout: str) -> Matrix:
    return backend().quantized(floats(matrix), layout)  # type: ignore[no-any-return]


def outline(weights: Weights, layout: str | None) -> Weights:
    """The weights with dense matrices that have another layout's size and no data: what a plan needs. None: as they are."""
    if layout is None:
        return weights

    def empty(rows: int, columns: int) -> Matrix:
        return Matrix(layout, np.empty(0, np.uint8), rows, columns)

    layers = list[Layer]()
    for layer in weights.layers:
        a, shared = layer.attention, layer.feed_forward.shared
        m = {name: empty(m.rows, m.columns) for name, m in (("q", a.q), ("kv_a", a.kv_a), ("o", a.o))}
        m |= {name: empty(shared.F, shared.D) for name in ("gate", "up")}
        layers.append(with_dense(layer, m | {"down": empty(shared.D, shared.F)}))
    head = empty(weights.head.rows, weights.head.columns)
    return replace(weights, layers=tuple(layers), head=head)


def with_dense(layer: Layer, m: Mapping[str, Matrix]) -> Layer:
    """The layer with other dense matrices, named as by `dense`."""
    shared = layer.feed_forward.shared
    shared = Mlp(shared.F, shared.D, 1, matrices=(m["gate"], m["up"], m["down"]))
    attention = replace(layer.attention, q=m["q"], kv_a=m["kv_a"], o=m["o"])
    return Layer(attention, replace(layer.feed_forward, shared=shared))


def check(layout: str | None, *, installed: bool = True) -> None:
    """Raise UsageError if this is no layout, or, where it must be installed, nothing here multiplies it."""
    if layout is None:
        return
    if layout not in LAYOUTS:
        raise UsageError(
            f"--gpu-dense is {layout!r}; give {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, or leave it out for the "
            "file's own weights"
        )
    if installed and (why := why_not()):
        raise UsageError(
            f"--gpu-dense {layout} cannot be used: {why}; leave it out for the file's own weights"
        )


def why_not() -> str:
    """Why no dense weights can be multiplied by bitsandbytes here; empty if they can."""
    missing = [name for name in ("torch", "bitsandbytes") if find_spec(name) is None]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        return (
            f"{' and '.join(missing)} {are} not installed; pip install 'kimi-lite[bnb]' brings what it needs"
        )
    return ""


def backend() -> Any:
    """bnb.py, which imports torch: some seconds, that only those wait who ask for it."""
    return import_module("kimi_lite.runtime.bnb")


def attend(
    a: AttentionLayer, x_TD: Float, cos_TR: Float, sin_TR: Float, cache: Any, start: int, multiply: Multiply
) -> None:
    """`kernels.attend` with products q, kv_a and o by `multiply`; the values that o reads are rounded as for our own."""
    T, H, N, C = len(x_TD), a.k_b.count, a.k_b.columns, a.k_b.rows
    h_TD = kernels.rms_norm(x_TD, a.norm_D, a.eps)
    q_THX = multiply("q", h_TD).reshape(T, H, -1)
    kv_TX = multiply("kv_a", h_TD)
    latent_TC = kernels.rms_norm(np.ascontiguousarray(kv_TX[:, :C]), a.kv_norm_C, a.kv_eps)
    key_TR = _turned(kv_TX[:, C:], cos_TR, sin_TR)
    kernels.remember(cache, np.concatenate([latent_TC, key_TR], 1), start)
    query_THC = kernels.linear_heads(a.k_b, np.ascontiguousarray(q_THX[..., :N]))
    turned_THR = _turned(q_THX[..., N:], cos_TR[:, None], sin_TR[:, None])
    summed_THC = kernels.latent_attention(cache, query_THC, turned_THR, start, a.scale)
    x_TD += multiply("o", _rounded(kernels.linear_heads(a.v_b, summed_THC).reshape(T, -1)))


def combine(f: FeedForwardLayer, h_TD: Float, shared_TD: Float, x_TD: Float) -> None:
    """x += the chosen experts of normalised rows h, all on the CPU, and the shared MLP's outputs; in order."""
    T = len(h_TD)
    ids_TA, weights_TA = np.empty((T, 0), np.int32), np.empty((T, 0), np.float32)
    outputs_TAD = np.empty((T, 0, h_TD.shape[1]), np.float32)
    if f.router is not None and f.routed is not None:
        r = f.router
        ids_TA, weights_TA = kernels.route(h_TD, r.weight_ED, r.bias_E, r.n_active, r.scale)
        tokens_M = np.repeat(np.arange(T, dtype=np.int32), r.n_active)
        outputs_MD = kernels.expert_outputs(f.routed, h_TD, ids_TA.reshape(-1), tokens_M)
        outputs_TAD = outputs_MD.reshape(T, r.n_active, -1)
    kernels.combine(outputs_TAD, weights_TA, shared_TD, x_TD)


def mlp(h_TD: Float, multiply: Multiply) -> Float:
    """The shared MLP [T, D]."""
    both_TF = np.concatenate([multiply("gate", h_TD), multiply("up", h_TD)], 1)
    return multiply("down", multiply("silu", both_TF))


def _turned(x: Float, cos: Float, sin: Float) -> Float:
    """Pairs of the last axis, rotated."""
    out, even, odd = np.empty(x.shape, np.float32), x[..., ::2], x[..., 1::2]
    out[..., ::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


def _rounded(x_TI: Float) -> Float:
    """Values as int8 in groups of 32 would give them back (docs/kernels.md)."""
    x_TGg = x_TI.reshape(len(x_TI), -1, GROUP)
    most_TG1 = np.abs(x_TGg).max(-1, keepdims=True)
    # The least power of two of which 127 reach the largest value: fraction · 2^exponent, rounded up.
    fraction_TG1, exponent_TG1 = np.frexp(most_TG1.astype(np.float64) / 127)
    scale_TG1 = np.exp2(exponent_TG1 - (fraction_TG1 == 0.5))
    scale_TG1 = np.where(most_TG1 > 1e-30, scale_TG1, 1).astype(np.float32)
    return np.asarray(np.rint(x_TGg / scale_TG1) * scale_TG1, np.float32).reshape(x_TI.shape)


BF16, F16 = 2.0**-8, 2.0**-11  # the largest relative error of rounding to nearest
BOUND_ROWS = 4096  # that are float64 at a time: a head has 163,840
F32_SUM = 2.0**-22  # of one step of a float32 sum, for units that truncate and keep two bits beyond


def bound(matrix: Matrix, x_TI: Float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The product of the weights that a matrix stands for, and how far from it a right one may be; both [T, O].

    With S = Σ |w x| over a row and each of n roundings off by a factor within 1 ± u, a sum is off by ((1 + u)^n - 1) S:

    bf16   x is rounded here as there; products are exact in float32, their sum is not: I · F32_SUM · S. Out: once.
    nf4    beside that, a kernel may round quantile, scale, their product, and the product with x to bfloat16: n = 4.
    int8   x and the steps of its rows in float16; a step is largest / 127, and rounding to it loses half of it for each
           weight. Integer sums are exact. Outliers, their weights' product with the scale, partial sums and their sum in
           float16: n = 6.
    """
    n, unit = {"bf16": (0, BF16), "nf4": (4, BF16), "int8": (6, F16)}[matrix.layout]
    lost_T1 = np.zeros((len(x_TI), 1))
    if matrix.layout == "int8":
        given_TI = x_TI.astype(np.float16).astype(np.float64)
        ordinary_TI = np.where(np.abs(given_TI) < OUTLIER, np.abs(given_TI), 0)
        lost_T1 = ordinary_TI.max(1, keepdims=True) / 254 * (1 + 2 * F16)
    else:
        given_TI = _bfloat16(x_TI).astype(np.float64)
    exact_TO, S_TO = (np.empty((len(x_TI), matrix.rows)) for _ in range(2))
    sum_O, w_OI = np.empty(matrix.rows), floats(matrix)
    for first in range(0, matrix.rows, BOUND_ROWS):
        rows = slice(first, first + BOUND_ROWS)
        exact_TO[:, rows] = given_TI @ w_OI[rows].T.astype(np.float64)
        size_OI = np.abs(w_OI[rows]).astype(np.float64)
        S_TO[:, rows], sum_O[rows] = np.abs(given_TI) @ size_OI.T, size_OI.sum(1)
    most_TO = ((1 + unit) ** n - 1 + matrix.columns * F32_SUM) * S_TO + lost_T1 * sum_O
    return exact_TO, most_TO + unit * (np.abs(exact_TO) + most_TO) + 2.0**-24


def silu_bound(both_TF: Float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """silu(gate) · up, and how far a right one may be: e^x within 4 units of float32, and four more roundings of one."""
    gate_TF, up_TF = np.split(both_TF.astype(np.float64), 2, 1)
    exact_TF = gate_TF / (1 + np.exp(-np.maximum(gate_TF, -700))) * up_TF
    return exact_TF, 8 * 2.0**-23 * np.abs(exact_TF) + 2.0**-126 * (1 + np.abs(up_TF))


def _bfloat16(x: Float) -> Float:
    """Rounded to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
