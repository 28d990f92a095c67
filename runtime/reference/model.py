"""The whole model: text, image tower, projector; loads and saves a published checkpoint directory.

Names are mapped one by one in `published_names`, so a missing tensor, a wrong shape or an unused one is found and
said. Experts are stacked in memory and split in the file.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.config import ModelConfig, TextConfig
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime.reference.text import Cache, MoE, TextModel
from kimi_lite.runtime.reference.vision import Projector, VisionTower
from kimi_lite.runtime.tokenizer import Tokenizer

IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # recomputed


class KimiVL(nn.Module):
    """Float32, any batch. Pictures of one call share one grid; `images_BPX` follow the pads in reading order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextModel(config.text)
        if config.vision:
            self.tower: VisionTower | None = VisionTower(config.vision)
            self.projector = Projector(config.vision, config.text.hidden_size)
        else:
            self.tower = None

    def encode_images(self, images_BPX: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedding rows [B, tokens, D] of pictures of one size."""
        if self.tower is None:
            raise UsageError("this checkpoint has no image tower; it answers text only")
        return self.projector(self.tower(images_BPX, grid))  # type: ignore[no-any-return]

    def embed(self, ids_BT: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Token embeddings with the pictures' rows put in place of the pads, in order."""
        x_BTD = nn.functional.embedding(ids_BT, self.text.embed)
        if image_rows is not None:
            pads_BT = torch.eq(ids_BT, self.config.media_pad_id or -1)
            rows_MD = image_rows.reshape(-1, image_rows.shape[-1])
            if int(pads_BT.sum()) != len(rows_MD):
                raise UsageError(
                    f"the prompt has {int(pads_BT.sum())} image places for {len(rows_MD)} image tokens"
                )
            x_BTD = x_BTD.masked_scatter(pads_BT[..., None], rows_MD.to(x_BTD.dtype))
        return x_BTD

    def forward(self, ids_BT: Tensor, image_rows: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        return self.text(self.embed(ids_BT, image_rows), last=last)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def generate(
        self, ids_BT: Tensor, stop_ids: frozenset[int], max_tokens: int, image_rows: Tensor | None = None
    ) -> list[list[int]]:
        """Greedy answers for a batch of prompts of one length; stop tokens are left out."""
        cache, stops = Cache(), torch.tensor(sorted(stop_ids))
        x_BTD = self.embed(ids_BT, image_rows)
        answers: list[list[int]] = [[] for _ in ids_BT]
        done_B = torch.zeros(len(ids_BT), dtype=torch.bool)
        for _ in range(max_tokens):
            ids_B = self.text(x_BTD, cache)[:, -1].float().argmax(-1)
            done_B |= torch.isin(ids_B, stops)
            if bool(done_B.all()):
                break
            for answer, token, done in zip(answers, ids_B.tolist(), done_B.tolist(), strict=True):
                if not done:
                    answer.append(token)
            x_BTD = self.embed(ids_B[:, None])
        return answers


def published_names(config: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """(published name, our parameter's name, index of the expert in a stacked parameter or None)."""
    p = config.text_prefix
    yield f"{p}model.embed_tokens.weight", "text.embed", None
    for layer in range(config.text.n_layers):
        theirs, ours = f"{p}model.layers.{layer}.", f"text.layers.{layer}."
        yield f"{theirs}input_layernorm.weight", f"{ours}attn_norm.weight", None
        yield f"{theirs}self_attn.q_proj.weight", f"{ours}attention.q.weight", None
        yield f"{theirs}self_attn.kv_a_proj_with_mqa.weight", f"{ours}attention.kv_a.weight", None
        yield f"{theirs}self_attn.kv_a_layernorm.weight", f"{ours}attention.kv_norm.weight", None
        yield f"{theirs}self_attn.kv_b_proj.weight", f"{ours}attention.kv_b.weight", None
        yield f"{theirs}self_attn.o_proj.weight", f"{ours}attention.o.weight", None
        yield f"{theirs}post_attention_layernorm.weight", f"{ours}ffn_norm.weight", None
        moe = layer >= config.text.n_dense_layers
        if moe:
            yield f"{theirs}mlp.gate.weight", f"{ours}ffn.router", None
            yield f"{theirs}mlp.gate.e_score_correction_bias", f"{ours}ffn.router_bias", None
        for part in ("gate", "up", "down"):
            if not moe:
                yield f"{theirs}mlp.{part}_proj.weight", f"{ours}ffn.{part}.weight", None
                continue
            yield f"{theirs}mlp.shared_experts.{part}_proj.weight", f"{ours}ffn.shared.{part}.weight", None
            for expert in range(config.text.n_experts):
                yield f"{theirs}mlp.experts.{expert}.{part}_proj.weight", f"{ours}ffn.{part}", expert
    yield f"{p}model.norm.weight", "text.norm.weight", None
    yield f"{p}lm_head.weight", "text.head", None
    if config.vision is None:
        return
    yield "vision_tower.patch_embed.pos_emb.weight", "tower.positions_hwW", None
    pairs = [("vision_tower.patch_embed.proj", "tower.patch")]
    for block in range(config.vision.n_layers):
        theirs, ours = f"vision_tower.encoder.blocks.{block}.", f"tower.blocks.{block}."
        pairs += [(f"{theirs}{name}", f"{ours}{name}") for name in ("norm0", "norm1", "wqkv", "wo")]
        pairs += [(f"{theirs}mlp.{name}", f"{ours}{name}") for name in ("fc0", "fc1")]
    pairs.append(("vision_tower.encoder.final_layernorm", "tower.final_norm"))
    pairs += [(f"multi_modal_projector.{n}", f"projector.{n}") for n in ("pre_norm", "linear_1", "linear_2")]
    for theirs, ours in pairs:
        for end in ("weight", "bias"):
            yield f"{theirs}.{end}", f"{ours}.{end}", None


def _slot(parameter: Tensor, ours: str, expert: int | None, text: TextConfig) -> Tensor:
    """The part of a parameter that one published tensor fills."""
    if expert is None:
        return parameter.flatten(1) if ours == "tower.patch.weight" else parameter
    rows = slice(expert * text.expert_hidden_size, (expert + 1) * text.expert_hidden_size)
    return parameter[:, rows] if ours.endswith("down") else parameter[rows]


def load(directory: Path) -> tuple[KimiVL, Tokenizer]:
    """The model in float32 and its tokenizer.

    Raises:
        ModelFileError: a file or tensor is missing or misshapen. Unknown tensors are named in a warning.
    """
    config = ModelConfig.from_hf_dir(directory)
    model = KimiVL(config)
    slots = dict(model.named_parameters()) | {
        n: b for n, b in model.named_buffers() if n.endswith("router_bias")
    }
    index = directory / "model.safetensors.index.json"
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{index}: cannot be read ({error})") from None
    wanted = {theirs: (ours, expert) for theirs, ours, expert in published_names(config)}
    extra_layers = re.compile(r"\.layers\.(\d+)\.")
    unknown = []
    for name in sorted(set(files) - set(wanted)):
        layer = extra_layers.search(name)
        if not IGNORED.search(name) and not (layer and int(layer[1]) >= config.text.n_layers):
            unknown.append(name)
    if unknown:
        warnings.warn(
            f"{index}: left out {len(unknown)} unknown tensors: {unknown[:10]}", KimiLiteWarning, stacklevel=2
        )
    missing = sorted(set(wanted) - set(files))
    if missing:
        raise ModelFileError(
            f"{index}: {len(missing)} tensors are missing, such as {', '.join(missing[:10])}"
        )
    by_file: dict[str, list[str]] = {}
    for name in wanted:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(directory / file, "pt") as shard, torch.no_grad():
                for name in names:
                    ours, expert = wanted[name]
                    slot, value = _slot(slots[ours], ours, expert, config.text), shard.get_tensor(name)
                    if value.numel() != slot.numel() or value.shape[0] != slot.shape[0]:
                        raise ModelFileError(
                            f"{directory / file}: {name} has shape {list(value.shape)}, expected {list(slot.shape)}"
                        )
                    slot.copy_(value.reshape(slot.shape))
        except OSError as error:
            raise ModelFileError(f"{directory / file}: cannot be read ({error})") from None
    return model.eval(), Tokenizer(Vocab.from_hf_dir(directory, config.text.vocab_size))


def published_tensors(model: KimiVL) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name, in file order, float32."""
    slots = dict(model.named_parameters()) | dict(model.named_buffers())
    for theirs, ours, expert in published_names(model.config):
        yield theirs, _slot(slots[ours], ours, expert, model.config.text).detach()


def expert_loads(model: KimiVL) -> Sequence[tuple[MoE, Tensor]]:
    """The MoE layers with the tokens that each expert took in the last call."""
    layers = [layer.ffn for layer in model.text.layers if isinstance(layer.ffn, MoE)]
    return [(layer, layer.load_E) for layer in layers if layer.load_E is not None]
