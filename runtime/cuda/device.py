"""What the engine asks of an accelerator: memory, a stream of work in order, the halves of a layer, and pictures.

`CudaDevice` keeps this contract on a card, `SimulatedDevice` on CPU threads with the timing of a card. Scheduling,
placement and what happens on bad days know this page only. Products, norms and sums follow the order of
docs/kernels.md, so that a device gives the bits of the CPU engine, wherever an expert lies; but for dense weights in the
layouts of dense.py, which PyTorch and bitsandbytes multiply.

Two kinds of steps share `begin` and `logits`. In one, of at most MOST_TOKENS, the four halves are called layer by layer, and
the CPU runs the experts that are not there. In the other, of at most MOST_STREAMED, `bring` streams them to the device ahead
of `run_layer`, which takes all tokens through a layer before the next.

Dimension key:  T tokens   D hidden   R rope   A active experts   V vocabulary   M experts that ran on the CPU
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import DoesNotFitError, KimiLiteError, UsageError
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.vision import Progress, VisionWeights
from kimi_lite.runtime.weights import Layer, Weights


class NoDeviceError(UsageError):
    """There is no card to use; the text says why."""


MOST_TOKENS = 512  # of one step
# Below FEW tokens the products of a step take one token at a time, from there on eight, and from MANY on tiles of 32.
FEW, MANY = 8, 64
MOST_STREAMED = 4 * MOST_TOKENS  # of a step for which experts are brought to the device


class DeviceMemoryError(DoesNotFitError):
    """The device has no room for what was asked; nothing of it was kept."""


class DeviceWrongError(KimiLiteError):
    """The device gives other bits than the CPU."""


class DeviceLostError(KimiLiteError):
    """The device failed, or its driver did; nothing on it can be used any more."""


@dataclass(frozen=True)
class Routed:
    """What the CPU needs to run the chosen experts that are not on the device."""

    h_TD: Float  # the normalised input of all experts
    ids_TA: NDArray[np.int32]  # ascending in each row
    weights_TA: Float


class Device(Protocol):
    """One accelerator with one model's weights on it. Calls are queued in order; those that return arrays wait."""

    name: str

    def free_bytes(self) -> int:
        """Of memory that an upload could take now."""

    def speeds(self) -> Speeds:
        """What plans for this device go by: the way to it is measured; the rest may be assumed."""

    def load_layer(self, index: int, layer: Layer, experts: Sequence[int] | None) -> None:
        """Upload a layer: attention, norms, router, shared (or dense) MLP, and these routed experts; None for all.

        Raises DeviceMemoryError; the layer then is not there.
        """

    def load_ends(self, weights: Weights) -> None:
        """Upload the last norm and the head. Embedding rows are looked up on the CPU."""

    def reserve_cache(self, context: int, *, streams: bool) -> None:
        """Room for the latent cache of all layers that were loaded, and for the work of a step.

        `streams` adds room for the second kind of step: two buffers, each for the experts that one layer lacks. Raises
        DeviceMemoryError; nothing of it then is there.
        """

    def rewind(self, n: int) -> None:
        """Forget cached positions from n on."""

    def begin(self, x_TD: Float, cos_TR: Float, sin_TR: Float, start: int) -> None:
        """Make x the residual stream of T tokens that stand from position `start` on."""

    def attend(self, index: int) -> None:
        """x += attention(norm(x)), the tokens' latents and rotated keys being cached."""

    def route(self, index: int, *, wanted: bool) -> Routed | None:
        """norm(x), and which experts act; `wanted` waits for it and brings it to the CPU."""

    def run_experts(self, index: int) -> None:
        """Start the shared MLP and the chosen experts that are on the device."""

    def add_experts(self, index: int, outputs_MD: Float | None) -> None:
        """x += the weighted sum over the chosen experts in order of index, plus the shared MLP.

        `outputs_MD` are the outputs, not weighted, of the chosen experts that are not on the device, in the order of
        ids_TA's entries read row by row; None if all are on it.
        """

    def bring(self, index: int) -> None:
        """Start copying the routed experts that layer `index` lacks, while the device computes what was queued before.

        They are there for one `run_layer`. The next `bring` takes the other buffer; one more waits until this is free.
        """

    def run_layer(self, index: int) -> None:
        """Take all tokens of the step through a layer, all of whose experts are there or on their way."""

    def logits(self) -> Float:
        """Of the last token: float32 [V]."""

    def wait(self) -> None:
        """Return when all that was called for is done: for those who measure, because a step waits by itself."""

    def run_dense(self, index: int | None, name: str, x_TI: Float) -> Float:
        """One product of a layer's dense weights, or of the head for None, where they are of a layout of dense.py; waits.

        `name` is q, kv_a, o, gate, up, down, or head; `silu` is the step between: silu of the first half of each row
        times the second. For the proof: the card must give here what it computes in a step of as many tokens.
        """

    def keep_tower(self, weights: VisionWeights) -> None:
        """Upload an image tower, for good. Raises DeviceMemoryError; the tower then is not there."""

    def encode(
        self,
        weights: VisionWeights,
        canvases: Sequence[NDArray[np.uint8]],
        on_progress: Progress | None = None,
    ) -> list[Float]:
        """What `vision.encode` gives, bit for bit. A tower that is not kept passes through, part by part.

        All memory that it takes is given back. Raises DeviceMemoryError, and UsageError for a tower that the device's
        kernels do not run.
        """

    def close(self) -> None:
        """Give all memory back."""
