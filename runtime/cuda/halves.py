"""The halves of a layer as launches: which kernel, over which grid, between which buffers.

A single token's grids depend on the context alone, not on its position: so the launches of one token can be captured once
and repeated; those of more tokens are made anew, for as many positions as they see. What takes a longer step than one of
MOST_TOKENS sees it through `Workspace.of`, part by part: only the residual stream and the rotations are as long as the
step. For fewer than FEW tokens the products take one token at a time, which is what decode wants; from there on a block
of threads takes eight, so that each weight is read once for eight; from MANY on, tiles of 32 on the tensor cores
(docs/gpu-kernels.md counts what MANY is), and for scores, whose rows are heads, from half a tile on.

Dimension key:  T tokens   D hidden   H heads   N, R, C, V no-rope, rope, latent and value width   E experts
                A active   F expert width   S cached positions   X C + R, padded to whole groups
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_lite.runtime.cuda.device import FEW, MANY, MOST_STREAMED, MOST_TOKENS, DeviceMemoryError
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.program import Cache, Matrix, Mlps, Rows
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.weights import Layer

TILE, TALL = 32, 8  # kTile and kTall of products.cu: tokens and row blocks of a tile
ROWS, GROUP, CHUNK = 16, 32, 256  # rows of a row block; channels of a group and of a chunk
SLICE_BYTES = 64 << 20  # what the scores of the tokens that attend at once may take, if one needs no more
ENOUGH_BLOCKS = 128  # of threads, to keep a card busy
STAGED = 2048  # kStaged of attention.cu
TURNED_BYTES = 4 * GROUP * (2 * 12 + 2 + GROUP + 1)  # a Turned there: steps, scales and values of 32 channels
ALIGNED = 256
NO_MATRIX = Matrix(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Shape:
    """A layer's dimensions. A dense layer has no routed experts: E, A and F are 0."""

    D: int
    H: int
    N: int
    R: int
    C: int
    V: int
    E: int
    A: int
    F: int
    shared_F: int


def shape_of(layer: Layer) -> Shape:
    a, f = layer.attention, layer.feed_forward
    E, F = (f.routed.count, f.routed.F) if f.routed else (0, 0)
    C = a.k_b.rows
    return Shape(
        D=a.q.columns,
        H=a.k_b.count,
        N=a.k_b.columns,
        R=a.kv_a.rows - C,
        C=C,
        V=a.v_b.rows,
        E=E,
        A=f.router.n_active if f.router else 0,
        F=F,
        shared_F=f.shared.F,
    )


class DenseProducts(Protocol):
    """A layer's dense products where others than our kernels run them (dense.py)."""

    def project(self, w: "Workspace", T: int) -> None:
        """q and kv of the normalised rows in `h`."""

    def output(self, w: "Workspace", T: int) -> None:
        """x += o of the rows in `values`."""

    def mlp(self, w: "Workspace", T: int, out: int) -> None:
        """The shared MLP of the normalised rows in `h`, float32 [T, D] at `out`."""


@dataclass
class Place:
    """A layer on the card: addresses of float32 vectors, packed matrices, experts, the cache."""

    shape: Shape
    norm: int
    kv_norm: int
    ffn_norm: int
    router: int
    bias: int
    q: Matrix
    kv_a: Matrix
    k_b: Matrix
    v_b: Matrix
    o: Matrix
    k_b_bytes: int  # from head to head
    v_b_bytes: int
    mlps: Mlps
    eps: float
    kv_eps: float
    ffn_eps: float
    scale: float  # of the softmax
    routed_scale: float
    whole_table: int  # addresses of all experts, when those that are elsewhere have been brought
    cache: Cache = field(default_factory=Cache)
    dense: DenseProducts | None = (
        None  # instead of q, kv_a, o and the shared MLP, whose width in `mlps` then is 0
    )


