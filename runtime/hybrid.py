"""The text model over a card, with the CPU for the experts that are not there.

One loop serves all placements. In each layer the card attends and routes; where experts are missing, the CPU is told
which of them were chosen and runs them while the card runs the shared MLP and its own; the card adds all up in order of
index. So an expert's place changes when it is done and never what comes out: a plan is a matter of speed.

A long step of a prompt goes another way if the plan says so: the missing experts are streamed to the card, those of the next
layer while this layer takes all tokens, and then forgotten. Nothing that lies on the card makes room for them.

`place` finds a card, makes a plan and carries it out. Another program may take memory in between: then one more plan is
made for what is left, and after that it is said. Because the bits are the CPU's, a card can prove itself: before it answers
anything, a few tokens are run on both, and a card that differs is not used.

Dense weights in one of dense.py's layouts are multiplied by PyTorch and bitsandbytes, which is another arithmetic than the
CPU's. Such a card proves itself in two steps: each of those products is as near to the exact one as its arithmetic can
be; and with the card's products in their place, the CPU's engine has the card's bits.

Dimension key:  T tokens   D hidden   A active experts   M chosen experts that are not on the card   E routed experts
"""

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, KimiLiteError, KimiLiteWarning, UsageError
from kimi_lite.runtime import dense, kernels, vision
from kimi_lite.runtime.cache import LatentCache
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.device import (
    FEW,
    MANY,
    MOST_TOKENS,
    Device,
    DeviceMemoryError,
    DeviceWrongError,
    NoDeviceError,
    Routed,
)
from kimi_lite.runtime.cuda.find import NothingToTryError, find_device
from kimi_lite.runtime.cuda.tower import TowerShape, room_for
from kimi_lite.runtime.kernels import FeedForwardLayer, Float, Matrix
from kimi_lite.runtime.model import CpuModel, OnLayer, Spliced, embedded, rope_tables
from kimi_lite.runtime.placement import Plan, gb, make_plan, plan_tower
from kimi_lite.runtime.usage import default_directory, load_usage
from kimi_lite.runtime.vision import BATCH_ROWS, Progress, VisionWeights
from kimi_lite.runtime.weights import Weights

# Tokens of the steps by which a card proves itself: between them they run every kernel. And of one for which experts come.
PROOF, PROOF_STREAMED = (FEW, 1, MANY), FEW + 1
PROOF_GRID = (10, 14)  # patches of the picture by which it proves its tower: more than a block of keys
SECOND_TRY = 0.95  # of what is free when the first plan has failed: what took the memory may be growing


