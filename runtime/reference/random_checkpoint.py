"""Writes a checkpoint directory with the published file and tensor names and random weights.

For tests, for speed and for memory: every tensor that the published model has is there, in bf16, at any size. The
shards hold independent normal values (standard deviation 1/sqrt(fan-in), norms near 1), so that activations keep
their scale through any depth and nothing is degenerate.

Needs numpy only, and holds one tensor at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kimi_lite.formats.config import TextConfig, VisionConfig
from kimi_lite.formats.safetensors_file import ShardSpec, write_shards

# All sizes differ from one another (N, R, V, C; also H, E, A), so that no transposition hides.
TINY_TEXT = TextConfig(
    vocab_size=768,
    hidden_size=256,
    n_layers=3,
    n_heads=4,
    kv_rank=128,
    nope_dim=96,
    rope_dim=32,
    value_dim=64,
    dense_hidden_size=512,
    n_dense_layers=1,
    n_experts=8,
    n_active=3,
    n_shared=2,
    expert_hidden_size=96,
    routed_scale=2.446,
    rms_eps=1e-5,
    rope_theta=800000.0,
    context_length=4096,
)
TINY_VISION = VisionConfig(
    patch_size=14,
    grid_height=16,
    grid_width=16,
    n_heads=2,
    n_layers=3,
    hidden_size=72,
    ffn_size=104,
    merge=2,
)
SPECIAL_NAMES = {  # offset from the first control token: name, as published
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    18: "<|media_start|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    254: "[UNK]",
    255: "[PAD]",
}
PUBLISHED_TEMPLATE_NOTE = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)


def text_shapes(c: TextConfig, prefix: str = "language_model.") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes of the text model, in file order."""
    D, H, F = c.hidden_size, c.n_heads, c.expert_hidden_size
    model = f"{prefix}model."
    yield f"{model}embed_tokens.weight", (c.vocab_size, D)
    for layer in range(c.n_layers):
        at = f"{model}layers.{layer}."
        yield f"{at}input_layernorm.weight", (D,)
        yield f"{at}self_attn.q_proj.weight", (H * (c.nope_dim + c.rope_dim), D)
        yield f"{at}self_attn.kv_a_proj_with_mqa.weight", (c.kv_rank + c.rope_dim, D)
        yield f"{at}self_attn.kv_a_layernorm.weight", (c.kv_rank,)
        yield f"{at}self_attn.kv_b_proj.weight", (H * (c.nope_dim + c.value_dim), c.kv_rank)
        yield f"{at}self_attn.o_proj.weight", (D, H * c.value_dim)
        yield f"{at}post_attention_layernorm.weight", (D,)
        if layer < c.n_dense_layers:
            yield from _mlp_shapes(f"{at}mlp.", D, c.dense_hidden_size)
            continue
        yield f"{at}mlp.gate.weight", (c.n_experts, D)
        yield f"{at}mlp.gate.e_score_correction_bias", (c.n_experts,)
        for expert in range(c.n_experts):
            yield from _mlp_shapes(f"{at}mlp.experts.{expert}.", D, F)
        yield from _mlp_shapes(f"{at}mlp.shared_experts.", D, c.n_shared * F)
    yield f"{model}norm.weight", (D,)
    yield f"{prefix}lm_head.weight", (c.vocab_size, D)


def _mlp_shapes(at: str, D: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}gate_proj.weight", (width, D)
    yield f"{at}up_proj.weight", (width, D)
    yield f"{at}down_proj.weight", (D, width)


