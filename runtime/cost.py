"""What a step costs on a card and on the CPU: bytes over bandwidth, products over arithmetic, launches and hand-offs.

The planner (placement.py) adds these up in expectation; the simulated card charges them for what really was routed.
A kernel takes as long as the slower of its memory traffic and its arithmetic:

    attend   attention's weights, and the cached rows of all positions      10 launches
    route    norm, router, choice                                           3 launches
    experts  the shared MLP and the chosen experts that lie there           1 launch
    add      the weighted sum                                               1 launch
    head     last norm, head                                                2 launches
    tower    a piece of up to 1024 patches in one block                    12 launches

docs/gpu-kernels.md lists the launches; the second half of the experts is the sum's. Whatever crosses between card and CPU
costs a hand-off and its bytes over PCIe; what is streamed, at the slower of PCIe and a copy in main memory. Nothing here is
measured: all speeds come from speeds.py.

Dimension key:  T tokens   D hidden   E routed experts   A active   C latent   R rope   H heads   N, V a head's keys, values (V: vocabulary)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_lite.formats.packed import matrix_bytes
from kimi_lite.runtime import dense
from kimi_lite.runtime.cuda.device import MOST_TOKENS
from kimi_lite.runtime.cuda.halves import Buffers, Shape, shape_of
from kimi_lite.runtime.cuda.tower import MOST_ROWS, TowerShape
from kimi_lite.runtime.kernels import Matrix, Mlp, latent_cache_bytes, packed_as
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.weights import Layer, Weights

ATTEND_LAUNCHES, ROUTE_LAUNCHES, EXPERT_LAUNCHES, ADD_LAUNCHES, HEAD_LAUNCHES = 10, 3, 1, 1, 2
TORCH_BYTES = (
    256_000_000  # assumed: code of PyTorch, cuBLAS and bitsandbytes on the card, and cuBLAS's working memory
)
TORCH_ROWS = 4  # copies of a product's rows that live at the same time, as if all were float32
TOWER_LAUNCHES = 12
# A 16-bit product takes as long as so many of those 8-bit ones that the speeds count: the card's kernels multiply one pair
# where dp4a takes four, the CPU's two where its 8-bit step takes four.
CARD_16_BIT, CPU_16_BIT = 4, 2
MANY_POSITIONS = 1 << 15  # over which the cache's whole groups average out


@dataclass(frozen=True)
class LayerSize:
    """One layer in bytes, and in products a token. Without routed experts, `shared` is the dense MLP."""

    attention_bytes: int
    router_bytes: int
    shared_bytes: int
    expert_bytes: int  # of one
    n_experts: int
    n_active: int
    attention_macs: int
    shared_macs: int
    expert_macs: int
    cache_macs: int  # for each cached position
    expand_macs: int  # to make a cached position's keys and values
    expanded_macs: int  # for each cached position, once they are made
    cache_bytes: float  # of a cached position
    D: int

    @property
    def fixed_bytes(self) -> int:
        """What every token reads."""
        return self.attention_bytes + self.router_bytes + self.shared_bytes

    def attend_s(self, speeds: Speeds, T: int, start: int) -> float:
        """Attention of T tokens that stand from `start` on; each of them sees those before it."""
        seen = start + (T + 1) / 2
        n_bytes = self.attention_bytes + (start + T) * self.cache_bytes
        return speeds.card_s(ATTEND_LAUNCHES, n_bytes, T * (self.attention_macs + seen * self.cache_macs))

    def route_s(self, speeds: Speeds) -> float:
        return speeds.card_s(ROUTE_LAUNCHES, self.router_bytes, 0)

    def experts_s(self, speeds: Speeds, T: int, n_experts: float, n_rows: float) -> float:
        """The shared MLP on T tokens, and `n_experts` routed ones on `n_rows` in all."""
        n_bytes = self.shared_bytes + n_experts * self.expert_bytes
        return speeds.card_s(EXPERT_LAUNCHES, n_bytes, T * self.shared_macs + n_rows * self.expert_macs)

    def add_s(self, speeds: Speeds) -> float:
        return speeds.card_s(ADD_LAUNCHES, 0, 0)

    def cpu_attend_macs(self, T: int, start: int) -> float:
        """Products of attention of T tokens on the CPU, in the form that `model.expands` chooses."""
        seen = start + (T + 1) / 2
        if T * (self.cache_macs - self.expanded_macs) < self.expand_macs:
            return T * (self.attention_macs + seen * self.cache_macs)
        own = T * (self.attention_macs - self.expand_macs + seen * self.expanded_macs)
        return own + (start + T) * self.expand_macs

    def cpu_experts_s(self, speeds: Speeds, n_experts: float, n_rows: float) -> float:
        return speeds.cpu_s(n_experts * self.expert_bytes, n_rows * self.expert_macs)

    def down_s(self, speeds: Speeds, T: int) -> float:
        """From the card: normalised rows, expert ids and weights."""
        return speeds.crossing_s(4 * T * (self.D + 2 * self.n_active))

    def stream_s(self, speeds: Speeds, n_experts: int) -> float:
        """To the card: so many experts; nothing if there are none."""
        return speeds.stream_s(n_experts * self.expert_bytes) if n_experts else 0.0

    def up_s(self, speeds: Speeds, n_rows: float) -> float:
        """To the card: the outputs of experts that ran on the CPU."""
        return speeds.crossing_s(4 * n_rows * self.D)


@dataclass(frozen=True)
class Sizes:
    """A whole text model, and what one step works with."""

    layers: tuple[LayerSize, ...]
    head_bytes: int  # with the last norm
    head_macs: int
    V: int
    shapes: tuple[Shape, ...]
    torch_bytes: int = 0  # what PyTorch takes for its own, where it multiplies the dense weights

    @property
    def fixed_bytes(self) -> int:
        return self.head_bytes + sum(layer.fixed_bytes for layer in self.layers)

    @property
    def routed_bytes(self) -> int:
        return sum(layer.n_experts * layer.expert_bytes for layer in self.layers)

    def workspace_bytes(self, context: int, *, streams: bool = False) -> int:
        """What the longest step takes beside weights, cache and streamed experts."""
        return Buffers(self.shapes, context, self.V, streams=streams).n_bytes + self.torch_bytes

    def stream_bytes(self, resident: Sequence[Sequence[int]]) -> int:
        """Two buffers, each for the experts that the poorest layer lacks."""
        layers = zip(self.layers, resident, strict=True)
        return 2 * max((layer.n_experts - len(there)) * layer.expert_bytes for layer, there in layers)

    def cache_bytes(self, context: int) -> int:
        return round(sum(layer.cache_bytes for layer in self.layers) * context)

    def head_s(self, speeds: Speeds) -> float:
        """The last norm and the head, of one token."""
        return speeds.card_s(HEAD_LAUNCHES, self.head_bytes, self.head_macs)

    def logits_s(self, speeds: Speeds) -> float:
        """The logits' way to the CPU."""
        return speeds.crossing_s(4 * self.V)