class Buffers:
    """What one step needs beside the weights and the cache, sized for the widest layer.

    A step has up to MOST_TOKENS, or MOST_STREAMED if the device `streams` experts, of which it works on MOST_TOKENS at a
    time; never more than the context.
    """

    def __init__(
        self, shapes: Sequence[Shape], context: int, vocabulary: int, *, streams: bool = False
    ) -> None:
        T, one = min(MOST_TOKENS, context), shapes[0]
        longest = min(MOST_STREAMED, _whole(context, T)) if streams else T
        D, H, C, R = one.D, one.H, one.C, one.R
        E, A, F, shared_F = (max(getattr(s, name) for s in shapes) for name in ("E", "A", "F", "shared_F"))
        self.context, self.tokens, self.longest = context, T, longest
        one_token = Slice(context, H, C, 1, -(-context // CHUNK))
        self.rows = {  # name: rows, channels
            "normed": (T, D),
            "nope": (T * H, one.N),
            "query": (T * H, _whole(C + R, GROUP)),
            "summed": (T * H, C),
            "values": (T * H, one.V),
            "hidden": (T * A, F),
            "shared_hidden": (T, shared_F),
        }
        # In words of four bytes. What the host writes or reads lies in pinned memory there.
        self.shared_with_host = {
            "start": longest // T,
            "x": longest * D,
            "cos": longest * R // 2,
            "sin": longest * R // 2,
            "h": T * D,
            "ids": T * A,
            "weights": T * A,
            "logits": vocabulary,
        }
        self.host_only = {"missing": T * A * D}  # the card reads it there
        self.words = self.shared_with_host | {
            "q": T * H * (one.N + R),
            "kv": T * (C + R),
            "slice": -(-max(one_token.n_bytes, min(SLICE_BYTES, Slice(context, H, C, T, 1).n_bytes)) // 4),
            "scores": T * E,
            "jobs": 3 * E,
            "slots": T * A,
            "outputs": T * (A + 1) * D,
        }
        sizes = {name: rows_bytes(n, K) for name, (n, K) in self.rows.items()}
        sizes |= {name: 4 * n for name, n in self.words.items()}
        # What experts need lies where attention's slices were: neither needs its own while the other works.
        later, later_bytes = laid_out(
            {name: sizes.pop(name) for name in ("hidden", "shared_hidden", "outputs")}
        )
        self.slice_bytes = sizes["slice"] = max(sizes["slice"], later_bytes)
        self.offsets, self.n_bytes = laid_out(sizes)
        self.offsets |= {name: self.offsets["slice"] + offset for name, offset in later.items()}


def laid_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of aligned pieces of memory, one after the other, and their size in all."""
    offsets, total = dict[str, int](), 0
    for name, size in sizes.items():
        offsets[name] = total
        total += _whole(size, ALIGNED)
    return offsets, total


@dataclass(frozen=True)
class Slice:
    """Tokens that attend at once, and what that takes: scores, weights, sums over positions in so many parts."""

    seen: int  # positions, at most
    H: int
    C: int
    tokens: int
    parts: int

    @property
    def stride(self) -> int:
        """Floats, or weights, from head to head."""
        return _whole(self.seen, GROUP)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of its buffers, which lie one after the other."""
        n = self.tokens * self.H
        return {
            "s": 4 * n * self.stride,
            "weights": rows_bytes(n, self.stride),
            "rest": rows_bytes(n, 2 * GROUP),
            "partial": 4 * n * self.parts * self.C,
            "inverse": 4 * n,
        }

    @property
    def n_bytes(self) -> int:
        return laid_out(self.sizes)[1]

    def at(self, address: int) -> dict[str, int]:
        return {name: address + offset for name, offset in laid_out(self.sizes)[0].items()}


class Workspace:
    """The buffers of a step, on the card and in pinned host memory."""

    def __init__(self, card: Card, buffers: Buffers, D: int) -> None:
        """Raises DeviceMemoryError."""
        self.context, self.tokens, self.longest, self.D = buffers.context, buffers.tokens, buffers.longest, D
        self.slice_bytes = buffers.slice_bytes
        self.seen = buffers.context  # positions that the step's tokens see, at most
        on_host = buffers.shared_with_host | buffers.host_only
        self.pinned = card.pinned(4 * sum(on_host.values()))
        try:
            self.base = card.allocate(
                buffers.n_bytes, f"working memory for a context of {buffers.context} tokens"
            )
        except DeviceMemoryError:
            card.unpin(self.pinned)
            raise
        self.at = {name: self.base + offset for name, offset in buffers.offsets.items()}
        self.rows = {name: rows_at(self.at[name], n, K) for name, (n, K) in buffers.rows.items()}
        self.host, first = dict[str, NDArray[np.uint8]](), 0
        for name, n in on_host.items():
            self.host[name] = self.pinned[first : first + 4 * n]
            first += 4 * n
        self.at |= {name: self.host[name].ctypes.data for name in buffers.host_only}

    def of(self, first: int, seen: int) -> "Workspace":
        """The same buffers for a part of a step, from its token `first` on, a multiple of `tokens`; it sees so many positions."""
        own, each = copy.copy(self), {"start": 1, "x": self.tokens * self.D}
        each |= {name: self.tokens * self.host[name].size // (4 * self.longest) for name in ("cos", "sin")}
        own.at = self.at | {name: self.at[name] + 4 * n * (first // self.tokens) for name, n in each.items()}
        own.seen = seen
        return own

    def floats(self, name: str, n: int) -> Float:
        """The first n values of a pinned buffer."""
        return self.host[name][: 4 * n].view(np.float32)

    def integers(self, name: str, n: int) -> NDArray[np.int32]:
        return self.host[name][: 4 * n].view(np.int32)

    def as_rows(self, name: str, n: int, K: int) -> Rows:
        """A buffer that is large enough, seen as n rows of K channels."""
        return rows_at(self.at[name], n, K)


def attend(card: Card, p: Place, w: Workspace, T: int) -> None:
    """x += attention(norm(x)); the tokens are cached."""
    s, at, rows = p.shape, w.at, w.rows
    norm(card, w, at["x"], p.norm, p.eps, at["h"] if p.dense else 0, T)
    if p.dense:
        p.dense.project(w, T)
    else:
        product(card, p.q, p.kv_a, rows["normed"], T, at["q"], at["kv"])
    card.launch(
        "latents", (T, s.H + 1), 256, 4 * (s.C + 1),
        at["q"], at["kv"], p.kv_norm, p.kv_eps, at["cos"], at["sin"], at["start"], s.N, p.cache,
        rows["nope"], rows["query"],
    )  # fmt: skip
    heads(card, p.k_b, p.k_b_bytes, rows["nope"], s.H, T, rows["query"])
    wide = rows["query"].groups * GROUP
    for first, part in slices(w, s, T):
        n, here = part.tokens, part.at(at["slice"])
        weights = rows_at(here["weights"], n * s.H, part.stride)
        rest = rows_at(here["rest"], n * s.H, 2 * GROUP)
        NT = TILE if 2 * n * s.H >= TILE else 8  # rows are heads: half a tile of them is worth one
        card.launch(
            f"scores_{NT}", (-(-part.seen // (8 * ROWS)), -(-n * s.H // NT) + 1),
            _threads(8, NT, wide), _product_bytes(8, NT, wide),
            p.cache, at["start"], first, n, T, s.H, rows["query"], here["s"], part.stride,
        )  # fmt: skip
        card.launch(
            "softmax", (s.H, n), 1024 if T < FEW and part.seen > STAGED else 256, 4 * (2 * STAGED + 32),
            at["start"], first, p.scale, here["s"], part.stride, weights, rest, here["inverse"],
        )  # fmt: skip
        span = 1 if part.parts > 1 else -(-part.seen // CHUNK)
        if T >= MANY:
            card.launch(
                "weigh_32", (-(-s.C // (TALL * ROWS)), part.parts, -(-n * s.H // TILE)),
                _threads(TALL, TILE, CHUNK), _product_bytes(TALL, TILE, CHUNK),
                p.cache, at["start"], first, n, s.H, weights, here["partial"], part.parts, span,
            )  # fmt: skip
        else:
            card.launch(
                "weigh_8", (s.C // ROWS, min(32, -(-part.parts // 8)), -(-s.H // 8) * n), 32, 0,
                p.cache, at["start"], first, s.H, weights, here["partial"], part.parts,
            )  # fmt: skip
        card.launch(
            "finish", (s.C // GROUP, n), 32 * s.H, TURNED_BYTES,
            p.cache, at["start"], first, weights, rest, here["inverse"], here["partial"],
            part.parts, span, rows["summed"],
        )  # fmt: skip
    heads(card, p.v_b, p.v_b_bytes, rows["summed"], s.H, T, rows["values"])
    if p.dense:
        p.dense.output(w, T)
    else:
        product(card, p.o, NO_MATRIX, w.as_rows("values", w.tokens, s.H * s.V), T, at["x"], 0, add=True)


def slices(w: Workspace, s: Shape, T: int) -> list[tuple[int, Slice]]:
    """The first token of each slice of a step, and the slice: as many tokens as have room.

    On the tensor cores, sums over positions are taken whole where that alone keeps a card busy; else chunk by chunk, which
    takes room for each chunk's.
    """
    chunks = -(-w.seen // CHUNK)
    for parts in (1, chunks) if T >= MANY else (chunks,):
        n = min(T, max(1, w.slice_bytes // Slice(w.seen, s.H, s.C, 1, parts).n_bytes))
        if -(-n * s.H // TILE) * -(-s.C // (TALL * ROWS)) >= ENOUGH_BLOCKS:
            break
    return [(first, Slice(w.seen, s.H, s.C, min(n, T - first), parts)) for first in range(0, T, n)]


def route(card: Card, p: Place, w: Workspace, T: int) -> None:
    """norm(x), and which experts act."""
    s, at = p.shape, w.at
    norm(card, w, at["x"], p.ffn_norm, p.ffn_eps, at["h"], T)
    if not s.E:
        return
    card.launch("route", (-(-s.E // 8), T), 128, 0, at["h"], p.router, s.D, s.E, at["scores"])
    choose(
        card, at["scores"], p.bias, T, s.E, s.A, p.routed_scale, p.mlps.experts,
        at["ids"], at["weights"], at["jobs"], at["slots"],
    )  # fmt: skip


def choose(
    card: Card,
    scores: int,
    bias: int,
    T: int,
    E: int,
    A: int,
    scale: float,
    experts: int,
    ids: int,
    weights: int,
    jobs: int,
    slots: int,
) -> None:
    """Who acts, and the jobs of those that are here; see experts.cu for the arrays."""
    few, n, threads = T < FEW, T * A, max(256, _whole(E, 32))
    card.launch(
        "choose", (1 if few else -(-T // (threads // E)),), threads, max(12 * threads, few * _dealing_bytes(threads, E, n)),
        scores, bias, T, E, A, scale, experts, ids, weights, jobs, slots,
    )  # fmt: skip
    if not few:
        threads = max(threads, min(1024, _whole(16 * E, 32)))
        card.launch("deal", (1,), threads, _dealing_bytes(threads, E, n), ids, n, E, experts, jobs, slots)


def fetch(card: Card, p: Place, w: Workspace, T: int) -> None:
    """What the CPU needs for the experts that are not here, into pinned memory."""
    s, at = p.shape, w.at
    to = [w.host[name].ctypes.data for name in ("h", "ids", "weights")]
    card.launch("fetch", (-(-T * s.D // 1024),), 256, 0, at["h"], at["ids"], at["weights"], T, s.D, s.A, *to)


def run_experts(card: Card, p: Place, w: Workspace, T: int) -> None:
    """Gate, up and silu of the chosen experts that are here, and of the shared MLP."""
    s, m, at, NT = p.shape, p.mlps, w.at, _at_once(T)
    hidden, shared_hidden = _hidden(s, w)
    if p.dense:
        p.dense.mlp(w, T, _shared_outputs(s, w, T))
    n_jobs, groups = _jobs(s, T), _tall(NT) // 4 or 1  # of 32 hidden channels: gate, up, gate, up
    blocks = n_jobs * -(-s.F // (groups * GROUP)) + -(-m.shared_F // (groups * GROUP))
    if not blocks:
        return
    card.launch(
        f"gate_up_{NT}", (-(-T // NT), blocks),
        _threads(4, NT, s.D), _product_bytes(4, NT, s.D),
        m, at["jobs"], at["slots"], n_jobs, w.rows["normed"], T, hidden, shared_hidden,
    )  # fmt: skip


def add_experts(card: Card, p: Place, w: Workspace, T: int) -> None:
    """x += down of everything, summed in order of index, the outputs of experts that lie elsewhere included."""
    s, m, at = p.shape, p.mlps, w.at
    hidden, shared_hidden = _hidden(s, w)
    if T < FEW:
        items = s.A * -(-s.F // CHUNK) + -(-m.shared_F // CHUNK)
        card.launch(
            "down", (s.D // ROWS, T), min(256, _whole(max(4 * items, 1), 32)), 4 * ROWS * items + 8 * s.A,
            m, at["ids"], at["weights"], hidden, shared_hidden, at["missing"],
            _shared_outputs(s, w, T) if p.dense else 0, at["x"],
        )  # fmt: skip
        return
    NT, widest = _at_once(T), max(s.F, m.shared_F)
    card.launch(
        f"down_jobs_{NT}", (-(-T // NT), -(-s.D // (_tall(NT) * ROWS)), _jobs(s, T) + 1),
        _threads(1, NT, widest), _product_bytes(1, NT, widest),
        m, at["jobs"], at["slots"], hidden, shared_hidden, T, at["outputs"],
    )  # fmt: skip
    card.launch(
        "combine", (-(-s.D // 256), T), 256, 0,
        m, at["ids"], at["weights"], at["outputs"], at["missing"], T, at["x"],
    )  # fmt: skip


def logits(card: Card, w: Workspace, T: int, weight: int, eps: float, head: Matrix) -> None:
    """The last norm and the head, of the last token."""
    last_norm(card, w, T, weight, eps)
    product(card, head, NO_MATRIX, w.rows["normed"], 1, w.at["logits"], 0)


def last_norm(card: Card, w: Workspace, T: int, weight: int, eps: float) -> None:
    """Of the last token, also as floats to `h`."""
    norm(card, w, w.at["x"] + 4 * w.D * (T - 1), weight, eps, w.at["h"], 1)


def norm(card: Card, w: Workspace, x: int, weight: int, eps: float, out: int, T: int) -> None:
    """Rows of x into `normed`, and as floats to `out` if that is not 0."""
    shares = -(-w.D // (8 * GROUP)) if T < FEW else 1  # for a few tokens, a warp a group
    card.launch("rms_norm", (T, shares), 256, 4 * (w.D + 1), x, weight, w.D, eps, out, w.rows["normed"])


def product(
    card: Card, a: Matrix, b: Matrix, x: Rows, T: int, ya: int, yb: int, *, add: bool = False
) -> None:
    """ya [T, O] (+)= x a; the same for b, in one launch."""
    NT = _at_once(T)
    rows = _tall(NT) * ROWS
    card.launch(
        f"product_{NT}", (-(-a.rows // rows) + -(-b.rows // rows), -(-T // NT)),
        _threads(1, NT, a.columns), _product_bytes(1, NT, a.columns),
        a, b, x, T, ya, yb, int(add),
    )  # fmt: skip


def heads(card: Card, matrix: Matrix, head_bytes: int, x: Rows, H: int, T: int, y: Rows) -> None:
    """Matrix h times head h's rows, quantized into y."""
    NT = _at_once(T)
    groups = _tall(NT) // 2 or 1
    card.launch(
        f"heads_{NT}", (-(-matrix.rows // (groups * GROUP)), H, -(-T // NT)),
        _threads(2, NT, matrix.columns), _product_bytes(2, NT, matrix.columns),
        matrix, head_bytes, x, T, y,
    )  # fmt: skip


def _at_once(T: int) -> int:
    """NT of the kernels for T tokens: how many share a weight that is read."""
    return 1 if T < FEW else 8 if T < MANY else TILE


def _tall(NT: int) -> int:
    """How many row blocks a block of threads takes at once, if the kernel does not ask for more."""
    return TALL if NT == TILE else 1


def _jobs(s: Shape, T: int) -> int:
    return min(s.E, T * s.A)


def _shared_outputs(s: Shape, w: Workspace, T: int) -> int:
    """Where `combine` looks for the shared MLP's: behind those of the experts."""
    return w.at["outputs"] + 4 * T * s.A * s.D


def _hidden(s: Shape, w: Workspace) -> tuple[Rows, Rows]:
    return w.as_rows("hidden", w.tokens * s.A, s.F), w.as_rows("shared_hidden", w.tokens, s.shared_F)


def rows_at(address: int, n: int, K: int) -> Rows:
    """n rows of K channels: values, then scales, then sums."""
    return Rows(address, address + n * K, address + n * K + 4 * n * (K // GROUP), K // GROUP)


def rows_bytes(n: int, K: int) -> int:
    """What `rows_at` lays out."""
    return n * K + 8 * n * (K // GROUP)


def _threads(row_blocks: int, NT: int, K: int) -> int:
    """Of a block that multiplies K channels, four a row block and chunk, in whole warps.

    At most 128 where eight tokens' sums fill the registers, as the launch bounds there say; a tile takes four warps.
    """
    return (
        128
        if NT == TILE
        else min(256 if NT == 1 else 128, _whole(max(4 * row_blocks * -(-K // CHUNK), 1), 32))
    )


def _product_bytes(row_blocks: int, NT: int, K: int) -> int:
    """Shared memory of `multiply` for K channels: the parts of each chunk, and their sums.

    For a tile, two chunks of its activations; its sums fit in the same place.
    """
    if NT < TILE:
        return 4 * ROWS * row_blocks * NT * (-(-K // CHUNK) + 1)
    return 2 * TILE * (CHUNK + 4 * (CHUNK // GROUP))


def _dealing_bytes(threads: int, E: int, n_slots: int) -> int:
    """Shared memory of what deals slots out to jobs."""
    return 4 * (threads + E + n_slots)


def _whole(n: int, unit: int) -> int:
    return -(-n // unit) * unit
