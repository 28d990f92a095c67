"""kimi-vl-nano in the head sizes of the published models, for a runtime that takes no others.

ik_llama.cpp runs this architecture only with 27 layers, 16 heads of 128 + 64 and a latent of 512. Widening with zeros
changes nothing that nano computes: new channels, heads and layers add exact zeros. Four things need care:

- A score is divided by sqrt(N + R), which grows: queries are multiplied by the ratio (and rounded to bf16 again).
- The latent's norm takes a mean over more channels: its weight gets sqrt(C / new C), here exactly a half.
- Pair i of the rotated channels turns with theta^(-2i/R): in twice the width the same angle belongs to pair 2i.
- The new layers come first, as dense ones whose outputs are zero.

Dimension key:  H heads   N/R/C no-rope, rope, latent   V value width   D hidden
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.train import export

NEW_LAYERS = 23


def write_wide_nano(nano: Path, directory: Path) -> Path:
    """Write the widened checkpoint of `nano`, a checkpoint directory, and return where it is."""
    model, _ = load(nano)
    old = model.config.text
    new = replace(
        old,
        n_layers=NEW_LAYERS + old.n_layers,
        n_dense_layers=NEW_LAYERS + old.n_dense_layers,
        n_heads=16,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
    )
    with torch.no_grad():
        export(widened(model, new), directory, shard_bytes=1 << 30)
    return directory


def widened(model: KimiVL, new: TextConfig) -> KimiVL:
    old = model.config.text
    wide = KimiVL(replace(model.config, text=new))
    theirs = dict(model.state_dict())
    for name, value in wide.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["text", "layers"]:
            layer = int(parts[2]) - NEW_LAYERS
            if layer < 0:
                value.fill_(1.0 if "norm" in name else 0.0)
                continue
            parts[2] = str(layer)
        source = theirs[".".join(parts)]
        if parts[-3:-1] == ["attention", "q"]:
            ratio = ((new.nope_dim + new.rope_dim) / (old.nope_dim + old.rope_dim)) ** 0.5
            q_HKD = by_head(source * ratio, old.n_heads)  # K = N + R
            value.zero_()
            target_HKD = by_head(value, new.n_heads)
            target_HKD[: old.n_heads, : old.nope_dim] = q_HKD[:, : old.nope_dim]
            target_HKD[: old.n_heads, new.nope_dim :] = spread(q_HKD[:, old.nope_dim :], new.rope_dim)
        elif parts[-3:-1] == ["attention", "kv_a"]:
            value.zero_()
            value[: old.kv_rank] = source[: old.kv_rank]
            value[new.kv_rank :] = spread(source[old.kv_rank :][None], new.rope_dim)[0]
        elif parts[-3:-1] == ["attention", "kv_norm"]:
            value.zero_()
            value[: old.kv_rank] = source * (old.kv_rank / new.kv_rank) ** 0.5
        elif parts[-3:-1] == ["attention", "kv_b"]:
            value.zero_()
            target_HXC, source_HXC = by_head(value, new.n_heads), by_head(source, old.n_heads)  # X = N + V
            target_HXC[: old.n_heads, : old.nope_dim, : old.kv_rank] = source_HXC[:, : old.nope_dim]
            values_HVC = target_HXC[: old.n_heads, new.nope_dim :]
            values_HVC[:, : old.value_dim, : old.kv_rank] = source_HXC[:, old.nope_dim :]
        elif parts[-3:-1] == ["attention", "o"]:
            value.zero_()
            target_DHV = value.view(len(value), new.n_heads, new.value_dim)
            target_DHV[:, : old.n_heads, : old.value_dim] = source.view(len(source), old.n_heads, -1)
        else:
            value.copy_(source)
    return wide


def by_head(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a matrix, head by head: a view [heads, rows of a head, columns]."""
    return weight.view(n_heads, len(weight) // n_heads, -1)


def spread(rotated_HRD: Tensor, width: int) -> Tensor:
    """Rotated rows in a wider head, each pair where its angle is."""
    H, R, D = rotated_HRD.shape
    out = rotated_HRD.new_zeros(H, R // 2, width // R, 2, D)
    out[:, :, 0] = rotated_HRD.view(H, R // 2, 2, D)
    return out.view(H, width, D)