class HybridModel:
    """A text model on a card as far as a plan says, and its cache there."""

    def __init__(self, weights: Weights, device: Device, plan: Plan, gpu_dense: str | None = None) -> None:
        """Upload, dense weights in the layout `gpu_dense` of dense.py, or for None as they are.

        Raises DeviceMemoryError if the card has less room than the plan was made for.
        """
        self.weights, self.device, self.plan, self.n = weights, device, plan, 0
        self.gpu_dense = gpu_dense
        self.uploaded: dict[
            int | None, dict[str, Matrix]
        ] = {}  # what was quantized for it, until it is proven
        self._free_before = device.free_bytes()
        self._proved: VisionWeights | None = None  # the image tower that has proved itself
        self._kept: VisionWeights | None = None  # the one that stays on the card
        self._here: list[NDArray[np.bool_] | None] = []  # [E] of each layer; None: nothing is missing
        for index, layer in enumerate(weights.layers):
            experts = plan.experts(index)
            if gpu_dense:
                layer = dense.quantized(layer, gpu_dense)
                self.uploaded[index] = dense.dense(layer)
            device.load_layer(index, layer, experts)
            here_E = np.zeros(plan.sizes.layers[index].n_experts, bool)
            here_E[list(plan.resident[index])] = True
            self._here.append(None if experts is None else here_E)
        head = weights.head
        if gpu_dense:
            head = dense.quantized_matrix(head, gpu_dense)
            self.uploaded[None] = {"head": head}
        device.load_ends(replace(weights, head=head))
        device.reserve_cache(plan.context, streams=plan.stream_from is not None)
        self._closing = weakref.finalize(self, _close, device)

    @property
    def placement(self) -> str:
        """Where it runs, for people."""
        p = self.plan
        rest = "" if p.whole else ", the others on the CPU"
        streamed = (
            "" if p.stream_from is None else f", streamed for prompts of {p.stream_from} tokens and more"
        )
        by_others = f"; dense weights in {self.gpu_dense} by bitsandbytes" if self.gpu_dense else ""
        return f"{p.device} with {p.n_resident} of {p.n_experts} experts{rest}{streamed}{by_others}"

    def step(self, n_left: int) -> int:
        """Tokens of the next step, of so many that are left."""
        return self.plan.step(n_left)

    def forward(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None = None, on_layer: OnLayer | None = None
    ) -> Float:
        """What `CpuModel.forward` does with absorbed attention, bit for bit, unless dense weights are in another layout.

        Raises DeviceLostError or DeviceMemoryError; a card may fail.
        """
        way = self.stream if self.plan.streams(len(ids_T)) else self.share
        return way(ids_T, pictures, on_layer)

    def share(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None = None, on_layer: OnLayer | None = None
    ) -> Float:
        """A step, of at most MOST_TOKENS, whose missing experts the CPU runs."""
        assert len(ids_T) <= MOST_TOKENS, f"{len(ids_T)} tokens in one step"
        self._begin(ids_T, pictures)
        device = self.device
        for index, layer in enumerate(self.weights.layers):
            device.attend(index)
            here_E = self._here[index]
            routed = device.route(index, wanted=here_E is not None)
            device.run_experts(index)
            missing_MD = None
            if here_E is not None and routed is not None:
                missing_MD = _run_missing(layer.feed_forward, routed, here_E)
            device.add_experts(index, missing_MD)
            if on_layer:
                on_layer(index + 1)
        return self._end(len(ids_T))

    def stream(
        self,
        ids_T: NDArray[np.int32],
        pictures: Spliced | None = None,
        on_layer: OnLayer | None = None,
        n_layers: int | None = None,
    ) -> Float:
        """A step for which the missing experts are brought to the card; through the first `n_layers` only, if given."""
        self._begin(ids_T, pictures)
        device, n_layers = self.device, n_layers or len(self.weights.layers)
        for index in range(n_layers):
            if self._here[index] is not None:
                device.bring(index)  # while the card is busy with the layers before
            device.run_layer(index)
            if on_layer:
                on_layer(index + 1)
        return self._end(len(ids_T))

    def _begin(self, ids_T: NDArray[np.int32], pictures: Spliced | None) -> None:
        T = len(ids_T)
        assert self.n + T <= self.plan.context, f"{T} tokens after {self.n} exceed {self.plan.context}"
        x_TD = embedded(self.weights, ids_T, pictures)
        self.device.begin(x_TD, *rope_tables(self.weights.config, self.n, T), self.n)

    def _end(self, T: int) -> Float:
        logits_V = self.device.logits()
        self.n += T
        return logits_V

    def rewind(self, n: int) -> None:
        """Keep the first n cached positions."""
        assert 0 <= n <= self.n, f"rewind to {n} of {self.n} positions"
        self.device.rewind(n)
        self.n = n

    def encode(
        self,
        tower: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: Progress | None = None,
        prove: bool = True,
    ) -> list[Float]:
        """What `vision.encode` does, bit for bit, in the memory that is left; before the first one, the tower proves itself.

        Raises:
            DeviceMemoryError: what is left is not enough.
            DeviceWrongError: the tower's rows are not the CPU's.
            UsageError: the tower has matrices of a layout that the card's kernels do not run.
            DeviceLostError: the card failed.
        """
        shape, limit = TowerShape.of(tower.config, tower.text_width), tower.image.token_limit
        sizes = [pixels.size // (3 * tower.config.patch_size**2) for pixels in canvases]
        self._check_room(tower, shape, sizes)
        if prove and self._proved is not tower:
            self._check_room(tower, shape, [PROOF_GRID[0] * PROOF_GRID[1]])
            _prove_tower(self.device, tower)
            self._proved = tower
        if self._kept is not tower and plan_tower(shape, self.left(), longest(limit)).resident:
            self.device.keep_tower(tower)
            self._kept = tower
            self._check_room(tower, shape, sizes)  # many small ones round up to more than one long one
        return self.device.encode(tower, canvases, on_progress)

    def _check_room(self, tower: VisionWeights, shape: TowerShape, sizes: Sequence[int]) -> None:
        """Raises DeviceMemoryError if pictures of so many patches take more than is left."""
        needed = room_for(shape, sizes, resident=self._kept is tower)
        if needed > (left := self.left()):
            raise DeviceMemoryError(
                f"{self.device.name}: encoding pictures of {sum(sizes)} patches takes {gb(needed)}, but {gb(left)} are left"
            )

    def left(self) -> int:
        """Bytes of the card's memory that may still be taken."""
        free = self.device.free_bytes()
        return max(0, min(free, self.plan.budget - (self._free_before - free)))

    def close(self) -> None:
        """Give the card's memory back, which also happens when nobody needs the model any more."""
        self._closing()


def longest(limit: int) -> int:
    """Patches that are encoded at once at most, where a picture has at most `limit`."""
    return max(limit, BATCH_ROWS)


def _close(device: Device) -> None:
    with contextlib.suppress(KimiLiteError):  # what is lost may not even be closed
        device.close()


def _run_missing(f: FeedForwardLayer, routed: Routed, here_E: NDArray[np.bool_]) -> Float | None:
    """The outputs [M, D] of the chosen experts that are not on the card; None if all are."""
    assert f.routed is not None
    assert f.used_E is not None
    if len(routed.ids_TA) == 1:
        f.used_E[routed.ids_TA[0]] += 1
    tokens_M, slots_M = np.nonzero(~here_E[routed.ids_TA])
    if not len(tokens_M):
        return None
    experts_M = routed.ids_TA[tokens_M, slots_M]
    return kernels.expert_outputs(f.routed, routed.h_TD, experts_M, tokens_M.astype(np.int32))


def place(
    weights: Weights, context: int, vram: int | None, prove: bool = True, gpu_dense: str | None = None
) -> CpuModel | HybridModel:
    """A model where it runs best.

    Args:
        vram: bytes of a card's memory that may be taken; 0 for the CPU alone; None for a card if one works, else the
            CPU, with a warning if there is a driver. KIMI_LITE_DEVICE asks for a card as `vram` does.
        prove: hold the card against the CPU before it is used.
        gpu_dense: a layout of dense.py for the dense weights on the card, which is asked for by that.

    Raises:
        NoDeviceError: a card was asked for and there is none.
        UsageError: `gpu_dense` is no such layout, or nothing here multiplies it.
        DoesNotFitError: the card's memory, or `vram`, is too small, or was taken while the model was loaded.
    """
    dense.check(gpu_dense)
    if vram == 0 and gpu_dense:
        raise UsageError(
            "--gpu-dense is for weights on a card, and --vram 0 keeps all on the CPU; leave one out"
        )
    if vram == 0:
        return CpuModel(weights, context)
    asked = vram is not None or gpu_dense is not None
    try:
        model = _on_card(weights, context, vram, gpu_dense)
        if prove and gpu_dense:
            _prove_dense(model)
        elif prove:
            _prove(model)
        model.uploaded.clear()
        return model
    except KimiLiteError as error:
        if asked and isinstance(error, NoDeviceError):
            without = " without --gpu-dense" if gpu_dense else ""
            raise NoDeviceError(
                f"a card was asked for, but {error}; --vram 0{without} runs on the CPU"
            ) from None
        if asked or os.environ.get("KIMI_LITE_DEVICE"):
            raise
        if not isinstance(error, NothingToTryError):
            warnings.warn(f"the CPU runs, because the card cannot: {error}", KimiLiteWarning, stacklevel=2)
    return CpuModel(weights, context)


def _on_card(weights: Weights, context: int, vram: int | None, gpu_dense: str | None) -> HybridModel:
    outline = dense.outline(weights, gpu_dense)
    device = find_device()
    try:
        return _load(weights, device, _plan(outline, device, context, vram, 1), gpu_dense)
    except DeviceMemoryError:
        device = find_device()
    try:
        return _load(weights, device, _plan(outline, device, context, vram, SECOND_TRY), gpu_dense)
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"the card's memory was taken by another program while the model was loaded, and a second, smaller plan "
            f"failed as well ({error}); close what uses the card and try again, or run on the CPU with --vram 0"
        ) from None


