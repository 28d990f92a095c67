"""The text model over a card, with the CPU for the experts that are not there.

One loop serves all placements. In each layer the card attends and routes; where experts are missing, the CPU is told
which of them were chosen and runs them while the card runs the shared MLP and its own; the card adds all up in order of
index. So an expert's place changes when it is done and never what comes out: a plan is a matter of speed.

`place` finds a card, makes a plan and carries it out. Another program may take memory in between: then one more plan is
made for what is left, and after that it is said. Because the bits are the CPU's, a card can prove itself: before it answers
anything, a few tokens are run on both, and a card that differs is not used.

Dimension key:  T tokens   D hidden   A active experts   M chosen experts that are not on the card   E routed experts
"""

import contextlib
import os
import warnings
import weakref

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, KimiLiteError, KimiLiteWarning
from kimi_lite.runtime import kernels
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.device import (
    MOST_TOKENS,
    Device,
    DeviceMemoryError,
    DeviceWrongError,
    NoDeviceError,
    Routed,
)
from kimi_lite.runtime.cuda.find import NothingToTryError, find_device
from kimi_lite.runtime.kernels import FeedForwardLayer, Float
from kimi_lite.runtime.model import CpuModel, OnLayer, Spliced, embedded, rope_tables
from kimi_lite.runtime.placement import Plan, make_plan
from kimi_lite.runtime.usage import default_directory, load_usage
from kimi_lite.runtime.weights import Weights

PROOF = (9, 1)  # tokens of the steps by which a card proves itself: the kernels for many, and those for one
SECOND_TRY = 0.95  # of what is free when the first plan has failed: what took the memory may be growing


class HybridModel:
    """A text model on a card as far as a plan says, and its cache there."""

    chunk = MOST_TOKENS

    def __init__(self, weights: Weights, device: Device, plan: Plan) -> None:
        """Upload. Raises DeviceMemoryError if the card has less room than the plan was made for."""
        self.weights, self.device, self.plan, self.n = weights, device, plan, 0
        self._here: list[NDArray[np.bool_] | None] = []  # [E] of each layer; None: nothing is missing
        for index, layer in enumerate(weights.layers):
            experts = plan.experts(index)
            device.load_layer(index, layer, experts)
            here_E = np.zeros(plan.sizes.layers[index].n_experts, bool)
            here_E[list(plan.resident[index])] = True
            self._here.append(None if experts is None else here_E)
        device.load_ends(weights)
        device.reserve_cache(plan.context)
        self._closing = weakref.finalize(self, _close, device)

    @property
    def placement(self) -> str:
        """Where it runs, for people."""
        p = self.plan
        rest = "" if p.whole else ", the others on the CPU"
        return f"{p.device} with {p.n_resident} of {p.n_experts} experts{rest}"

    def forward(
        self, ids_T: NDArray[np.int32], pictures: Spliced | None = None, on_layer: OnLayer | None = None
    ) -> Float:
        """What `CpuModel.forward` does, bit for bit. Raises DeviceLostError or DeviceMemoryError; a card may fail."""
        c, T, device = self.weights.config, len(ids_T), self.device
        assert self.n + T <= self.plan.context, f"{T} tokens after {self.n} exceed {self.plan.context}"
        x_TD = embedded(self.weights, ids_T, pictures)
        device.begin(x_TD, *rope_tables(c, self.n, T), self.n)
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
        logits_V = device.logits()
        self.n += T
        return logits_V

    def rewind(self, n: int) -> None:
        """Keep the first n cached positions."""
        assert 0 <= n <= self.n, f"rewind to {n} of {self.n} positions"
        self.device.rewind(n)
        self.n = n

    def close(self) -> None:
        """Give the card's memory back, which also happens when nobody needs the model any more."""
        self._closing()


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


def place(weights: Weights, context: int, vram: int | None, prove: bool = True) -> CpuModel | HybridModel:
    """A model where it runs best.

    Args:
        vram: bytes of a card's memory that may be taken; 0 for the CPU alone; None for a card if one works, else the
            CPU, with a warning if there is a driver. KIMI_LITE_DEVICE asks for a card as `vram` does.
        prove: hold the card against the CPU before it is used.

    Raises:
        NoDeviceError: a card was asked for and there is none.
        DoesNotFitError: the card's memory, or `vram`, is too small, or was taken while the model was loaded.
    """
    if vram == 0:
        return CpuModel(weights, context)
    try:
        model = _on_card(weights, context, vram)
        if prove:
            _prove(model)
        return model
    except KimiLiteError as error:
        if vram is not None and isinstance(error, NoDeviceError):
            raise NoDeviceError(f"a card was asked for, but {error}; --vram 0 runs on the CPU") from None
        if vram is not None or os.environ.get("KIMI_LITE_DEVICE"):
            raise
        if not isinstance(error, NothingToTryError):
            warnings.warn(f"the CPU runs, because the card cannot: {error}", KimiLiteWarning, stacklevel=2)
    return CpuModel(weights, context)


def _on_card(weights: Weights, context: int, vram: int | None) -> HybridModel:
    device = find_device()
    try:
        return _load(weights, device, _plan(weights, device, context, vram, 1))
    except DeviceMemoryError:
        device = find_device()
    try:
        return _load(weights, device, _plan(weights, device, context, vram, SECOND_TRY))
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"the card's memory was taken by another program while the model was loaded, and a second, smaller plan "
            f"failed as well ({error}); close what uses the card and try again, or run on the CPU with --vram 0"
        ) from None


def _plan(weights: Weights, device: Device, context: int, vram: int | None, share: float) -> Plan:
    """Raises DoesNotFitError, the device then being closed."""
    try:
        return make_plan(
            sizes_of(weights),
            device=device.name,
            free=int(device.free_bytes() * share),
            context=context,
            cap=vram,
            usage=load_usage(weights, default_directory()),
        )
    except DoesNotFitError:
        device.close()
        raise


def _load(weights: Weights, device: Device, plan: Plan) -> HybridModel:
    """Raises DeviceMemoryError, or whatever else the device says; it is closed then."""
    try:
        return HybridModel(weights, device, plan)
    except BaseException:
        _close(device)
        raise


def _prove(model: HybridModel) -> None:
    """Hold the card against the CPU, bit for bit. Raises DeviceWrongError, the card then being closed."""
    weights, context = model.weights, min(sum(PROOF), model.plan.context)
    cpu, counts = CpuModel(weights, context), [layer.feed_forward.used_E for layer in weights.layers]
    before = [None if used_E is None else used_E.copy() for used_E in counts]
    for n in PROOF:
        ids_T = np.arange(cpu.cache.n, min(cpu.cache.n + n, context), dtype=np.int32)
        if len(ids_T) and not np.array_equal(model.forward(ids_T), cpu.forward(ids_T)):
            model.close()
            raise DeviceWrongError(
                f"{model.device.name} computes other values than the CPU, so it is not used; please report this with the "
                "output of `kimi-lite doctor`"
            )
    model.rewind(0)
    for used_E, kept_E in zip(counts, before, strict=True):  # a proof is no use by a person
        if used_E is not None and kept_E is not None:
            used_E[:] = kept_E
