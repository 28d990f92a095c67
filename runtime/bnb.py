"""PyTorch and bitsandbytes: dense weights quantized, multiplied, and found in a card's memory.

The only module of the runtime that imports torch, and only `--gpu-dense` imports it (dense.py, where the formats are).
Weights are quantized on the CPU, whatever the card, and lie in memory that our own driver allocated: PyTorch works in
the same primary context, its tensors are views of our addresses, and what it does is queued on our stream. Of its own it
takes what a product needs meanwhile.

bfloat16 sums are asked to be kept in float32 to the end, as the bound of a product (dense.py) has it: a setting of the
whole process.

Dimension key:  T tokens   O, I out and in   F MLP width
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as F
import numpy as np
import torch
from torch import Tensor

from kimi_lite.errors import UsageError
from kimi_lite.runtime import dense
from kimi_lite.runtime.cuda.device import DeviceLostError, DeviceMemoryError
from kimi_lite.runtime.kernels import Float, Matrix

torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def quantized(w_OI: Float, layout: str) -> Matrix:
    """float32 [O, I] in one of dense.LAYOUTS. Raises UsageError for values that float16 does not hold, for int8."""
    O, I = w_OI.shape
    w = torch.from_numpy(w_OI)
    if layout == "bf16":
        return dense.joined(layout, O, I, {"values": w.bfloat16().view(torch.int16).numpy()})
    if layout == "int8":
        halves = w.half()
        if not bool(halves.isfinite().all()):
            raise UsageError(
                "--gpu-dense int8 rounds from float16, which ends at 65504, and a weight exceeds it; use nf4"
            )
        values, scales, _ = F.int8_vectorwise_quant(halves)
        return dense.joined(layout, O, I, {"values": values.numpy(), "scales": scales.numpy()})
    values, state = F.quantize_4bit(w, blocksize=dense.BLOCK, quant_type="nf4", compress_statistics=True)
    inner = state.state2
    parts = {
        "values": values,
        "scales": state.absmax,
        "outer": inner.absmax,
        "code": inner.code,
        "mean": state.offset,
    }
    return dense.joined(layout, O, I, {name: part.numpy() for name, part in parts.items()})


class Product:
    """x times a transposed matrix, wherever its parts lie: float32 [T, I] to float32 [T, O]."""

    def __init__(self, layout: str, rows: int, columns: int, parts: Mapping[str, Tensor]) -> None:
        self.layout, self._parts = layout, parts
        if layout == "bf16":
            self._weight = parts["values"].view(torch.bfloat16)
        elif layout == "nf4":
            device = parts["values"].device
            inner = F.QuantState(
                absmax=parts["outer"], code=parts["code"], blocksize=dense.SCALES, dtype=torch.float32
            )
            # bitsandbytes' AVX-512 code begins a block with each row. Where blocks cross rows, it is shown a single row.
            self._crossing = columns if device.type == "cpu" and columns % dense.BLOCK else 0
            self._state = F.QuantState(
                absmax=parts["scales"],
                shape=torch.Size((1, rows * columns) if self._crossing else (rows, columns)),
                code=F.get_4bit_type("nf4", device=device),
                blocksize=dense.BLOCK,
                quant_type="nf4",
                dtype=torch.bfloat16,
                offset=parts["mean"].reshape(()),
                state2=inner,
            )

    @torch.no_grad()
    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor
        values = self._parts["values"]
        if self.layout == "bf16":
            y_TO = torch.nn.functional.linear(x_TI.bfloat16(), self._weight)
            return y_TO.float()
        if self.layout == "nf4" and self._crossing:
            weight = F.dequantize_4bit(values, self._state).reshape(-1, self._crossing)
            y_TO = torch.nn.functional.linear(x_TI.bfloat16(), weight)
            return y_TO.float()
        if self.layout == "nf4":
            y_TO = bnb.matmul_4bit(x_TI.bfloat16(), values.t(), quant_state=self._state)
            return y_TO.float()
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold = values, self._parts["scales"], dense.OUTLIER
        state.has_fp16_weights = state.is_training = False
        y_TO = bnb.matmul(x_TI.half(), values, state=state)
        return y_TO.float()


@torch.no_grad()
def silu(both_TF: Tensor) -> Tensor:
    """silu(gate) · up of rows that hold both, one beside the other."""
    gate_TF, up_TF = both_TF.chunk(2, 1)
    return torch.nn.functional.silu(gate_TF) * up_TF


def on_cpu(matrix: Matrix) -> Callable[[Float], Float]:
    """A matrix's product on the CPU."""
    parts = {name: torch.from_numpy(part) for name, part in dense.arrays(matrix).items()}
    product = Product(matrix.layout, matrix.rows, matrix.columns, parts)
    return lambda x_TI: np.asarray(product(torch.from_numpy(np.ascontiguousarray(x_TI))).numpy())


def silu_on_cpu(both_TF: Float) -> Float:
    return np.asarray(silu(torch.from_numpy(both_TF)).numpy())


class _Memory:
    """Bytes on a card, as torch.as_tensor takes them."""

    def __init__(self, address: int, dtype: str, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": np.dtype(dtype).str,
            "shape": shape,
            "data": (address, False),
            "strides": None,
        }


class TorchOnCard:
    """PyTorch on a card that our driver has opened, in order with our kernels."""

    def __init__(self, ordinal: int, stream: int) -> None:
        """Card `ordinal` of those that CUDA shows, and the address of our stream.

        Raises UsageError if PyTorch or bitsandbytes cannot use the card.
        """
        if not torch.cuda.is_available():
            built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
            raise UsageError(
                f"--gpu-dense multiplies by PyTorch {torch.__version__}, which {built} and finds no card; install one "
                "for your driver (https://pytorch.org), or leave the option out for the file's own weights"
            )
        self.device = torch.device("cuda", ordinal)
        self._stream = torch.cuda.ExternalStream(stream, self.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def queued(self) -> Iterator[None]:
        """What torch does inside comes after all that was queued before.

        Raises DeviceMemoryError or DeviceLostError for what PyTorch says of the card.
        """
        try:
            with self.in_order():
                yield
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"PyTorch finds no room on the card ({_first_line(error)})") from error
        except RuntimeError as error:
            raise DeviceLostError(f"PyTorch fails on the card ({_first_line(error)})") from error

    def in_order(self) -> AbstractContextManager[Any]:
        """Work on our stream."""
        return torch.cuda.stream(self._stream)

    def tensor(self, address: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """A view of the card's memory."""
        return torch.as_tensor(_Memory(address, dtype, shape), device=self.device)

    def uploaded(self, values: Float) -> Tensor:
        """A copy of the host's values."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def product(self, matrix: Matrix, address: int) -> Product:
        """Of a matrix whose data was uploaded to `address`."""
        parts = {
            name: self.tensor(address + part.offset, part.dtype, part.shape)
            for name, part in dense.parts(matrix.layout, matrix.rows, matrix.columns).items()
        }
        return Product(matrix.layout, matrix.rows, matrix.columns, parts)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
