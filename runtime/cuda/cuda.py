"""`Device` on a card: where everything lies, and which kernels make the halves of a layer.

Calls are not launched one by one. They are gathered until something must be known (logits, a routing that the CPU
waits for) or can start now (experts that run beside the CPU's), and then queued together. For one token, the gathered
calls are captured as a CUDA graph the first time and launched as one thereafter: all that differs from token to token,
the position first of all, is read from device memory. With everything resident that is one graph a token; with experts
on the CPU, two a layer. Steps for which experts are streamed are long, and launched at once. Dense products by PyTorch
(dense.py) are queued between our kernels on the same stream; then nothing is captured, because what PyTorch allocates
and waits for does not belong into a graph of ours.

The kernels are in arithmetic.cu, products.cu, attention.cu and experts.cu; docs/gpu-kernels.md has the map. Nothing here
computes. Pictures go through tower.py, between steps and on memory of their own.

Dimension key:  T tokens   D hidden   H heads   N, R, C, V no-rope, rope, latent and value width   E experts   A active
                F expert width   S cached positions
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.formats.packed import join_mlp, matrix_bytes, mlp_bytes, row_block_bytes
from kimi_lite.runtime import dense, kernels
from kimi_lite.runtime.cuda import halves
from kimi_lite.runtime.cuda.dense_products import Torch, TorchProducts
from kimi_lite.runtime.cuda.device import DeviceMemoryError, Routed
from kimi_lite.runtime.cuda.driver import Card
from kimi_lite.runtime.cuda.halves import ALIGNED, Buffers, Place, Workspace, shape_of
from kimi_lite.runtime.cuda.program import Cache, Matrix, Mlps
from kimi_lite.runtime.cuda.tower import Tower
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.speeds import ASSUMED, Speeds
from kimi_lite.runtime.vision import Progress, VisionWeights
from kimi_lite.runtime.weights import Layer, Weights

FORMS = {"q4g32": 0, "q8g32": 1, "q4b32": 2, "q3b32": 3}  # as in products.cu
INSTEAD = "run on the CPU with --vram 0, or make an int4 file of the published checkpoint: kimi-lite quantize CHECKPOINT model.gguf"


def open_device() -> "CudaDevice":
    """The card with most memory. Raises NoDeviceError or another KimiLiteError that says why there is none to use."""
    return CudaDevice()


class CudaDevice:
    """One model, or a part of it, on one card. Any thread may call, but not two at once."""

    def __init__(self, library: str | None = None, ordinal: int | None = None) -> None:
        """Open a card. `library` and the errors are those of `driver.Card`."""
        self._card = Card(library, ordinal)
        self.name = self._card.name
        self._layers = dict[int, Place]()
        self._tables = dict[int, NDArray[np.uint64]]()  # [E] addresses of experts, 0 for one that is not here
        self._lacking = dict[int, kernels.Mlp]()  # where a layer's other experts are
        self._work: Workspace | None = None
        self._way: Way | None = None  # by which they come
        self._whole = dict[int, Place]()  # layers as they are when those have come
        self._cache_at = 0
        self._head, self._norm, self._eps = halves.NO_MATRIX, 0, 0.0
        self._torch: Torch | None = None  # opened with the first layer that it multiplies for
        self._dense = dict[int | None, TorchProducts]()  # by layer; the head's for None
        self._queue = list[tuple[str, int]]()
        self._graphs = dict[tuple[tuple[str, int], ...], ctypes.c_void_p]()
        self._tower: Tower | None = None
        self._T, self._start = 0, 0
        self._host_busy = False  # the card may still read what lies in pinned memory
        self._waited = False  # the CPU waits for this step's routing

    # ---- what lies on the card

    def free_bytes(self) -> int:
        """Of memory that an upload could take now."""
        return self._card.memory_bytes()[0]

    def speeds(self) -> Speeds:
        """Those assumed of any machine, but for PCIe, which is measured for some milliseconds."""
        try:
            return replace(ASSUMED, pcie_gb_s=self._card.pcie_gb_s())
        except DeviceMemoryError:  # where so little is free, no plan will fit either
            return ASSUMED

    def load_layer(self, index: int, layer: Layer, experts: Sequence[int] | None) -> None:
        """Upload a layer with these routed experts; None for all.

        Raises:
            DeviceMemoryError: no room; the layer then is not there.
            UsageError: the layer has a matrix of a layout that no GPU kernel reads.
        """
        assert index not in self._layers, f"layer {index} is there already"
        a, f, where, shape = layer.attention, layer.feed_forward, f"layer {index}", shape_of(layer)
        by_torch = dense.dense(layer) if dense.is_dense(layer) else {}
        every = {"q": a.q, "kv_a": a.kv_a, "k_b": a.k_b, "v_b": a.v_b, "o": a.o}
        matrices = {name: matrix for name, matrix in every.items() if name not in by_torch}
        for name, matrix in matrices.items():
            _form(matrix.layout, f"{where}, {name}")
        if a.v_b.rows % 32:
            raise UsageError(f"{where}: values of width {a.v_b.rows}; the GPU kernels need a multiple of 32")
        parts: dict[str, NDArray[Any]] = {
            **{name: matrix.data for name, matrix in (matrices | by_torch).items()},
            "norm": a.norm_D,
            "kv_norm": a.kv_norm_C,
            "ffn_norm": f.norm_D,
        }
        if not by_torch:
            parts["shared"] = _run(f.shared, 0, f"{where}, shared experts")
        form, chosen, table_E = 0, list[int](), np.zeros(1, np.uint64)
        if f.routed is not None and f.router is not None:
            form = _form(_layout(f.routed, f"{where}, experts"), f"{where}, experts")
            chosen = list(range(f.routed.count)) if experts is None else sorted(set(experts))
            table_E = np.zeros(f.routed.count, np.uint64)
            parts |= {"router": f.router.weight_ED, "bias": f.router.bias_E}
            parts |= {f"expert {e}": _run(f.routed, e, f"{where}, experts") for e in chosen}
        at = self._place(parts | {"table": table_E, "whole table": table_E}, where)
        table_E[chosen] = [at[f"expert {e}"] for e in chosen]
        self._card.upload(at["table"], table_E)
        self._card.synchronize()
        self._tables[index] = table_E
        if f.routed is not None and len(chosen) < f.routed.count:
            self._lacking[index] = f.routed
        on_card = {name: _on_card(matrix, at[name]) for name, matrix in matrices.items()}
        if by_torch:
            self._dense[index] = TorchProducts(self._torch_here(), by_torch, at, shape)
        self._layers[index] = Place(
            shape=shape,
            norm=at["norm"],
            kv_norm=at["kv_norm"],
            ffn_norm=at["ffn_norm"],
            router=at.get("router", 0),
            bias=at.get("bias", 0),
            q=on_card.get("q", halves.NO_MATRIX),
            kv_a=on_card.get("kv_a", halves.NO_MATRIX),
            k_b=on_card["k_b"],
            v_b=on_card["v_b"],
            o=on_card.get("o", halves.NO_MATRIX),
            k_b_bytes=a.k_b.data.size // a.k_b.count,
            v_b_bytes=a.v_b.data.size // a.v_b.count,
            mlps=Mlps(
                at["table"],
                at.get("shared", 0),
                form,
                shape.F,
                0 if by_torch else _form(_layout(f.shared, where), where),
                0 if by_torch else shape.shared_F,
                shape.D,
                shape.A,
            ),
            eps=a.eps,
            kv_eps=a.kv_eps,
            ffn_eps=f.eps,
            scale=a.scale,
            routed_scale=f.router.scale if f.router else 0.0,
            dense=self._dense.get(index),
            whole_table=at["whole table"],
        )

    def load_ends(self, weights: Weights) -> None:
        """Upload the last norm and the head. Raises as `load_layer` does."""
        head = weights.head
        by_torch = head.layout in dense.LAYOUTS
        if not by_torch:
            _form(head.layout, "the head")
        at = self._place({"norm": weights.norm_D, "head": head.data}, "the head")
        self._norm, self._eps = at["norm"], weights.config.rms_eps
        if by_torch:
            self._dense[None] = TorchProducts(self._torch_here(), {"head": head}, at)
            self._head = Matrix(0, 0, head.rows, head.columns, 0)
        else:
            self._head = _on_card(head, at["head"])

    def run_dense(self, index: int | None, name: str, x_TI: Float) -> Float:
        """One dense product by PyTorch, of rows that the host has."""
        self._flush()
        return self._dense[index].run(name, x_TI)

    def _torch_here(self) -> Torch:
        if self._torch is None:
            self._torch = dense.backend().TorchOnCard(self._card.ordinal, self._card.stream)
        return self._torch

    def reserve_cache(self, context: int, *, streams: bool) -> None:
        """Room for the latent cache of all layers that were loaded, and for the work of a step.

        `streams` makes that a step of up to 2048 tokens, and adds the buffers for experts on their way. Raises
        DeviceMemoryError.
        """
        sizes = {
            index: kernels.latent_cache_bytes(context, place.shape.C, place.shape.R)
            for index, place in self._layers.items()
        }
        self._release_cache()
        total = sum(rows + columns for rows, columns in sizes.values())
        at = self._cache_at = self._card.allocate(total, f"the cache of {context} tokens")
        try:
            shapes = [place.shape for place in self._layers.values()]
            buffers = Buffers(shapes, context, self._head.rows, streams=streams)
            self._work = Workspace(self._card, buffers, shapes[0].D)
            if streams:
                self._way = Way(self._card, self._lacking, self._tables)
        except DeviceMemoryError:
            self._release_cache()
            raise
        self._card.clear(at, total)
        for index, (rows, columns) in sizes.items():
            place = self._layers[index]
            place.cache = Cache(at, at + rows, context, place.shape.C, place.shape.R)
            at += rows + columns
        self._whole = dict(self._layers)
        for index in self._lacking if self._way is not None else ():
            self._whole[index] = self._when_brought(index)
        self._card.synchronize()

    def _when_brought(self, index: int) -> Place:
        """The layer with a table in which no expert lacks."""
        assert self._way is not None
        place, table_E = self._layers[index], self._tables[index].copy()
        table_E[table_E == 0] = self._way.addresses(index)
        self._card.upload(place.whole_table, table_E)
        self._card.synchronize()
        mlps = Mlps.from_buffer_copy(place.mlps)
        mlps.experts = place.whole_table
        return replace(place, mlps=mlps)

    def _release_cache(self) -> None:
        if self._way is not None:
            self._card.free(self._way.base)
            self._card.unpin(self._way.pinned)
        if self._work is not None:
            self._card.free(self._work.base)
            self._card.unpin(self._work.pinned)
        if self._cache_at:
            self._card.free(self._cache_at)
        self._way, self._work, self._cache_at, self._graphs = None, None, 0, {}

    def rewind(self, n: int) -> None:
        """Forget cached positions from n on: the next `begin` says where it stands, so there is nothing to do."""

    def close(self) -> None:
        """Give all memory back."""
        self._card.close()

    def _place(self, parts: dict[str, NDArray[Any]], what: str) -> dict[str, int]:
        """Upload arrays into one piece of memory, so that there are all or none; their addresses by name."""
        offsets, total = halves.laid_out({name: part.nbytes for name, part in parts.items()})
        base = self._card.allocate(total, what)
        at = {name: base + offset for name, offset in offsets.items()}
        for name, part in parts.items():
            self._card.upload(at[name], part)
        self._card.synchronize()
        return at

    # ---- a step

    def begin(self, x_TD: Float, cos_TR: Float, sin_TR: Float, start: int) -> None:
        """Make x the residual stream of T tokens that stand from position `start` on."""
        T, w = len(x_TD), self._workspace
        assert 1 <= T <= w.longest, f"{T} tokens in one step; it takes 1 to {w.longest}"
        assert start + T <= w.context, f"{T} tokens after {start} exceed {w.context}"
        self._flush()
        self._wait_for_pinned_memory()
        self._T, self._start, self._waited = T, start, False
        starts = w.integers("start", -(-T // w.tokens))
        starts[:] = range(start, start + T, w.tokens)
        self._card.upload(w.at["start"], starts)
        for name, values in (("x", x_TD), ("cos", cos_TR), ("sin", sin_TR)):
            pinned = w.floats(name, values.size)
            pinned[:] = values.reshape(-1)
            self._card.upload(w.at[name], pinned)
        self._host_busy = True

    def attend(self, index: int) -> None:
        """x += attention(norm(x)), the tokens' latents and rotated keys being cached."""
        self._queue.append(("attend", index))

    def route(self, index: int, *, wanted: bool) -> Routed | None:
        """norm(x), and which experts act; `wanted` waits for it and brings it to the CPU."""
        self._queue.append(("route", index))
        if not wanted:
            return None
        self._waited = True
        self._queue.append(("fetch", index))
        self._flush()
        self._synchronize()
        T, w, shape = self._T, self._workspace, self._layers[index].shape
        h, weights = w.floats("h", T * shape.D), w.floats("weights", T * shape.A)
        ids = w.integers("ids", T * shape.A)
        return Routed(
            h.reshape(T, shape.D).copy(), ids.reshape(T, shape.A).copy(), weights.reshape(T, shape.A).copy()
        )

    def run_experts(self, index: int) -> None:
        """Start the shared MLP and the chosen experts that are on the device."""
        self._queue.append(("run_experts", index))
        if self._waited:  # the CPU computes the others now: start at once
            self._flush()

    def add_experts(self, index: int, outputs_MD: Float | None) -> None:
        """x += the weighted sum over the chosen experts in order of index, plus the shared MLP.

        `outputs_MD` are the outputs of the chosen experts that are not on the device, in the order of ids_TA's entries
        read row by row, after a `route` that was wanted; None if all are on it.
        """
        if outputs_MD is not None and len(outputs_MD):
            self._wait_for_pinned_memory()
            w, shape = self._workspace, self._layers[index].shape
            slots = self._T * shape.A
            slots_M = np.flatnonzero(self._tables[index][w.integers("ids", slots)] == 0)
            assert len(outputs_MD) == len(slots_M), f"{len(outputs_MD)} outputs for {len(slots_M)} experts"
            w.floats("missing", slots * shape.D).reshape(slots, shape.D)[slots_M] = outputs_MD
            self._host_busy = True
        self._queue.append(("add_experts", index))

    def bring(self, index: int) -> None:
        """Start copying the routed experts that a layer lacks; returns when all but the last two have come."""
        assert self._way is not None, "nothing was reserved for streaming"
        self._flush()
        self._way.bring(index)

    def run_layer(self, index: int) -> None:
        """Take all tokens of the step through a layer, part by part, once its experts have come."""
        self._flush()
        lacks = index in self._lacking
        if lacks:
            assert self._way is not None, "nothing was reserved for streaming"
            self._way.arrive(index)
        w = self._workspace
        for first in range(0, self._T, w.tokens):
            T = min(w.tokens, self._T - first)
            part = w.of(first, self._start + first + T)
            for half in _HALVES.values():
                half(self._card, self._whole[index], part, T)
        if lacks and self._way is not None:
            self._way.leave(index)

    def logits(self) -> Float:
        """Of the last token: float32 [V]."""
        self._queue.append(("logits", 0))
        self._flush()
        w = self._workspace
        pinned = w.floats("logits", self._head.rows)
        self._card.download(pinned, w.at["logits"])
        self._synchronize()
        return pinned.copy()

    def wait(self) -> None:
        """Return when all that was called for is done."""
        self._flush()
        self._synchronize()

    def residual(self) -> Float:
        """The residual stream as it is now, float32 [T, D]; waits. For tests and for those who look for a wrong bit."""
        self._flush()
        x_TD = np.empty((self._T, self._workspace.D), np.float32)
        self._card.download(x_TD, self._workspace.at["x"])
        self._synchronize()
        return x_TD

    # ---- pictures

    def keep_tower(self, weights: VisionWeights) -> None:
        """Upload an image tower, for good. Raises DeviceMemoryError or, for layouts without a kernel, UsageError."""
        self._tower_of(weights).load()

    def encode(
        self,
        weights: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: Progress | None = None,
    ) -> list[Float]:
        """Embedding rows [M, D] of pictures, as `vision.encode` gives them. Raises as `keep_tower` does."""
        return self._tower_of(weights).encode(canvases, on_progress)

    def _tower_of(self, weights: VisionWeights) -> Tower:
        if self._tower is None or self._tower.weights is not weights:
            if self._tower is not None:
                self._tower.unload()
            self._tower = Tower(self._card, weights)
        return self._tower

    @property
    def _workspace(self) -> Workspace:
        assert self._work is not None, "reserve_cache comes first"
        return self._work

    def _flush(self) -> None:
        """Queue the gathered calls: kernel by kernel, or for one token, if all is ours, as a graph."""
        calls, self._queue = tuple(self._queue), []
        if not calls:
            return
        if self._T > 1 or self._dense:
            self._run(calls)
            return
        if calls not in self._graphs:
            self._card.begin_capture()
            try:
                self._run(calls)
            finally:  # whoever interrupts leaves no stream that records
                graph = self._card.end_capture()
            self._graphs[calls] = graph
        self._card.launch_graph(self._graphs[calls])

    def _run(self, calls: tuple[tuple[str, int], ...]) -> None:
        card, w, T = self._card, self._workspace, self._T
        if T > 1:  # a token alone has launches that stay right at every position
            w = w.of(0, self._start + T)
        for name, index in calls:
            if name == "logits" and None in self._dense:
                halves.last_norm(card, w, T, self._norm, self._eps)
                self._dense[None].logits(w, self._head.rows)
            elif name == "logits":
                halves.logits(card, w, T, self._norm, self._eps, self._head)
            elif name == "fetch":
                halves.fetch(card, self._layers[index], w, T)
            else:
                _HALVES[name](card, self._layers[index], w, T)

    def _synchronize(self) -> None:
        self._card.synchronize()
        self._host_busy = False

    def _wait_for_pinned_memory(self) -> None:
        if self._host_busy:
            self._synchronize()


