"""MoonViT, the 2×2 merge and the projector in plain PyTorch.

Pictures of different sizes never see each other: the tower takes a batch of pictures of one size, and the caller
loops over sizes. Written from the formulas of the published model; three details that ports get wrong are marked.

Dimension key:  B pictures   h, w grid rows and columns   P = h·w patches   W tower width   H heads   K = W / H
"""

import torch
import torch.nn.functional as F_
from torch import Tensor, nn

from kimi_lite.formats.config import VisionConfig

LN_EPS = 1e-5
ROPE_THETA = 10000.0


class VisionTower(nn.Module):
    """Patches [B, P, 3·14·14] of a grid (h, w) to merged rows [B, P/4, 4, W]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.positions_hwW = nn.Parameter(
            torch.empty(config.grid_height, config.grid_width, config.hidden_size)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=LN_EPS)

    def forward(self, patches_BPX: Tensor, grid: tuple[int, int]) -> Tensor:
        x_BPW = self.patch(patches_BPX) + position_rows(self.positions_hwW, grid)
        angles = patch_angles(grid, self.config)
        for block in self.blocks:
            x_BPW = block(x_BPW, angles)
        return merge_patches(self.final_norm(x_BPW), grid)


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        W, self.n_heads = config.hidden_size, config.n_heads
        self.norm0, self.norm1 = nn.LayerNorm(W, eps=LN_EPS), nn.LayerNorm(W, eps=LN_EPS)
        self.wqkv, self.wo = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.fc0, self.fc1 = nn.Linear(W, config.ffn_size), nn.Linear(config.ffn_size, W)

    def forward(self, x_BPW: Tensor, angles: Tensor) -> Tensor:
        B, P, W = x_BPW.shape
        # Rows of wqkv: all q, all k, all v; inside each, head by head.
        qkv = self.wqkv(self.norm0(x_BPW)).view(B, P, 3, self.n_heads, W // self.n_heads)
        q_BHPK, k_BHPK, v_BHPK = qkv.permute(2, 0, 3, 1, 4)
        q_BHPK, k_BHPK = (turn(t, angles).to(v_BHPK.dtype) for t in (q_BHPK, k_BHPK))
        o_BHPK = F_.scaled_dot_product_attention(q_BHPK, k_BHPK, v_BHPK)  # all to all; scale 1/sqrt(K)
        x_BPW = x_BPW + self.wo(o_BHPK.transpose(1, 2).reshape(B, P, W))
        return x_BPW + self.fc1(F_.gelu(self.fc0(self.norm1(x_BPW)), approximate="tanh"))  # type: ignore[no-any-return]


class Projector(nn.Module):
    """Merged rows [..., 4, W] to text embeddings [..., D]."""

    def __init__(self, config: VisionConfig, text_width: int) -> None:
        super().__init__()
        joined = config.hidden_size * config.merge**2
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=LN_EPS)  # over each patch, before joining
        self.linear_1, self.linear_2 = nn.Linear(joined, joined), nn.Linear(joined, text_width)

    def forward(self, merged_M4W: Tensor) -> Tensor:
        joined = self.pre_norm(merged_M4W).flatten(-2)
        # The exact GELU here, the tanh form in the tower.
        return self.linear_2(F_.gelu(self.linear_1(joined)))  # type: ignore[no-any-return]


def position_rows(table_hwW: Tensor, grid: tuple[int, int]) -> Tensor:
    """The learned table resized to the grid, [P, W]: bicubic, a = -0.75, no antialiasing even when shrinking."""
    if tuple(table_hwW.shape[:2]) != grid:
        table = table_hwW.float().permute(2, 0, 1)[None]
        table_hwW = F_.interpolate(table, size=grid, mode="bicubic")[0].permute(1, 2, 0)
    return table_hwW.flatten(0, 1)


def patch_angles(grid: tuple[int, int], config: VisionConfig) -> Tensor:
    """cos and sin [2, P, K/2]: even pairs turn with the column, odd pairs with the row."""
    h, w = grid
    K = config.hidden_size // config.n_heads
    frequency = ROPE_THETA ** (-torch.arange(0, K, 4, dtype=torch.float64) / K)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    by_column = columns.flatten()[:, None] * frequency
    by_row = rows.flatten()[:, None] * frequency
    angles = torch.stack([by_column, by_row], -1).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def turn(x_PK: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x[2j], x[2j+1]); x is [..., P, K], the result float32."""
    even, odd = x_PK.float().reshape(*x_PK.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def merge_patches(x_BPW: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h·w, W] to [B, h·w/4, 4, W]: top left, top right, bottom left, bottom right; tokens in raster order."""
    h, w = grid
    B, _, W = x_BPW.shape
    return x_BPW.view(B, h // 2, 2, w // 2, 2, W).transpose(2, 3).reshape(B, h * w // 4, 4, W)