def vision_shapes(v: VisionConfig, text_width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes of the image tower and the projector, in file order."""
    W, joined = v.hidden_size, v.hidden_size * v.merge**2
    yield "vision_tower.patch_embed.proj.weight", (W, 3, v.patch_size, v.patch_size)
    yield "vision_tower.patch_embed.proj.bias", (W,)
    yield "vision_tower.patch_embed.pos_emb.weight", (v.grid_height, v.grid_width, W)
    for block in range(v.n_layers):
        at = f"vision_tower.encoder.blocks.{block}."
        for name, shape in (
            ("norm0", (W,)),
            ("norm1", (W,)),
            ("wqkv", (3 * W, W)),
            ("wo", (W, W)),
            ("mlp.fc0", (v.ffn_size, W)),
            ("mlp.fc1", (W, v.ffn_size)),
        ):
            yield f"{at}{name}.weight", shape
            yield f"{at}{name}.bias", shape[:1]
    for name, shape in (
        ("vision_tower.encoder.final_layernorm", (W,)),
        ("multi_modal_projector.pre_norm", (W,)),
        ("multi_modal_projector.linear_1", (joined, joined)),
        ("multi_modal_projector.linear_2", (text_width, joined)),
    ):
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Normal values scaled to keep activations near 1; norms near 1; biases small."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.1 * values
    if "embed_tokens" in name or "pos_emb" in name:
        return values
    return values / np.float32(np.prod(shape[1:])) ** np.float32(0.5)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; the upper half of the float32 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def hf_config(text: TextConfig, vision: VisionConfig | None) -> dict[str, Any]:
    """`config.json` with the published keys."""
    inner = {
        "model_type": "deepseek_v3",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.n_layers,
        "num_attention_heads": text.n_heads,
        "num_key_value_heads": text.n_heads,
        "q_lora_rank": None,
        "kv_lora_rank": text.kv_rank,
        "qk_nope_head_dim": text.nope_dim,
        "qk_rope_head_dim": text.rope_dim,
        "v_head_dim": text.value_dim,
        "intermediate_size": text.dense_hidden_size,
        "first_k_dense_replace": text.n_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": text.n_experts,
        "num_experts_per_tok": text.n_active,
        "n_shared_experts": text.n_shared,
        "moe_intermediate_size": text.expert_hidden_size,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": text.routed_scale,
        "rms_norm_eps": text.rms_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": text.context_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "pad_token_id": text.pad_id,
        "torch_dtype": "bfloat16",
    }
    if vision is None:
        return {"architectures": ["DeepseekV3ForCausalLM"], **inner}
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "text_config": inner,
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": vision.patch_size,
            "init_pos_emb_height": vision.grid_height,
            "init_pos_emb_width": vision.grid_width,
            "num_attention_heads": vision.n_heads,
            "num_hidden_layers": vision.n_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_size,
            "merge_kernel_size": [vision.merge, vision.merge],
        },
        "ignore_index": -100,
        "media_placeholder_token_id": text.vocab_size - 256 + 21,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_side_files(
    directory: Path,
    text: TextConfig,
    vision: VisionConfig | None,
    ranks: list[bytes],
    token_limit: int = 4096,
) -> None:
    """Every file of a checkpoint directory but the weights."""
    import base64

    first = len(ranks)
    assert text.vocab_size == first + 256, (
        f"{first} ranks and 256 control tokens, vocabulary {text.vocab_size}"
    )
    directory.mkdir(parents=True, exist_ok=True)

    def write_json(name: str, value: dict[str, Any]) -> None:
        (directory / name).write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    write_json("config.json", hf_config(text, vision))
    write_json("generation_config.json", {"eos_token_id": [first + 1, first + 2], "temperature": 0.6})
    (directory / "tiktoken.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    decoder = {str(first + i): {"content": name, "special": True} for i, name in SPECIAL_NAMES.items()}
    write_json(
        "tokenizer_config.json", {"added_tokens_decoder": decoder, "tokenizer_class": "TikTokenTokenizer"}
    )
    (directory / "chat_template.jinja").write_text(PUBLISHED_TEMPLATE_NOTE, encoding="utf-8")
    if vision is not None:
        write_json(
            "preprocessor_config.json",
            {
                "image_processor_type": "KimiVLImageProcessor",
                "in_token_limit": token_limit,
                "patch_size": vision.patch_size,
                "num_pooled_tokens": 1024,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "pad_input": True,
                "merge_kernel_size": [2, 2],
            },
        )


def byte_ranks(n: int, seed: int) -> list[bytes]:
    """All single bytes, then n - 256 random merges of earlier tokens, so that merges and ranks are exercised."""
    rng = np.random.default_rng(seed)
    ranks = [bytes([b]) for b in range(256)]
    known = set(ranks)
    letters = [*range(ord("a"), ord("z") + 1), ord(" ")]
    while len(ranks) < n:
        left = (
            ranks[int(rng.choice(letters))]
            if rng.random() < 0.5
            else ranks[int(rng.integers(97, len(ranks)))]
        )
        token = left + ranks[int(rng.choice(letters[:-1]))]
        if token.isascii() and len(token) <= 8 and token not in known:
            ranks.append(token)
            known.add(token)
    return ranks


def write_checkpoint(
    directory: Path,
    text: TextConfig = TINY_TEXT,
    vision: VisionConfig | None = TINY_VISION,
    seed: int = 0,
    shard_bytes: int = 1 << 20,
) -> Path:
    """Write a whole random checkpoint directory and return its path."""
    first = text.vocab_size - 256
    write_side_files(directory, text, vision, byte_ranks(first, seed))
    shapes = dict(text_shapes(text, "language_model." if vision else ""))
    if vision:
        shapes |= dict(vision_shapes(vision, text.hidden_size))
    rng = np.random.default_rng(seed)
    specs = [ShardSpec(name, "BF16", shape) for name, shape in shapes.items()]
    values = ((n, to_bf16(random_tensor(n, s, rng))) for n, s in shapes.items())
    for _ in write_shards(directory, specs, values, shard_bytes):
        pass
    return directory