def _plan(weights: Weights, device: Device, context: int, vram: int | None, share: float) -> Plan:
    """Raises DoesNotFitError, or whatever else the device says; it is closed then."""
    try:
        return make_plan(
            sizes_of(weights),
            device=device.name,
            free=int(device.free_bytes() * share),
            context=context,
            speeds=device.speeds(),
            cap=vram,
            usage=load_usage(weights, default_directory()),
        )
    except KimiLiteError:
        _close(device)
        raise


def _load(weights: Weights, device: Device, plan: Plan, gpu_dense: str | None) -> HybridModel:
    """Raises DeviceMemoryError, or whatever else the device says; it is closed then."""
    try:
        return HybridModel(weights, device, plan, gpu_dense)
    except BaseException:
        _close(device)
        raise


def _prove(model: HybridModel) -> None:
    """Hold the card against the CPU, bit for bit. Raises DeviceWrongError, the card then being closed."""
    context = _proof_context(model)
    _same_bits(model, lambda weights: CpuModel(weights, context, expanded=False).forward)


def _prove_dense(model: HybridModel) -> None:
    """Hold each dense product against the exact one, and all else against the CPU, bit for bit.

    Raises DeviceWrongError, the card then being closed.
    """
    device = model.device

    def run(index: int | None, name: str, x_TI: Float) -> Float:
        y_TO = device.run_dense(index, name, x_TI)
        if name == "silu":
            exact_TO, bound_TO = dense.silu_bound(x_TI)
        else:
            exact_TO, bound_TO = dense.bound(model.uploaded[index][name], x_TI)
        if not (np.abs(y_TO - exact_TO) <= bound_TO).all():  # nor may anything be not a number
            raise _wrong(
                model, f"products of {model.gpu_dense} weights ({name}) beyond what rounding explains"
            )
        return y_TO

    def forward(weights: Weights, cache: LatentCache, ids_T: NDArray[np.int32]) -> Float:
        """`CpuModel.forward` with the card's dense products."""
        x_TD = embedded(weights, ids_T, None)
        cos_TR, sin_TR = rope_tables(weights.config, cache.n, len(ids_T))
        for index, layer in enumerate(weights.layers):
            f, multiply = layer.feed_forward, partial(run, index)
            dense.attend(layer.attention, x_TD, cos_TR, sin_TR, cache.layers[index], cache.n, multiply)
            h_TD = kernels.rms_norm(x_TD, f.norm_D, f.eps)
            dense.combine(f, h_TD, dense.mlp(h_TD, multiply), x_TD)
        cache.n += len(ids_T)
        return run(None, "head", kernels.rms_norm(x_TD[-1:], weights.norm_D, weights.config.rms_eps)).reshape(
            -1
        )

    context = _proof_context(model)
    _same_bits(model, lambda weights: partial(forward, weights, LatentCache(weights.config, context)))