class Way:
    """How experts that do not lie on the card come there for a long step, and are forgotten.

    An expert is copied from the file's pages into one of two pinned buffers while the card copies the one before out of
    the other, into one of two buffers of its own, which layers take in turn. Three kinds of marks keep the order: a
    pinned buffer is written when its copy is done, a layer runs when its experts have arrived, and a buffer on the card
    is filled when the layer that used it has been left.
    """

    def __init__(
        self, card: Card, lacking: Mapping[int, kernels.Mlp], tables: Mapping[int, NDArray[np.uint64]]
    ) -> None:
        """Room for the experts that each layer lacks. Raises DeviceMemoryError."""
        self._card, self._mlps = card, lacking
        self._missing = {index: np.flatnonzero(tables[index] == 0).tolist() for index in lacking}
        self._turns = {index: n % 2 for n, index in enumerate(sorted(lacking))}
        self._run_bytes = max(_run(mlp, 0, "experts").nbytes for mlp in lacking.values())
        self._stride = -(-self._run_bytes // ALIGNED) * ALIGNED
        self._buffer_bytes = max(map(len, self._missing.values())) * self._stride
        self.pinned = card.pinned(2 * self._run_bytes)
        try:
            self.base = card.allocate(2 * self._buffer_bytes, "two buffers for experts of long prompts")
        except DeviceMemoryError:
            card.unpin(self.pinned)
            raise
        self._copied, self._arrived, self._left = ([card.event(), card.event()] for _ in range(3))
        self._n = 0  # experts copied so far

    def addresses(self, index: int) -> list[int]:
        """Where the experts that a layer lacks will be, in order."""
        base = self.base + self._turns[index] * self._buffer_bytes
        return [base + i * self._stride for i in range(len(self._missing[index]))]

    def bring(self, index: int) -> None:
        """Queue the copies of a layer's missing experts, beside all that is queued to be computed."""
        card, turn = self._card, self._turns[index]
        card.order(self._left[turn], aside=True)
        for expert, address in zip(self._missing[index], self.addresses(index), strict=True):
            run, half = _run(self._mlps[index], expert, "experts"), self._n % 2
            card.wait(self._copied[half])
            pinned = self.pinned[half * self._run_bytes :][: run.nbytes]
            kernels.copy(pinned, run)
            card.upload(address, pinned, aside=True)
            card.mark(self._copied[half], aside=True)
            self._n += 1
        card.mark(self._arrived[turn], aside=True)

    def arrive(self, index: int) -> None:
        """What is queued from here on waits for the layer's experts."""
        self._card.order(self._arrived[self._turns[index]])

    def leave(self, index: int) -> None:
        """Behind what was queued so far, nothing needs the layer's experts any more."""
        self._card.mark(self._left[self._turns[index]])


_HALVES: dict[str, Callable[[Card, Place, Workspace, int], None]] = {
    "attend": halves.attend,
    "route": halves.route,
    "run_experts": halves.run_experts,
    "add_experts": halves.add_experts,
}


def _form(layout: str, what: str) -> int:
    if layout not in FORMS:
        raise UsageError(
            f"{what}: the layout {layout} has no GPU kernel, only {', '.join(FORMS)} have (int4 files, and GGUF files "
            f"of Q4_0 or Q8_0); {INSTEAD}"
        )
    return FORMS[layout]


def _on_card(matrix: kernels.Matrix, address: int) -> Matrix:
    stride = row_block_bytes(matrix.layout, matrix.columns)
    return Matrix(address, FORMS[matrix.layout], matrix.rows, matrix.columns, stride)


def _layout(mlp: kernels.Mlp, what: str) -> str:
    """The one layout of an MLP's three matrices."""
    if mlp.matrices is None:
        return mlp.layout
    layouts = sorted({matrix.layout for matrix in mlp.matrices})
    if len(layouts) > 1:
        raise UsageError(
            f"{what}: the layouts {' and '.join(layouts)} in one MLP; the GPU kernels need one: {INSTEAD}"
        )
    return layouts[0]


def _run(mlp: kernels.Mlp, expert: int, what: str) -> NDArray[np.uint8]:
    """One expert as a packed run."""
    layout = _layout(mlp, what)
    _form(layout, what)
    if mlp.data is not None:
        size = mlp_bytes(layout, mlp.F, mlp.D)
        return mlp.data[expert * size : (expert + 1) * size]
    assert mlp.matrices is not None
    sizes = (matrix_bytes(layout, matrix.rows, matrix.columns) for matrix in mlp.matrices)
    gate, up, down = (
        matrix.data[expert * size : (expert + 1) * size]
        for matrix, size in zip(mlp.matrices, sizes, strict=True)
    )
    return join_mlp(gate, up, down, layout, mlp.D)
