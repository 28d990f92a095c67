"""What a model file says about itself: sizes of the text model, the image tower and the image processor.

Two foreign formats are read here and nowhere else: the published `config.json` and GGUF's `deepseek2.*` keys.
Every known key is either used, or checked to have the one value that this program honours, or listed as having no
effect; an unknown key is named in a warning, since a later release may add some. A missing key is an error: a
default copied from some checkpoint would turn into nonsense without a word.

Dimension key:  D hidden size   H heads   N/R/V head dims: no-rope / rope / value   C latent   E experts   F expert width
"""

import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_lite.errors import KimiLiteWarning, ModelFileError

KV_NORM_EPS = 1e-6  # the published code does not pass rms_norm_eps to the latent's norm, so its default holds
GATING_SIGMOID = 2  # GGUF's code for the sigmoid router

# Published keys without effect on inference (quantization_config: on the tensors' form, formats/compressed_tensors.py).
HF_TEXT_WITHOUT_EFFECT = frozenset(
    """
_attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout auto_map
aux_loss_alpha bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size ep_size
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id head_dim id2label
initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_nextn_predict_layers num_return_sequences
output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type pruned_heads
qk_head_dim quantization_config remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)

# Published keys with the only values that this program honours.
HF_TEXT_REQUIRED: dict[str, tuple[Any, ...]] = {
    "q_lora_rank": (None,),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "topk_group": (1,),
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
    "rope_interleave": (True,),
}
HF_TEXT_OPTIONAL = frozenset({"rope_scaling", "rope_interleave", "moe_layer_freq", "tie_word_embeddings"})
HF_VISION_WITHOUT_EFFECT = frozenset({"model_type", "torch_dtype", "dtype", "_attn_implementation_autoset"})


def _is_number(value: object) -> bool:
    """Is it a number that a float can hold?"""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


class KeyReader:
    """Reads a JSON object key by key and accounts for all of them."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise ModelFileError(f"{where}: expected a JSON object, found {type(values).__name__}")
        self.values, self.where = values, where
        self.seen: set[str] = set()

    def get(self, key: str) -> Any:
        self.seen.add(key)
        if key not in self.values:
            raise ModelFileError(
                f"{self.where}: the key {key!r} is missing; the file is incomplete or another model's"
            )
        return self.values[key]

    def integer(self, key: str, minimum: int = 1) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
            raise ModelFileError(
                f"{self.where}: {key} is {value!r:.80}; expected a whole number of at least {minimum}"
            )
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not _is_number(value):
            raise ModelFileError(f"{self.where}: {key} is {value!r:.80}; expected a number")
        return float(value)

    def colours(self, key: str, above: float = -math.inf) -> tuple[float, float, float]:
        """Three numbers, one for red, green and blue each."""
        value = self.get(key)
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(_is_number(v) and v > above for v in value)
        ):
            expected = "three positive numbers" if above == 0 else "three numbers"
            raise ModelFileError(f"{self.where}: {key} is {value!r:.80}; expected {expected}")
        return float(value[0]), float(value[1]), float(value[2])

    def token_id(self, key: str) -> int | None:
        """A token id, the first of a list of them, or nothing."""
        self.seen.add(key)
        value = self.values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31):
            return value
        raise ModelFileError(f"{self.where}: {key} is {value!r:.80}; expected a token id")

    def finish(self, without_effect: frozenset[str]) -> None:
        unknown = sorted(set(self.values) - self.seen - without_effect)
        if unknown:
            warnings.warn(
                f"{self.where}: ignoring unknown keys {', '.join(unknown)}", KimiLiteWarning, stacklevel=3
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Sizes of the language model. Field names are ours; `from_hf` and `from_gguf` alone know the foreign ones."""

    vocab_size: int
    hidden_size: int  # D
    n_layers: int
    n_heads: int  # H
    kv_rank: int  # C, width of the latent
    nope_dim: int  # N, per head
    rope_dim: int  # R, per head in queries, shared by all heads in keys
    value_dim: int  # V, per head
    dense_hidden_size: int  # MLP width of the first n_dense_layers
    n_dense_layers: int
    n_experts: int  # E, routed
    n_active: int  # A, routed experts per token
    n_shared: int  # shared experts, stored as one MLP of width n_shared * F
    expert_hidden_size: int  # F
    routed_scale: float  # multiplies the normalised router weights
    rms_eps: float
    kv_norm_eps: float = KV_NORM_EPS
    rope_theta: float
    context_length: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.n_active > self.n_experts:
            raise ModelFileError(
                f"{self.n_active} active experts of {self.n_experts}: the configuration is damaged"
            )
        if self.n_dense_layers > self.n_layers:
            raise ModelFileError(
                f"{self.n_dense_layers} dense layers of {self.n_layers}: the configuration is damaged"
            )
        if self.rope_dim % 2:
            raise ModelFileError(f"the rope width is {self.rope_dim}; expected an even number")

    @property
    def softmax_scale(self) -> float:
        return float((self.nope_dim + self.rope_dim) ** -0.5)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str) -> "TextConfig":
        """Read `config.json` (Moonlight) or its `text_config` (Kimi-VL)."""
        read = KeyReader(hf, where)
        if "rope_theta" in hf:
            rope_theta = read.number("rope_theta")
        else:  # transformers 5 writes the rope settings into an object of their own
            rope = KeyReader(read.get("rope_parameters"), f"{where}: rope_parameters")
            rope_theta = rope.number("rope_theta")
            if rope.get("rope_type") != "default":
                raise ModelFileError(
                    f"{where}: rope_type is {hf['rope_parameters']['rope_type']!r:.80}; only 'default' runs"
                )
        read.seen.add("rope_parameters")
        for key, honoured in HF_TEXT_REQUIRED.items():
            if key in HF_TEXT_OPTIONAL and key not in hf:
                continue
            if read.get(key) not in honoured:
                raise ModelFileError(
                    f"{where}: {key} is {hf[key]!r:.80}; this program only runs {honoured[0]!r}"
                )
        n_heads = read.integer("num_attention_heads")
        if read.integer("num_key_value_heads") != n_heads:
            raise ModelFileError(f"{where}: num_key_value_heads differs from num_attention_heads ({n_heads})")
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            n_layers=read.integer("num_hidden_layers"),
            n_heads=n_heads,
            kv_rank=read.integer("kv_lora_rank"),
            nope_dim=read.integer("qk_nope_head_dim"),
            rope_dim=read.integer("qk_rope_head_dim"),
            value_dim=read.integer("v_head_dim"),
            dense_hidden_size=read.integer("intermediate_size"),
            n_dense_layers=read.integer("first_k_dense_replace", minimum=0),
            n_experts=read.integer("n_routed_experts"),
            n_active=read.integer("num_experts_per_tok"),
            n_shared=read.integer("n_shared_experts"),
            expert_hidden_size=read.integer("moe_intermediate_size"),
            routed_scale=read.number("routed_scaling_factor"),
            rms_eps=read.number("rms_norm_eps"),
            rope_theta=rope_theta,
            context_length=read.integer("max_position_embeddings"),
            bos_id=read.token_id("bos_token_id"),
            eos_id=read.token_id("eos_token_id"),
            pad_id=read.token_id("pad_token_id"),
        )
        # Moonlight keeps the wrapper's keys at the same level.
        read.finish(HF_TEXT_WITHOUT_EFFECT)
        return config

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> "TextConfig":
        """Read the `deepseek2.*` keys of a GGUF file, in the latent or the older expanded form."""
        architecture = metadata.get("general.architecture")
        if architecture != "deepseek2":
            raise ModelFileError(
                f"{where}: the file holds a model of architecture {architecture!r}; expected 'deepseek2' (Kimi-VL, Moonlight)"
            )
        prefix = "deepseek2."
        read = KeyReader(
            {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, where
        )
        gating = read.values.get("expert_gating_func", 1)
        if gating != GATING_SIGMOID:
            raise ModelFileError(
                f"{where}: expert_gating_func is {gating} (softmax is 1); Kimi-VL and Moonlight need {GATING_SIGMOID}"
            )
        if not read.values.get("expert_weights_norm", False):
            raise ModelFileError(
                f"{where}: expert_weights_norm is missing or false; Kimi-VL and Moonlight normalise"
            )
        for group in ("expert_group_count", "expert_group_used_count"):
            if read.values.get(group, 1) != 1:
                raise ModelFileError(f"{where}: {group} is {read.values[group]}; only ungrouped routing runs")
        if read.values.get("attention.q_lora_rank", 0) != 0:
            raise ModelFileError(
                f"{where}: the file compresses its queries (q_lora_rank); Kimi-VL and Moonlight do not"
            )
        if read.values.get("rope.scaling.type", "none") not in ("none", "linear") or (
            read.values.get("rope.scaling.factor", 1.0) != 1.0
        ):
            raise ModelFileError(
                f"{where}: the file asks for scaled rotary positions; Kimi-VL and Moonlight have none"
            )
        rope_dim = read.integer("rope.dimension_count")
        latent = "attention.key_length_mla" in read.values
        key_length = read.integer("attention.key_length_mla" if latent else "attention.key_length")
        if key_length <= rope_dim:
            raise ModelFileError(
                f"{where}: a key of width {key_length} cannot hold {rope_dim} rotated values"
            )
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        return cls(
            vocab_size=read.integer("vocab_size") if "vocab_size" in read.values else len(tokens),
            hidden_size=read.integer("embedding_length"),
            n_layers=read.integer("block_count"),
            n_heads=read.integer("attention.head_count"),
            kv_rank=read.integer("attention.kv_lora_rank"),
            nope_dim=key_length - rope_dim,
            rope_dim=rope_dim,
            value_dim=read.integer("attention.value_length_mla" if latent else "attention.value_length"),
            dense_hidden_size=read.integer("feed_forward_length"),
            n_dense_layers=read.integer("leading_dense_block_count", minimum=0),
            n_experts=read.integer("expert_count"),
            n_active=read.integer("expert_used_count"),
            n_shared=read.integer("expert_shared_count"),
            expert_hidden_size=read.integer("expert_feed_forward_length"),
            routed_scale=read.number("expert_weights_scale"),
            rms_eps=read.number("attention.layer_norm_rms_epsilon"),
            rope_theta=read.number("rope.freq_base"),
            context_length=read.integer("context_length"),
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
            pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )

    def gguf_metadata(self) -> dict[str, int | float | bool | str]:
        """The `deepseek2.*` keys that llama.cpp's converter writes for this model, in its latent form.

        llama.cpp tells "no query compression" by the depth (26 or 27 layers); any other depth needs an explicit 0.
        """
        values: dict[str, int | float | bool | str] = {
            "block_count": self.n_layers,
            "context_length": self.context_length,
            "embedding_length": self.hidden_size,
            "feed_forward_length": self.dense_hidden_size,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": 1,
            "rope.freq_base": self.rope_theta,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            "expert_count": self.n_experts,
            "expert_used_count": self.n_active,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "expert_gating_func": GATING_SIGMOID,
            "leading_dense_block_count": self.n_dense_layers,
            "vocab_size": self.vocab_size,
            "attention.kv_lora_rank": self.kv_rank,
            "attention.key_length": self.kv_rank + self.rope_dim,
            "attention.value_length": self.kv_rank,
            "attention.key_length_mla": self.nope_dim + self.rope_dim,
            "attention.value_length_mla": self.value_dim,
            "expert_feed_forward_length": self.expert_hidden_size,
            "expert_shared_count": self.n_shared,
            "expert_weights_scale": self.routed_scale,
            "expert_weights_norm": True,
            "rope.dimension_count": self.rope_dim,
        }
        if self.n_layers not in (26, 27):
            values["attention.q_lora_rank"] = 0
        return {f"deepseek2.{key}": value for key, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Sizes of MoonViT. Absent from the file and fixed by the published code: LayerNorm eps 1e-5, rope theta 10000."""

    patch_size: int
    grid_height: int  # rows of the learned position table
    grid_width: int
    n_heads: int
    n_layers: int
    hidden_size: int
    ffn_size: int
    merge: int  # patches per token and side

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str) -> "VisionConfig":
        read = KeyReader(hf, where)
        if hf.get("model_type", "moonvit") != "moonvit":
            raise ModelFileError(f"{where}: the image tower is {hf['model_type']!r:.80}; expected 'moonvit'")
        merge = read.get("merge_kernel_size")
        if not (isinstance(merge, list) and len(merge) == 2 and merge[0] == merge[1] == 2):
            raise ModelFileError(
                f"{where}: merge_kernel_size is {merge!r:.80}; this program only runs [2, 2]"
            )
        config = cls(
            patch_size=read.integer("patch_size"),
            grid_height=read.integer("init_pos_emb_height"),
            grid_width=read.integer("init_pos_emb_width"),
            n_heads=read.integer("num_attention_heads"),
            n_layers=read.integer("num_hidden_layers"),
            hidden_size=read.integer("hidden_size"),
            ffn_size=read.integer("intermediate_size"),
            merge=2,
        )
        if config.hidden_size % (4 * config.n_heads):
            raise ModelFileError(
                f"{where}: hidden_size {config.hidden_size} does not give each head a multiple of 4"
            )
        read.finish(HF_VISION_WITHOUT_EFFECT)
        return config

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], n_positions: int, where: str) -> "VisionConfig":
        """Read the `clip.*` keys of an mmproj file, or of a packed file with an image side, whose position table has
        `n_positions` rows.

        llama.cpp stores one side of the table only; the published one is square.
        """
        architecture, projector = metadata.get("general.architecture"), metadata.get("clip.projector_type")
        if projector != "kimivl" or (architecture != "clip" and "kimi_lite.packed.version" not in metadata):
            raise ModelFileError(
                f"{where}: the file holds {architecture!r} with projector {projector!r}; "
                "expected an image side of Kimi-VL: 'clip' with 'kimivl'"
            )
        read = KeyReader({k.removeprefix("clip."): v for k, v in metadata.items()}, where)
        for key, honoured in (
            ("has_vision_encoder", True),
            ("use_gelu", True),
            ("vision.projector.scale_factor", 2),
        ):
            if read.get(key) != honoured:
                raise ModelFileError(
                    f"{where}: {key} is {read.values[key]!r:.80}; this program only runs {honoured!r}"
                )
        eps = read.number("vision.attention.layer_norm_epsilon")
        if not math.isclose(eps, 1e-5, rel_tol=1e-6):
            raise ModelFileError(f"{where}: layer_norm_epsilon is {eps}; this program only runs 1e-5")
        side = math.isqrt(n_positions)
        if side * side != n_positions:
            raise ModelFileError(
                f"{where}: a table of {n_positions} positions is not square; the file is damaged"
            )
        config = cls(
            patch_size=read.integer("vision.patch_size"),
            grid_height=side,
            grid_width=side,
            n_heads=read.integer("vision.attention.head_count"),
            n_layers=read.integer("vision.block_count"),
            hidden_size=read.integer("vision.embedding_length"),
            ffn_size=read.integer("vision.feed_forward_length"),
            merge=2,
        )
        if config.patch_size != 14 or config.hidden_size % (4 * config.n_heads):
            raise ModelFileError(
                f"{where}: patches of {config.patch_size} pixels and {config.n_heads} heads on a width of "
                f"{config.hidden_size}; Kimi-VL has 14 pixels and heads whose width is a multiple of 4"
            )
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What the image processor needs from `preprocessor_config.json`; only the file counts, not class defaults."""

    token_limit: int = 4096  # patches before merging; a picture above it is shrunk
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str) -> "ImageConfig":
        read = KeyReader(hf, where)
        if read.get("pad_input") is not True:
            raise ModelFileError(
                f"{where}: pad_input is {hf['pad_input']!r:.80}; this program only runs true"
            )
        return cls(
            token_limit=read.integer("in_token_limit"),
            mean=read.colours("image_mean"),
            std=read.colours("image_std", above=0),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> "ImageConfig":
        """Read the image side's keys. Files by llama.cpp lack the patch limit: then a `preprocessor_config.json` beside
        the file decides, or else the release, which its name tells (2506 has 16384 patches, the older ones 4096)."""
        read = KeyReader(metadata, str(path))
        published = path.with_name("preprocessor_config.json")
        if "kimi_lite.in_token_limit" in metadata:
            limit = read.integer("kimi_lite.in_token_limit")
        elif published.exists():
            limit = cls.from_hf(read_json(published), str(published)).token_limit
        else:
            limit = 16384 if "2506" in f"{metadata.get('general.name', '')} {path.name}" else 4096
        return cls(
            token_limit=limit,
            mean=read.colours("clip.vision.image_mean"),
            std=read.colours("clip.vision.image_std", above=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint: text model, and for Kimi-VL the image side."""

    name: str
    text: TextConfig
    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    media_pad_id: int | None = None

    @property
    def text_prefix(self) -> str:
        """What stands before the text model's tensor names in a published checkpoint."""
        return "language_model." if self.vision else ""

    @classmethod
    def from_hf_dir(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` and `preprocessor_config.json` of a published checkpoint."""
        path = directory / "config.json"
        hf = read_json(path)
        kind = hf.get("model_type")
        if kind == "deepseek_v3":
            return cls(name=directory.resolve().name, text=TextConfig.from_hf(hf, str(path)))
        if kind != "kimi_vl":
            raise ModelFileError(
                f"{path}: model_type is {kind!r:.80}; expected 'kimi_vl' (Kimi-VL) or 'deepseek_v3' (Moonlight)"
            )
        read = KeyReader(hf, str(path))
        text = (
            {**read.get("text_config")}
            if isinstance(hf.get("text_config"), dict)
            else read.get("text_config")
        )
        processor = directory / "preprocessor_config.json"
        return cls(
            name=directory.resolve().name,
            text=TextConfig.from_hf(text, f"{path}: text_config"),
            vision=VisionConfig.from_hf(read.get("vision_config"), f"{path}: vision_config"),
            image=ImageConfig.from_hf(read_json(processor), str(processor)),
            media_pad_id=read.integer("media_placeholder_token_id"),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; at most 64 MB are read."""
    try:
        if path.stat().st_size > 64 << 20:
            raise ModelFileError(f"{path}: {path.stat().st_size} bytes is too long for a configuration file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: not found; a checkpoint directory must hold it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
