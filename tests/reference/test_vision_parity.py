"""The image tower against transformers' kimi_k25 tower on single frames, and its parts against formulas."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import gamma

from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.reference.vision import merge_patches, position_rows


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> KimiVL:
    return load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))[0]


@pytest.fixture(scope="module")
def theirs(ours: KimiVL) -> Any:
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

    v, tower = ours.config.vision, ours.tower
    assert v is not None
    assert tower is not None
    config = Kimi_K25VisionConfig(
        patch_size=v.patch_size,
        pos_emb_height=v.grid_height,
        pos_emb_width=v.grid_width,
        num_attention_heads=v.n_heads,
        num_hidden_layers=v.n_layers,
        hidden_size=v.hidden_size,
        intermediate_size=v.ffn_size,
    )
    model = Kimi_K25VisionModel(config).float().eval()
    names = {"patch_embed.proj": "patch", "final_layernorm": "final_norm"}
    for i in range(v.n_layers):
        names |= {f"layers.{i}.norm{j + 1}": f"blocks.{i}.norm{j}" for j in (0, 1)}
        names |= {f"layers.{i}.mlp.fc{j + 1}": f"blocks.{i}.fc{j}" for j in (0, 1)}
        names[f"layers.{i}.attn.proj"] = f"blocks.{i}.wo"
    state = tower.state_dict()
    mapped = {f"{a}.{end}": state[f"{b}.{end}"] for a, b in names.items() for end in ("weight", "bias")}
    mapped["patch_embed.proj.weight"] = mapped["patch_embed.proj.weight"].view(-1, 3, 14, 14)
    mapped["patch_embed.pos_emb.position_embeddings"] = state["positions_hwW"]
    # Theirs rotates halves: in each head of q and k the even rows come first, then the odd ones.
    W, K = v.hidden_size, v.hidden_size // v.n_heads
    regroup = torch.arange(W).view(v.n_heads, K // 2, 2).transpose(1, 2).reshape(-1)
    for i in range(v.n_layers):
        for end in ("weight", "bias"):
            q, k, value = state[f"blocks.{i}.wqkv.{end}"].chunk(3)
            mapped[f"layers.{i}.attn.q_proj.{end}"] = q[regroup]
            mapped[f"layers.{i}.attn.k_proj.{end}"] = k[regroup]
            mapped[f"layers.{i}.attn.v_proj.{end}"] = value
    model.load_state_dict(mapped, strict=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 6), (10, 22), (16, 16), (2, 2)])
def test_the_tower_agrees_with_transformers_on_single_frames(
    ours: KimiVL, theirs: Any, grid: tuple[int, int]
) -> None:
    P = grid[0] * grid[1]
    patches = torch.randn(1, P, 588, generator=torch.Generator().manual_seed(P))
    assert ours.tower is not None
    found = ours.tower(patches, grid)[0]
    expected = theirs(patches.view(P, 3, 14, 14), grid_thw=torch.tensor([[1, *grid]])).pooler_output
    # Per block about 2 x (72 + 104) / 16 + P / 16 steps of products and a softmax over P; three blocks, and the
    # position table's float32 coordinates: below 200 + P roundings of values up to the largest.
    bound = gamma(200 + P) * float(expected.abs().max()) * 4
    error = float((found - expected.reshape(found.shape)).abs().max())
    assert 0 < error < bound


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["rows and columns swapped", "antialiased table"])
def test_a_known_mistake_is_far_outside(
    monkeypatch: pytest.MonkeyPatch, ours: KimiVL, theirs: Any, mistake: str
) -> None:
    from kimi_lite.runtime.reference import vision

    if mistake == "antialiased table":
        resize = torch.nn.functional.interpolate
        monkeypatch.setattr(
            torch.nn.functional,
            "interpolate",
            lambda x, size, mode: resize(x, size=size, mode=mode, antialias=True),
        )
    original = vision.patch_angles
    if mistake == "rows and columns swapped":

        def swapped(grid: tuple[int, int], config: Any) -> torch.Tensor:
            angles = original((grid[1], grid[0]), config)
            return angles.view(2, grid[1], grid[0], -1).transpose(1, 2).reshape(2, grid[0] * grid[1], -1)

        monkeypatch.setattr(vision, "patch_angles", swapped)
    patches = torch.randn(1, 24, 588, generator=torch.Generator().manual_seed(24))
    assert ours.tower is not None
    found = ours.tower(patches, (4, 6))[0]
    monkeypatch.undo()
    expected = theirs(patches.view(24, 3, 14, 14), grid_thw=torch.tensor([[1, 4, 6]])).pooler_output
    assert float((found - expected.reshape(found.shape)).abs().max()) > 0.05


@pytest.mark.parametrize("grid", [(1, 1), (10, 10), (16, 16), (4, 6), (10, 34)])
def test_position_rows_follow_the_bicubic_formula(grid: tuple[int, int]) -> None:
    table = np.random.default_rng(0).standard_normal((16, 16, 3))

    def axis(n_out: int) -> Any:
        weights = np.zeros((n_out, 16))
        a = -0.75
        for i in range(n_out):
            source = (i + 0.5) * 16 / n_out - 0.5
            low = math.floor(source)
            for tap in range(low - 1, low + 3):
                t = abs(source - tap)
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                weights[i, min(max(tap, 0), 15)] += near if t <= 1 else far if t < 2 else 0
        return weights

    expected = np.einsum("ih,jw,hwc->ijc", axis(grid[0]), axis(grid[1]), table).reshape(-1, 3)
    found = position_rows(torch.from_numpy(table).float(), grid).numpy()
    # torch computes source coordinates in float32: up to 34 · 2^-24 off, times the kernel's slope (below 2), twice.
    assert np.abs(found - expected).max() < 4 * 34 * gamma(8) * np.abs(table).max()


def test_the_merge_takes_top_left_top_right_bottom_left_bottom_right() -> None:
    x = torch.arange(4 * 6).view(1, 24, 1)
    merged = merge_patches(x, (4, 6))[0, :, :, 0]
    assert merged[0].tolist() == [0, 1, 6, 7]
    assert merged[1].tolist() == [2, 3, 8, 9]
    assert merged[3].tolist() == [12, 13, 18, 19]


@torch.no_grad()
def test_the_projector_norms_each_patch_and_uses_the_exact_gelu(ours: KimiVL) -> None:
    x = torch.randn(5, 4, 72, generator=torch.Generator().manual_seed(3))
    found = ours.projector(x).numpy()
    p = {n: t.detach().double().numpy() for n, t in ours.projector.named_parameters()}
    z = x.double().numpy()
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    z = (z * p["pre_norm.weight"] + p["pre_norm.bias"]).reshape(5, -1)
    z = z @ p["linear_1.weight"].T + p["linear_1.bias"]
    z = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    expected = z @ p["linear_2.weight"].T + p["linear_2.bias"]
    assert np.abs(found - expected).max() < gamma(600) * np.abs(expected).max() * 4


@torch.no_grad()
def test_a_picture_is_not_changed_by_its_neighbours(ours: KimiVL, tmp_path: Path) -> None:
    a, b = torch.randn(2, 1, 24, 588, generator=torch.Generator().manual_seed(4))
    alone, pair = ours.encode_images(a, (4, 6)), ours.encode_images(torch.cat([a, b]), (4, 6))
    assert float((alone[0] - pair[0]).abs().max()) < gamma(600) * float(alone.abs().max()) * 4