def _proof_context(model: HybridModel) -> int:
    return min(sum(PROOF), model.plan.context)


def _same_bits(
    model: HybridModel, from_empty: Callable[[Weights], Callable[[NDArray[np.int32]], Float]]
) -> None:
    """Hold the card against what `from_empty` gives for some weights: a `forward` whose cache is empty.

    For the steps of PROOF; and if experts are to be streamed, for one such step through as many layers as let a buffer be
    used a second time. Raises DeviceWrongError, the card then being closed.
    """
    weights, context = model.weights, _proof_context(model)
    counts = [layer.feed_forward.used_E for layer in weights.layers]
    before = [None if used_E is None else used_E.copy() for used_E in counts]
    forward = from_empty(weights)
    for n in PROOF:
        ids_T = np.arange(model.n, min(model.n + n, context), dtype=np.int32)
        if len(ids_T) and not np.array_equal(model.share(ids_T), forward(ids_T)):
            raise _wrong(model, "other values than the CPU")
    model.rewind(0)
    if model.plan.stream_from is not None:
        n_layers, ids_T = _few_layers(model.plan), np.arange(min(PROOF_STREAMED, context), dtype=np.int32)
        config = replace(weights.config, n_layers=n_layers)
        forward = from_empty(replace(weights, config=config, layers=weights.layers[:n_layers]))
        if not np.array_equal(model.stream(ids_T, n_layers=n_layers), forward(ids_T)):
            raise _wrong(model, "other values than the CPU where experts are streamed")
        model.rewind(0)
    for used_E, kept_E in zip(counts, before, strict=True):  # a proof is no use by a person
        if used_E is not None and kept_E is not None:
            used_E[:] = kept_E


def _few_layers(plan: Plan) -> int:
    """The first layers, up to the third that lacks experts."""
    lacking = [index for index in range(len(plan.resident)) if plan.experts(index) is not None]
    return lacking[:3][-1] + 1


def _wrong(model: HybridModel, what: str) -> DeviceWrongError:
    """The card is closed, and this says why."""
    model.close()
    return DeviceWrongError(
        f"{model.device.name} computes {what}, so it is not used; please report this with the output of `kimi-lite doctor`"
    )


def _prove_tower(device: Device, tower: VisionWeights) -> None:
    """Hold a small picture's rows against the CPU's, bit for bit. Raises DeviceWrongError."""
    patch, (h, w) = tower.config.patch_size, PROOF_GRID
    pixels = np.arange(h * w * patch**2 * 3) * 7 // 5 % 256
    picture = [pixels.astype(np.uint8).reshape(h * patch, w * patch, 3)]
    if not np.array_equal(device.encode(tower, picture)[0], vision.encode(tower, picture)[0]):
        raise DeviceWrongError(
            f"{device.name} encodes pictures to other values than the CPU, so it encodes none; please report this with the "
            "output of `kimi-lite doctor`"
        )
