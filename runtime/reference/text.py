"""The text model in plain PyTorch: latent attention in its expanded form and a sigmoid-routed mixture of experts.

Written from the formulas of the published model (DeepSeek-V3 as Moonlight and Kimi-VL use it), big to small:
TextModel, Layer, Attention, MoE. It is the oracle for the fast runtime and the model that the trainer trains, so it
takes a batch, and evaluates all experts densely with weight 0 for those not chosen: the same result, three large
products instead of many small ones.

Dimension key:  B batch   T tokens   S cached + new positions   D hidden   V vocabulary (and value width beside H)
H heads   N/R/C no-rope, rope, latent   E routed experts   A active   F expert width
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F_
from torch import Tensor, nn

from kimi_lite.formats.config import TextConfig


@dataclass
class Cache:
    """Per layer, the normalised latent [B, S, C] and the rotated key [B, S, R] of every position so far."""

    latent_BSC: list[Tensor] = field(default_factory=list)
    key_BSR: list[Tensor] = field(default_factory=list)

    @property
    def n_positions(self) -> int:
        return self.latent_BSC[0].shape[1] if self.latent_BSC else 0

    def extend(self, layer: int, latent_BTC: Tensor, key_BTR: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.latent_BSC):
            self.latent_BSC.append(latent_BTC)
            self.key_BSR.append(key_BTR)
        else:
            self.latent_BSC[layer] = torch.cat([self.latent_BSC[layer], latent_BTC], 1)
            self.key_BSR[layer] = torch.cat([self.key_BSR[layer], key_BTR], 1)
        return self.latent_BSC[layer], self.key_BSR[layer]


class TextModel(nn.Module):
    """Token embeddings or ids in, logits out."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x_BTD: Tensor, cache: Cache | None = None, last: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], or with `last`, a boolean [B, T], those of the selected positions only."""
        start = cache.n_positions if cache else 0
        angles_TR = rope_angles(start, x_BTD.shape[1], self.config, x_BTD.device)
        for layer in self.layers:
            x_BTD = layer(x_BTD, angles_TR, cache)
        if last is not None:
            x_BTD = x_BTD[last]
        return F_.linear(self.norm(x_BTD), self.head)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.attention = Attention(config, index)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.ffn: nn.Module = (
            SwiGLU(config.hidden_size, config.dense_hidden_size)
            if index < config.n_dense_layers
            else MoE(config)
        )

    def forward(self, x_BTD: Tensor, angles_TR: Tensor, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attn_norm(x_BTD), angles_TR, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head latent attention, expanded: keys and values are rebuilt from the latent for every head."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        c, self.index, self.config = config, index, config
        self.q = Linear(c.n_heads * (c.nope_dim + c.rope_dim), c.hidden_size)
        self.kv_a = Linear(c.kv_rank + c.rope_dim, c.hidden_size)
        self.kv_norm = RMSNorm(c.kv_rank, c.kv_norm_eps)
        self.kv_b = Linear(c.n_heads * (c.nope_dim + c.value_dim), c.kv_rank)
        self.o = Linear(c.hidden_size, c.n_heads * c.value_dim)

    def forward(self, x_BTD: Tensor, angles_TR: Tensor, cache: Cache | None) -> Tensor:
        c, (B, T, _) = self.config, x_BTD.shape
        q_BHTK = self.q(x_BTD).view(B, T, c.n_heads, -1).transpose(1, 2)  # K = N + R
        q_BHTN, qr_BHTR = q_BHTK.split([c.nope_dim, c.rope_dim], -1)
        latent_BTC, kr_BTR = self.kv_a(x_BTD).split([c.kv_rank, c.rope_dim], -1)
        latent_BSC, kr_BSR = self.kv_norm(latent_BTC), rotate(kr_BTR, angles_TR)
        if cache is not None:
            latent_BSC, kr_BSR = cache.extend(self.index, latent_BSC, kr_BSR)
        S = latent_BSC.shape[1]
        kv_BHSX = self.kv_b(latent_BSC).view(B, S, c.n_heads, -1).transpose(1, 2)
        k_BHSN, v_BHSV = kv_BHSX.split([c.nope_dim, c.value_dim], -1)
        k_BHSK = torch.cat([k_BHSN, kr_BSR[:, None].expand(B, c.n_heads, S, -1).to(k_BHSN.dtype)], -1)
        q_BHTK = torch.cat([q_BHTN, rotate(qr_BHTR, angles_TR).to(q_BHTN.dtype)], -1)
        # Query t stands at position S - T + t and sees all up to itself.
        if T == S:
            o_BHTV = F_.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BHSV, is_causal=True, scale=c.softmax_scale
            )
        else:
            seen_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
            o_BHTV = F_.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, seen_TS, scale=c.softmax_scale)
        return self.o(o_BHTV.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MoE(nn.Module):
    """Routed experts, chosen by biased sigmoid scores and weighted by the unbiased ones, beside a shared MLP."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c, self.config = config, config
        self.router = nn.Parameter(torch.empty(c.n_experts, c.hidden_size))
        self.router_bias: Tensor
        self.register_buffer("router_bias", torch.zeros(c.n_experts))
        self.gate = nn.Parameter(torch.empty(c.n_experts * c.expert_hidden_size, c.hidden_size))
        self.up = nn.Parameter(torch.empty(c.n_experts * c.expert_hidden_size, c.hidden_size))
        # Transposed and stacked, so that the sum over experts is part of one product.
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.n_experts * c.expert_hidden_size))
        self.shared = SwiGLU(c.hidden_size, c.n_shared * c.expert_hidden_size)
        self.load_E: Tensor | None = None  # tokens per expert in the last call; the trainer balances on it

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, A] and their weights [T, A], which sum to routed_scale. Float32 throughout."""
        with torch.autocast("cpu", enabled=False):
            scores_TE = torch.sigmoid(F_.linear(x_TD.float(), self.router))
        # The bias decides who is chosen, never how much they count. Stable, so that ties go to the lower index.
        ids_TA = (
            (scores_TE + self.router_bias)
            .sort(dim=-1, descending=True, stable=True)
            .indices[:, : self.config.n_active]
        )
        weights_TA = scores_TE.gather(-1, ids_TA)
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
        return ids_TA, weights_TA * self.config.routed_scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        c, x_TD = self.config, x_BTD.reshape(-1, x_BTD.shape[-1])
        ids_TA, weights_TA = self.route(x_TD)
        weights_TE = torch.zeros(len(x_TD), c.n_experts).scatter(-1, ids_TA, weights_TA)
        self.load_E = torch.bincount(ids_TA.flatten(), minlength=c.n_experts)
        hidden_TX = F_.silu(F_.linear(x_TD, self.gate)) * F_.linear(x_TD, self.up)  # X = E * F
        hidden_TEF = hidden_TX.view(-1, c.n_experts, c.expert_hidden_size) * weights_TE[:, :, None].to(
            hidden_TX.dtype
        )
        routed_TD = F_.linear(hidden_TEF.flatten(1), self.down)
        return (routed_TD + self.shared(x_TD)).view_as(x_BTD)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden_size)
        self.up = Linear(width, hidden_size)
        self.down = Linear(hidden_size, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F_.silu(self.gate(x_TD)) * self.up(x_TD))  # type: ignore[no-any-return]


class Linear(nn.Module):
    """A product with a weight [out, in], without bias: the text model has none."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x_TI: Tensor) -> Tensor:
        return F_.linear(x_TI, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · w, statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F_.rms_norm(x_TD.float(), self.weight.shape, self.weight, self.eps)


def rope_angles(start: int, T: int, config: TextConfig, device: torch.device) -> Tensor:
    """cos and sin side by side, float32 [2, T, R/2]; the angles themselves in float64, exact at any position."""
    i = torch.arange(0, config.rope_dim, 2, dtype=torch.float64)
    positions_T = torch.arange(start, start + T, dtype=torch.float64)
    angles = positions_T[:, None] * config.rope_theta ** (-i / config.rope_dim)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def rotate(x_TR: Tensor, angles_TR: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) by position · theta^(-2i/R); x is [..., T, R], the result float32."""
    even, odd = x_TR.float().reshape(*x_TR.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles_TR
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
