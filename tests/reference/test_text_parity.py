"""The reference text model against transformers' DeepSeek-V3 on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import gamma
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kimi_lite.formats.config import TextConfig
from kimi_lite.runtime.reference import text
from kimi_lite.runtime.reference.model import KimiVL, expert_loads, load, published_tensors
from kimi_lite.runtime.reference.random_checkpoint import write_checkpoint
from kimi_lite.runtime.reference.text import Cache

T = 40
# Longest chain of float32 roundings in one layer: products over 256, 128, 384 and 512 channels in blocks of 16 lanes
# (about 16 + 8 + 24 + 32 steps and 4 tree levels each), two norms and a softmax of 40: about 200. Three layers and the
# head: 700, times the largest logit. Attention and experts mix with weights that sum to at most 2.446 + 1.
ROUNDINGS = 700 * 4


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> KimiVL:
    torch.manual_seed(0)
    model, _ = load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    with torch.no_grad():  # a bias that matters: some experts chosen because of it, some left out
        for layer in model.text.layers:
            if isinstance(layer.ffn, text.MoE):
                layer.ffn.router_bias.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def theirs(ours: KimiVL) -> Any:
    c = ours.config.text
    config = DeepseekV3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_heads,
        q_lora_rank=None,
        kv_lora_rank=c.kv_rank,
        qk_nope_head_dim=c.nope_dim,
        qk_rope_head_dim=c.rope_dim,
        v_head_dim=c.value_dim,
        intermediate_size=c.dense_hidden_size,
        moe_intermediate_size=c.expert_hidden_size,
        n_routed_experts=c.n_experts,
        num_experts_per_tok=c.n_active,
        n_shared_experts=c.n_shared,
        first_k_dense_replace=c.n_dense_layers,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=c.routed_scale,
        rms_norm_eps=c.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.context_length,
        attn_implementation="eager",
    )
    model = DeepseekV3ForCausalLM(config).float().eval()
    prefix = "language_model."
    state = {n.removeprefix(prefix): t for n, t in published_tensors(ours) if n.startswith(prefix)}
    for layer in range(c.n_dense_layers, c.n_layers):
        at = f"model.layers.{layer}.mlp.experts."
        parts = [
            [state.pop(f"{at}{e}.{p}_proj.weight") for e in range(c.n_experts)]
            for p in ("gate", "up", "down")
        ]
        state[f"{at}gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)]
        )
        state[f"{at}down_proj"] = torch.stack(parts[2])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 512, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(ours: KimiVL, theirs: Any, ids: Tensor) -> tuple[float, float]:
    expected = theirs(ids).logits
    return float((ours(ids) - expected).abs().max()), gamma(ROUNDINGS) * float(expected.abs().max())


def test_logits_agree_with_transformers(ours: KimiVL, theirs: Any, ids: Tensor) -> None:
    found, bound = difference(ours, theirs, ids)
    assert 0 < found < bound  # not one model compared with itself


@torch.no_grad()
def test_router_choices_are_identical(
    monkeypatch: pytest.MonkeyPatch, ours: KimiVL, theirs: Any, ids: Tensor
) -> None:
    chosen: list[Tensor] = []
    routed: list[Tensor] = []
    for layer in theirs.model.layers[1:]:
        layer.mlp.experts.register_forward_hook(lambda _m, args, _o: chosen.append(args[1]))

    def spy(moe: text.MoE, x: Tensor) -> tuple[Tensor, Tensor]:
        result = ROUTE(moe, x)
        routed.append(result[0])
        return result

    monkeypatch.setattr(text.MoE, "route", spy)
    theirs(ids)
    ours(ids)
    assert len(chosen) == len(routed) == 2
    for a, b in zip(chosen, routed, strict=True):
        assert torch.equal(a.sort(-1).values, b.sort(-1).values)
    assert all(int((load > 0).sum()) > 3 for _, load in expert_loads(ours))


@torch.no_grad()
def test_token_by_token_with_the_cache_equals_all_at_once(ours: KimiVL, ids: Tensor) -> None:
    whole, cache = ours(ids), Cache()
    parts = [ours.text(ours.embed(ids[:, :17]), cache)]
    parts += [ours.text(ours.embed(ids[:, t : t + 1]), cache) for t in range(17, T)]
    assert cache.n_positions == T
    assert float((torch.cat(parts, 1) - whole).abs().max()) < gamma(ROUNDINGS) * float(whole.abs().max())


def half_rotation(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    cos, sin = angles
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def biased_weights(moe: text.MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(x_TD.float() @ moe.router.T) + moe.router_bias
    weights, ids = scores.topk(moe.config.n_active, -1)
    return ids, weights / weights.sum(-1, keepdim=True) * moe.config.routed_scale


def unscaled_weights(moe: text.MoE, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    ids, weights = ROUTE(moe, x_TD)
    return ids, weights / moe.config.routed_scale


ROUTE = text.MoE.route


@pytest.mark.parametrize(
    ("where", "name", "mistake"),
    [
        (text, "rotate", half_rotation),
        (text.MoE, "route", biased_weights),
        (text.MoE, "route", unscaled_weights),
        (TextConfig, "softmax_scale", property(lambda c: c.nope_dim**-0.5)),
        (TextConfig, "softmax_scale", property(lambda c: (c.kv_rank + c.rope_dim) ** -0.5)),
    ],
    ids=["rotating halves", "bias in the weights", "no 2.446", "scale of N alone", "scale of C + R"],
)
def test_a_known_mistake_exceeds_the_bound(
    monkeypatch: pytest.MonkeyPatch,
    ours: KimiVL,
    theirs: Any,
    ids: Tensor,
    where: Any,
    name: str,
    mistake: Any,
) -> None:
    monkeypatch.setattr(where, name, mistake)
    found, bound = difference(ours, theirs, ids)
    assert found > 10 * bound


def test_the_head_widths_all_differ(ours: KimiVL) -> None:
    c = ours.config.text
    assert len({c.nope_dim, c.rope_dim, c.value_dim, c.kv_rank}) == 4


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    import json

    from kimi_lite.errors import ModelFileError

    directory = write_checkpoint(tmp_path)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    removed = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    del content["weight_map"][removed]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=removed.replace(".", r"\.")):
        load(directory)