def sizes_of(weights: Weights) -> Sizes:
    """What a model file takes, layer by layer."""
    return Sizes(
        tuple(layer_size(layer) for layer in weights.layers),
        head_bytes=matrix_size(weights.head) + weights.norm_D.nbytes,
        head_macs=_macs(weights.head),
        V=weights.config.vocab_size,
        shapes=tuple(shape_of(layer) for layer in weights.layers),
        torch_bytes=_torch_bytes(weights),
    )


def _torch_bytes(weights: Weights) -> int:
    """What PyTorch takes on a card beside our memory: its libraries, and what a product works with.

    A product may unpack its matrix to bfloat16, and holds rows in a few precisions. The head has one row: no kernel
    unpacks it for that.
    """
    if weights.head.layout not in dense.LAYOUTS:
        return 0
    shapes = map(shape_of, weights.layers)
    widths = {(s.D, width) for s in shapes for width in (s.H * (s.N + s.R), s.C + s.R, s.H * s.V, s.shared_F)}
    return TORCH_BYTES + max(
        2 * D * width + 4 * TORCH_ROWS * MOST_TOKENS * (D + width) for D, width in widths
    )


def encode_s(s: TowerShape, speeds: Speeds, sizes: Sequence[int], *, resident: bool) -> list[float]:
    """Encoding pictures of so many patches each on the card: the way there, each block, the projector, the way back.

    A tower that is not there crosses PCIe while nothing else is done.
    """
    P, pairs = sum(sizes), sum(N * N for N in sizes)
    launches = TOWER_LAUNCHES * -(-P // MOST_ROWS)
    first, *_, last = s.part_bytes
    in_a_block = P * s.block_macs + CARD_16_BIT * pairs * s.pair_macs
    parts = [
        speeds.card_s(launches, first, P * s.X * s.W),
        *(speeds.card_s(launches, size, in_a_block) for size in s.part_bytes[1:-1]),
        speeds.card_s(launches, last, P * s.projector_macs),
    ]
    if not resident:
        parts = [speeds.crossing_s(size) + part for size, part in zip(s.part_bytes, parts, strict=True)]
    return [speeds.crossing_s(4 * P * (s.X + s.W + s.K)), *parts, speeds.crossing_s(P * s.D)]


def encode_cpu_s(s: TowerShape, speeds: Speeds, sizes: Sequence[int]) -> float:
    """The same on the CPU."""
    P, pairs = sum(sizes), sum(N * N for N in sizes)
    macs = P * (s.L * s.block_macs + s.projector_macs) + CPU_16_BIT * pairs * s.L * s.pair_macs
    return speeds.cpu_s(s.bytes, macs)


def layer_size(layer: Layer) -> LayerSize:
    """What one layer takes."""
    a, f = layer.attention, layer.feed_forward
    matrices = (a.q, a.kv_a, a.k_b, a.v_b, a.o)
    C, H, D = a.k_b.rows, a.k_b.count, a.q.columns
    R, N, V = a.kv_a.rows - C, a.k_b.columns, a.v_b.rows
    routed, router = f.routed, f.router
    return LayerSize(
        attention_bytes=sum(matrix_size(m) for m in matrices) + a.norm_D.nbytes + a.kv_norm_C.nbytes,
        router_bytes=f.norm_D.nbytes + (router.weight_ED.nbytes + router.bias_E.nbytes if router else 0),
        shared_bytes=mlp_size(f.shared),
        expert_bytes=mlp_size(routed) // routed.count if routed else 0,
        n_experts=routed.count if routed else 0,
        n_active=router.n_active if router else 0,
        attention_macs=sum(_macs(m) for m in matrices),
        shared_macs=3 * f.shared.F * D,
        expert_macs=3 * routed.F * D if routed else 0,
        cache_macs=H * (2 * C + R),
        expand_macs=H * C * (N + V),
        expanded_macs=H * (N + R + V),
        cache_bytes=sum(latent_cache_bytes(MANY_POSITIONS, C, R)) / MANY_POSITIONS,
        D=D,
    )


def mlp_size(mlp: Mlp) -> int:
    """Bytes of all its experts."""
    if mlp.matrices is not None:
        return sum(matrix_size(m) for m in mlp.matrices)
    assert mlp.data is not None
    return mlp.data.size


def matrix_size(matrix: Matrix) -> int:
    """Bytes of a matrix as it runs: packed, if its type has a packed layout."""
    if matrix.layout in dense.LAYOUTS:
        return dense.n_bytes(matrix.layout, matrix.rows, matrix.columns)
    layout = packed_as(matrix.layout)
    return matrix.count * matrix_bytes(layout, matrix.rows, matrix.columns) if layout else matrix.data.size


def _macs(matrix: Matrix) -> int:
    """Products for one token."""
    return matrix.rows * matrix.columns * matrix.count
