"""compressed-tensors: checkpoints whose matrices are rounded to few bits already, the form that vLLM and SGLang run.

Of its formats this is `pack-quantized`, which Kimi-K2-Thinking is published in. In place of X.weight [O, I] there are

    X.weight_packed   int32 [O, I · b / 32]   q + 2^(b - 1) of b bits each, the first channel lowest; q from -2^(b-1) up
    X.weight_scale    [O, G]                  w = scale · q; G groups of I / G channels, or one for a whole row
    X.weight_shape    [2]                     O, I

and config.json names the format under `quantization_config`. 4 and 8 bits are read, symmetric, in groups of a multiple
of 32 channels; 4 bits in groups of 32 are written. Four such bits are the packed layout q4g32 and ggml's Q4_0, weight for weight.

Source: the `compressed-tensors` package, which the tests compare with.

Dimension key:  O out_features   I in_features   G groups of a row   g groups of 32
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import ModelFileError
from kimi_lite.formats.packed import GROUP
from kimi_lite.formats.safetensors_file import FLOATS, ShardSpec, StoredTensor

PARTS = ("weight_packed", "weight_scale", "weight_shape")
UNREAD = ("weight_zero_point", "weight_g_idx")  # asymmetric rounding, and columns in an order of their own


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint in another quantized form than the one that is read here.

    Raises:
        ModelFileError: `quantization_config` names another method or format.
    """
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        found = holder.get("quantization_config")
        if found is None:
            continue
        method, form = (found.get(k) if isinstance(found, dict) else None for k in ("quant_method", "format"))
        if (method, form) != ("compressed-tensors", "pack-quantized"):
            raise ModelFileError(
                f"{where}: the checkpoint is quantized as {method!r} in the format {form!r}; expected the published weights "
                "in bf16, or 'compressed-tensors' in the format 'pack-quantized'"
            )


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """What config.json says of a checkpoint that is written here; `ignore` names the linear layers left as they were."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix of such a checkpoint, read like a StoredTensor."""

    packed: StoredTensor
    scale: StoredTensor
    bits: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, int]) -> "QuantizedTensor":
        """The parts that stand for the matrix `name`, of this shape.

        Raises:
            ModelFileError: a part is missing, or they are of no form that is read here.
        """
        stem = name.removesuffix("weight")
        for part in UNREAD:
            if f"{stem}{part}" in tensors:
                raise ModelFileError(
                    f"{tensors[stem + part].path}: {stem}{part} belongs to a form of compressed-tensors that is not read; expected "
                    "symmetric rounding with columns in order"
                )
        for part in PARTS[:2]:
            if f"{stem}{part}" not in tensors:
                raise ModelFileError(f"{name}: {stem}{part} is missing; the checkpoint is incomplete")
        packed, scale = (tensors[stem + part] for part in PARTS[:2])
        O, I = shape
        widths: dict[tuple[int, ...], int] = {(O, I // 8): 4, (O, I // 4): 8}
        bits = widths.get(packed.shape)
        if bits is None or packed.dtype != "I32" or I % GROUP:
            raise ModelFileError(
                f"{packed.path}: {packed.name} is {packed.dtype} {list(packed.shape)}; expected I32 {[O, I // 8]} (4 bits) or "
                f"{[O, I // 4]} (8 bits) for a matrix of {list(shape)}"
            )
        whole = scale.dtype in FLOATS and len(scale.shape) == 2 and scale.shape[0] == O and scale.shape[1] > 0
        if not whole or I % scale.shape[1] or I // scale.shape[1] % GROUP:
            raise ModelFileError(
                f"{scale.path}: {scale.name} is {scale.dtype} {list(scale.shape)}; expected a float for every 32 channels of "
                f"{list(shape)}, or for a multiple of 32"
            )
        return cls(packed, scale, bits, shape)

    def quantized(self, start: int, n: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Rows start…start+n-1: q int8 [n, I], and scales float32 [n, g], one for every 32 channels."""
        words = self.packed.raw(start, n)
        if self.bits == 4:
            both = words.view(np.uint8)
            q_nI = np.stack([both & 15, both >> 4], axis=-1).reshape(n, self.shape[1]).view(
                np.int8
            ) - np.int8(8)
        else:
            q_nI = (words.view(np.uint8) ^ 128).view(np.int8)
        scale_nG = self.scale.rows(start, n)
        if not np.isfinite(scale_nG).all():
            raise ModelFileError(
                f"{self.scale.name}: a scale is not a finite number; the checkpoint is damaged"
            )
        return q_nI, np.repeat(scale_nG, self.shape[1] // GROUP // scale_nG.shape[1], axis=1)

    def rows(self, start: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Rows start…start+n-1 of the weights, float32 [n, I]."""
        q_nI, scale_ng = self.quantized(start, self.shape[0] - start if n is None else n)
        return q_nI.astype(np.float32) * np.repeat(scale_ng, GROUP, axis=1)


def written(name: str, O: int, I: int) -> list[ShardSpec]:
    """The parts that stand for the matrix `name` in 4 bits, as `parts` gives them."""
    stem, shapes = name.removesuffix("weight"), ((O, I // 8), (O, I // GROUP), (2,))
    return [ShardSpec(stem + p, d, s) for p, d, s in zip(PARTS, ("I32", "BF16", "I64"), shapes, strict=True)]


def parts(
    name: str, q_OI: NDArray[np.int8], scale_Og: NDArray[np.float16]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The parts of a matrix: w = scale · (q - 8), q in 0…15, scales of few enough bits for bf16."""
    stem, u_OI = name.removesuffix("weight"), q_OI.view(np.uint8)
    yield f"{stem}weight_packed", (u_OI[:, 0::2] | u_OI[:, 1::2] << 4).view("<i4")
    bits = np.ascontiguousarray(scale_Og.astype(np.float32)).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "scales that bf16 does not hold"
    yield f"{stem}weight_scale", (bits >> 16).astype(np.uint16)
    yield f"{stem}weight_shape", np.array(q_OI.shape, np.int64)
