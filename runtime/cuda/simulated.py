"""A card that is none: the contract of device.py on the CPU's kernels, with a card's memory, clock and accidents.

It gives the bits of the CPU engine because it runs the CPU engine's kernels (dense weights of dense.py's layouts are
multiplied by PyTorch and bitsandbytes, on the CPU as well); what it proves is everything around a card:
that every expert is computed once, in one place, and added in order; that plans fit the memory that they were made for;
that bad days end in a sentence. Memory is accounted against a capacity, byte for byte as the planner counts it.

Time is a virtual clock with two hands, the card's and the CPU's. Queued work starts when both are there and moves the
card's; whatever crosses moves the CPU's; experts that the CPU ran are charged when they come back. Streamed ones move the
CPU's, which copies them while the card computes, but only into a buffer that the card has left. So a plan's prediction
can be held against what the router really chose, without waiting for it. The costs are those of cost.py.

Dimension key:  T tokens   D hidden   A active experts   V vocabulary   M experts that ran on the CPU   E routed experts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.runtime import dense, kernels, vision
from kimi_lite.runtime.cost import LayerSize, Sizes, encode_s, layer_size, sizes_of
from kimi_lite.runtime.cuda.device import MOST_TOKENS, DeviceLostError, DeviceMemoryError, Routed
from kimi_lite.runtime.cuda.halves import Buffers
from kimi_lite.runtime.cuda.tower import TowerShape, parts_of, room_for
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.placement import gb
from kimi_lite.runtime.speeds import ASSUMED, Speeds
from kimi_lite.runtime.vision import Progress, VisionWeights
from kimi_lite.runtime.weights import Layer, Weights


@dataclass
class _Loaded:
    """A layer on the card, its cache, and what the present step keeps of it."""

    layer: Layer
    size: LayerSize
    here_E: NDArray[np.bool_]
    cache: Any = None
    h_TD: Float = field(default_factory=lambda: np.empty((0, 0), np.float32))
    ids_TA: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))
    weights_TA: Float = field(default_factory=lambda: np.empty((0, 0), np.float32))
    outputs_TAD: Float = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))
    shared_TD: Float = field(default_factory=lambda: np.empty((0, 0), np.float32))


class SimulatedDevice:
    """A card of `capacity` bytes.

    Args:
        speeds: what its clock goes by, and plans for it.
        n_cards: how many there were to choose from, for its name.
        taken: bytes that another program takes as soon as the first layer is up.
        lost_after: the card fails after so many pieces of queued work.
    """

    def __init__(
        self,
        capacity: int,
        speeds: Speeds = ASSUMED,
        *,
        n_cards: int = 1,
        taken: int = 0,
        lost_after: int | None = None,
    ) -> None:
        choice = f", the roomiest of {n_cards}" if n_cards > 1 else ""
        self.name = f"a simulated card of {gb(capacity)}{choice}"
        self._speeds = speeds
        self._capacity, self._taken, self._lost_after = capacity, taken, lost_after
        self._used = 0
        self._layers: dict[int, _Loaded] = {}
        self._ends: tuple[Weights, Sizes] | None = None
        self._products: dict[int | None, dict[str, Callable[[Float], Float]]] = {}  # of dense.py's layouts
        self._tower: VisionWeights | None = None
        self._card_s = self._cpu_s = 0.0
        self._x_TD = self._cos_TR = self._sin_TR = np.empty((0, 0), np.float32)
        self._start, self._longest = 0, MOST_TOKENS
        self._turns: dict[int, int] = {}  # which of the two buffers a layer's missing experts go through
        self._brought: list[int | None] = [None, None]  # the layer whose experts are in each
        self._left_s = [0.0, 0.0]  # when the card has done with it

    @property
    def clock_s(self) -> float:
        """Seconds that have passed for whoever waits for results."""
        return self._cpu_s

    def free_bytes(self) -> int:
        taken = self._taken if self._layers else 0
        return max(0, self._capacity - self._used - taken)

    def speeds(self) -> Speeds:
        return self._speeds

    def load_layer(self, index: int, layer: Layer, experts: Sequence[int] | None) -> None:
        size = layer_size(layer)
        here_E = np.zeros(size.n_experts, bool)
        here_E[list(range(size.n_experts) if experts is None else experts)] = True
        self._take(size.fixed_bytes + int(here_E.sum()) * size.expert_bytes, f"layer {index}")
        self._layers[index] = _Loaded(layer, size, here_E)
        if dense.is_dense(layer):
            on_cpu = dense.backend().on_cpu
            products = {name: on_cpu(matrix) for name, matrix in dense.dense(layer).items()}
            self._products[index] = products | {"silu": dense.backend().silu_on_cpu}

    def load_ends(self, weights: Weights) -> None:
        sizes = sizes_of(weights)
        self._take(sizes.head_bytes, "the head")
        self._ends = weights, sizes
        if weights.head.layout in dense.LAYOUTS:
            self._products[None] = {"head": dense.backend().on_cpu(weights.head)}

    def reserve_cache(self, context: int, *, streams: bool) -> None:
        assert self._ends is not None, "load_ends comes first"
        sizes = self._ends[1]
        needed = sizes.cache_bytes(context) + sizes.workspace_bytes(context, streams=streams)
        if streams:
            resident = [np.flatnonzero(on.here_E).tolist() for on in self._layers.values()]
            needed += sizes.stream_bytes(resident)
            lacking = [index for index, on in self._layers.items() if not on.here_E.all()]
            self._turns = {index: n % 2 for n, index in enumerate(lacking)}
            self._longest = Buffers(sizes.shapes, context, sizes.V, streams=True).longest
        self._take(needed, f"the cache of {context} tokens, with working memory,")
        for on in self._layers.values():
            C = on.layer.attention.k_b.rows
            R = on.layer.attention.kv_a.rows - C
            rows, columns = (np.zeros(n, np.uint8) for n in kernels.latent_cache_bytes(context, C, R))
            on.cache = kernels.latent_cache(rows, columns, context, C, R)

    def rewind(self, n: int) -> None:
        """Nothing to do: rows beyond a token's own position are never read."""

    def begin(self, x_TD: Float, cos_TR: Float, sin_TR: Float, start: int) -> None:
        assert 1 <= len(x_TD) <= self._longest, (
            f"{len(x_TD)} tokens in one step; it takes 1 to {self._longest}"
        )
        self._x_TD, self._cos_TR, self._sin_TR, self._start = x_TD.copy(), cos_TR, sin_TR, start
        self._cpu_s += self.speeds().crossing_s(x_TD.nbytes)

    def attend(self, index: int) -> None:
        on = self._layers[index]
        self._queue(on.size.attend_s(self.speeds(), len(self._x_TD), self._start))
        step = on.layer.attention, self._x_TD, self._cos_TR, self._sin_TR, on.cache, self._start
        if index in self._products:
            dense.attend(*step, partial(self.run_dense, index))
        else:
            kernels.attend(*step)

    def route(self, index: int, *, wanted: bool) -> Routed | None:
        on, T = self._layers[index], len(self._x_TD)
        self._queue(on.size.route_s(self.speeds()))
        f = on.layer.feed_forward
        on.h_TD = kernels.rms_norm(self._x_TD, f.norm_D, f.eps)
        on.ids_TA, on.weights_TA = np.empty((T, 0), np.int32), np.empty((T, 0), np.float32)
        if f.router is not None:
            r = f.router
            on.ids_TA, on.weights_TA = kernels.route(on.h_TD, r.weight_ED, r.bias_E, r.n_active, r.scale)
        if not wanted:
            return None
        self._wait(on.size.down_s(self.speeds(), T))
        return Routed(on.h_TD.copy(), on.ids_TA.copy(), on.weights_TA.copy())

    def run_experts(self, index: int) -> None:
        on, f, T = self._layers[index], self._layers[index].layer.feed_forward, len(self._x_TD)
        tokens_M, slots_M = np.nonzero(on.here_E[on.ids_TA])
        experts_M = on.ids_TA[tokens_M, slots_M]
        self._queue(on.size.experts_s(self.speeds(), T, len(np.unique(experts_M)), len(experts_M)))
        # Not a number stands for what the CPU has to bring.
        on.outputs_TAD = np.full((*on.ids_TA.shape, on.size.D), np.nan, np.float32)
        if f.routed is not None:
            outputs_MD = kernels.expert_outputs(f.routed, on.h_TD, experts_M, tokens_M.astype(np.int32))
            on.outputs_TAD[tokens_M, slots_M] = outputs_MD
        if index in self._products:
            on.shared_TD = dense.mlp(on.h_TD, partial(self.run_dense, index))
        else:
            every_T = np.arange(T, dtype=np.int32)
            on.shared_TD = kernels.expert_outputs(f.shared, on.h_TD, np.zeros_like(every_T), every_T)

    def add_experts(self, index: int, outputs_MD: Float | None) -> None:
        on = self._layers[index]
        there_TA = ~on.here_E[on.ids_TA]
        if outputs_MD is not None:
            n_experts = len(np.unique(on.ids_TA[there_TA]))
            self._cpu_s += on.size.cpu_experts_s(self.speeds(), n_experts, len(outputs_MD))
            self._cpu_s += on.size.up_s(self.speeds(), len(outputs_MD))
            on.outputs_TAD[there_TA] = outputs_MD
        self._queue(on.size.add_s(self.speeds()))
        kernels.combine(on.outputs_TAD, on.weights_TA, on.shared_TD, self._x_TD)

    def bring(self, index: int) -> None:
        on, turn = self._layers[index], self._turns[index]
        self._answer()
        self._cpu_s = max(self._cpu_s, self._left_s[turn])
        self._cpu_s += on.size.stream_s(self.speeds(), int((~on.here_E).sum()))
        self._brought[turn] = index

    def run_layer(self, index: int) -> None:
        on, step = self._layers[index], (self._x_TD, self._cos_TR, self._sin_TR, self._start)
        own_E = on.here_E
        if index in self._turns:
            assert self._brought[self._turns[index]] == index, f"the experts of layer {index} are not here"
        on.here_E = np.ones_like(own_E)
        for first in range(0, len(step[0]), MOST_TOKENS):
            part = slice(first, first + MOST_TOKENS)
            self._x_TD, self._cos_TR, self._sin_TR = (rows[part] for rows in step[:3])
            self._start = step[3] + first
            self.attend(index)
            self.route(index, wanted=False)
            self.run_experts(index)
            self.add_experts(index, None)
        on.here_E = own_E
        self._x_TD, self._cos_TR, self._sin_TR, self._start = step
        if index in self._turns:
            self._left_s[self._turns[index]] = self._card_s

    def logits(self) -> Float:
        assert self._ends is not None, "load_ends comes first"
        weights, sizes = self._ends
        self._queue(sizes.head_s(self.speeds()))
        last_1D = kernels.rms_norm(self._x_TD[-1:], weights.norm_D, weights.config.rms_eps)
        self._wait(sizes.logits_s(self.speeds()))
        if None in self._products:
            return self.run_dense(None, "head", last_1D).reshape(-1)
        return kernels.linear(weights.head, last_1D).reshape(-1)

    def wait(self) -> None:
        self._wait(0.0)

    def run_dense(self, index: int | None, name: str, x_TI: Float) -> Float:
        return self._products[index][name](x_TI)

    def keep_tower(self, weights: VisionWeights) -> None:
        shape = TowerShape.of(weights.config, weights.text_width)
        parts_of(weights)
        self._take(shape.bytes, "the image tower")
        self._tower = weights
        self._queue(sum(map(self.speeds().crossing_s, shape.part_bytes)))

    def encode(
        self,
        weights: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: Progress | None = None,
    ) -> list[Float]:
        parts_of(weights)
        shape, resident = TowerShape.of(weights.config, weights.text_width), self._tower is weights
        sizes = [pixels.size // (3 * weights.config.patch_size**2) for pixels in canvases]
        room = room_for(shape, sizes, resident=resident)
        self._take(room, f"encoding pictures of {sum(sizes)} patches")
        try:
            up, *parts, down = encode_s(shape, self.speeds(), sizes, resident=resident)
            self._cpu_s += up
            for part in parts:
                self._queue(part)
            out = vision.encode(weights, canvases, on_progress)
            self._wait(down)
        finally:
            self._used -= room
        return out

    def close(self) -> None:
        self._layers.clear()
        self._ends, self._tower, self._used = None, None, 0

    def _take(self, n_bytes: int, what: str) -> None:
        if n_bytes > (free := self.free_bytes()):
            raise DeviceMemoryError(f"{self.name}: {what} takes {gb(n_bytes)}, but {gb(free)} are free")
        self._used += n_bytes

    def _queue(self, seconds: float) -> None:
        """Work on the card, after all before it."""
        self._answer()
        self._card_s = max(self._card_s, self._cpu_s) + seconds

    def _answer(self) -> None:
        """Take one more piece of work, or fail."""
        if self._lost_after is not None:
            if self._lost_after == 0:
                raise DeviceLostError(f"{self.name} does not answer any more")
            self._lost_after -= 1

    def _wait(self, seconds: float) -> None:
        """The CPU waits for the card, and for what crosses."""
        self._cpu_s = max(self._cpu_s, self._card_s) + seconds
