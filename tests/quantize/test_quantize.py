"""From a checkpoint to a file: exact keys and tensors, bounded error, and one sentence for what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kimi_lite.errors import KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.quantize.convert import quantize
from kimi_lite.quantize.encode import to_nearest
from kimi_lite.quantize.verify import tensor_errors
from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, TINY_VISION, write_checkpoint

DEEP = replace(TINY_TEXT, n_layers=27, n_experts=4, n_active=2, dense_hidden_size=128, expert_hidden_size=32)
KEYS = """general.architecture general.type general.name general.size_label general.license general.quantization_version
general.file_type tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type
tokenizer.ggml.merges tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.padding_token_id
tokenizer.chat_template deepseek2.block_count deepseek2.context_length deepseek2.embedding_length
deepseek2.feed_forward_length deepseek2.attention.head_count deepseek2.attention.head_count_kv
deepseek2.rope.freq_base deepseek2.attention.layer_norm_rms_epsilon deepseek2.expert_count
deepseek2.expert_used_count deepseek2.expert_group_count deepseek2.expert_group_used_count
deepseek2.expert_gating_func deepseek2.leading_dense_block_count deepseek2.vocab_size
deepseek2.attention.kv_lora_rank deepseek2.attention.key_length deepseek2.attention.value_length
deepseek2.attention.key_length_mla deepseek2.attention.value_length_mla deepseek2.expert_feed_forward_length
deepseek2.expert_shared_count deepseek2.expert_weights_scale deepseek2.expert_weights_norm
deepseek2.rope.dimension_count""".split()


def expected_tensors() -> dict[str, tuple[int, ...]]:
    """Names and ggml shapes (fastest first) by the published table, for DEEP."""
    D, V, H, N, R, Vd, C, F, E = 256, 768, 4, 96, 32, 64, 128, 32, 4
    out: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (D, V),
        "output.weight": (D, V),
        "output_norm.weight": (D,),
    }
    for i in range(27):
        b = f"blk.{i}."
        out |= {f"{b}attn_norm.weight": (D,), f"{b}ffn_norm.weight": (D,), f"{b}attn_kv_a_norm.weight": (C,)}
        out |= {f"{b}attn_q.weight": (D, H * (N + R)), f"{b}attn_kv_a_mqa.weight": (D, C + R)}
        out |= {
            f"{b}attn_k_b.weight": (N, C, H),
            f"{b}attn_v_b.weight": (C, Vd, H),
            f"{b}attn_output.weight": (H * Vd, D),
        }
        if i == 0:
            out |= {
                f"{b}ffn_gate.weight": (D, 128),
                f"{b}ffn_up.weight": (D, 128),
                f"{b}ffn_down.weight": (128, D),
            }
            continue
        out |= {f"{b}ffn_gate_inp.weight": (D, E), f"{b}exp_probs_b.bias": (E,)}
        out |= {
            f"{b}ffn_gate_exps.weight": (D, F, E),
            f"{b}ffn_up_exps.weight": (D, F, E),
            f"{b}ffn_down_exps.weight": (F, D, E),
        }
        out |= {
            f"{b}ffn_gate_shexp.weight": (D, 2 * F),
            f"{b}ffn_up_shexp.weight": (D, 2 * F),
            f"{b}ffn_down_shexp.weight": (2 * F, D),
        }
    return out


def test_a_gguf_holds_exactly_the_published_keys_and_tensors(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", text=DEEP, vision=None)
    quantize(checkpoint, tmp_path / "m.gguf", to="bf16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = {k for k in reader.fields if not k.startswith("GGUF.")}
    assert keys == set(KEYS)
    assert {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors} == expected_tensors()
    floats = {t.name for t in reader.tensors if t.tensor_type.name == "F32"}
    assert floats == {n for n in expected_tensors() if "norm" in n or "gate_inp" in n or "exp_probs" in n}
    assert reader.fields["deepseek2.expert_gating_func"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["deepseek2.rope.freq_base"].types == [gguf.GGUFValueType.FLOAT32]


def test_another_depth_writes_an_explicit_zero_for_query_compression(tmp_path: Path) -> None:
    quantize(write_checkpoint(tmp_path / "c", vision=None), tmp_path / "m.gguf", to="f16")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["deepseek2.attention.q_lora_rank"].contents() == 0


def test_an_mmproj_holds_exactly_the_published_keys_and_tensors(tmp_path: Path) -> None:
    result = quantize(write_checkpoint(tmp_path / "c"), tmp_path / "m.gguf", to="f16")
    assert [p.name for p in result.paths] == ["m.gguf", "m-mmproj.gguf"]
    reader = gguf.GGUFReader(result.paths[1])
    clip = """has_vision_encoder projector_type use_gelu vision.image_size vision.patch_size vision.embedding_length
    vision.feed_forward_length vision.block_count vision.attention.head_count vision.attention.layer_norm_epsilon
    vision.projection_dim vision.image_mean vision.image_std vision.projector.scale_factor""".split()
    general = ["architecture", "type", "name", "file_type", "quantization_version"]
    expected = {f"clip.{k}" for k in clip} | {f"general.{k}" for k in general} | {"kimi_lite.in_token_limit"}
    assert {k for k in reader.fields if not k.startswith("GGUF.")} == expected
    W, F = 72, 104
    shapes: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": (14, 14, 3, W), "v.patch_embd.bias": (W,)}
    shapes["v.position_embd.weight"] = (W, 256)
    for name, (rows, columns) in {"mm.1": (288, 288), "mm.2": (256, 288)}.items():
        shapes |= {f"{name}.weight": (columns, rows), f"{name}.bias": (rows,)}
    for i in range(3):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"v.blk.{i}.{name}.weight": (W, W), f"v.blk.{i}.{name}.bias": (W,)}
        shapes |= {f"v.blk.{i}.ffn_up.weight": (W, F), f"v.blk.{i}.ffn_up.bias": (F,)}
        shapes |= {f"v.blk.{i}.ffn_down.weight": (F, W), f"v.blk.{i}.ffn_down.bias": (W,)}
    norms = ["v.post_ln", "mm.input_norm"] + [f"v.blk.{i}.ln{j}" for i in range(3) for j in (1, 2)]
    shapes |= {f"{n}.{end}": (W,) for n in norms for end in ("weight", "bias")}
    assert {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors} == shapes


@pytest.mark.parametrize("to", ["q8_0", "q4_0"])
def test_block_types_equal_the_gguf_packages_bit_for_bit(tmp_path: Path, to: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    quantize(checkpoint, tmp_path / "bf16.gguf", to="bf16")
    quantize(checkpoint, tmp_path / "q.gguf", to=to)  # type: ignore[arg-type]
    source = {t.name: t for t in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors}
    checked = 0
    for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors:
        if t.tensor_type.name == to.upper():
            weights = gguf.dequantize(source[t.name].data, source[t.name].tensor_type)
            assert np.array_equal(t.data, gguf.quantize(weights, t.tensor_type)), t.name
            checked += 1
    assert checked > 30


def groups(largest: float) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (3, 64), elements=st.floats(-largest, largest, width=32))


BYTE_SCALES = np.array([(1 + m / 8) * 2.0 ** (e - 15) for e in range(16) for m in range(8)])


@pytest.mark.parametrize(("layout", "every"), [("q4b32", 1), ("q3b32", 2)])
@given(groups(15), st.sampled_from([1.0, 2.0**-7, 2.0**-16, 2.0**-140]))
def test_scales_of_a_byte_err_by_at_most_half_a_step_inside_their_grid(
    layout: str, every: int, w: np.ndarray, size: float
) -> None:
    w = w * np.float32(size)
    q, scale = to_nearest(w, layout)
    assert np.isin(q, range(0, 16, every)).all()
    assert np.isin(np.abs(scale.astype(np.float64)), BYTE_SCALES).all()
    step = every * np.repeat(scale.astype(np.float64), 32, 1)
    error = np.abs(w.astype(np.float64) - step * (q.astype(np.float64) - 8) / every)
    inside = (q > 0) & (q < 16 - every)  # neither end of the grid
    # Division by the step is one float32 rounding, on at most 8 steps.
    assert (error <= np.abs(step) * (0.5 + 8 * 2.0**-24))[inside].all()


@pytest.mark.parametrize(("layout", "every"), [("q4b32", 1), ("q3b32", 2)])
def test_a_scale_of_a_byte_loses_next_to_nothing_against_the_best_of_all(layout: str, every: int) -> None:
    rng = np.random.default_rng(4)
    w = np.concatenate([s * rng.standard_normal((64, 32)) for s in (2.0, 0.02, 1e-4)]).astype(np.float32)
    q, scale = to_nearest(w, layout)
    error = ((scale.astype(np.float64) * (q.astype(np.float64) - 8) - w) ** 2).sum(1)
    both = every * np.concatenate([BYTE_SCALES, -BYTE_SCALES])
    steps = np.clip(np.rint(w[:, None] / both[:, None]), -8 // every, 7 // every) * both[:, None]
    best = ((steps - w[:, None]) ** 2).sum(2).min(1)
    assert (error >= best - 1e-12).all()
    # The best may have the other sign, for which the largest value must fall on seven steps.
    assert error.sum() <= {"q4b32": 1.02, "q3b32": 1.05}[layout] * best.sum()


def test_a_weight_beyond_the_layout_is_refused_with_a_way_out() -> None:
    w = np.zeros((16, 32), np.float32)
    w[3, 5] = -15
    q, scale = to_nearest(w, "q4b32")
    assert (scale[3, 0] * (np.float32(q[3, 5]) - 8), q[3, 6]) == (-15, 8)
    w[3, 5] = 15.1
    with pytest.raises(ModelFileError, match=r"a weight is 15\.1 in size, .* up to 15; .* --to q8_0"):
        to_nearest(w, "q4b32")


@given(groups(1e4))
def test_q8g32_errs_by_at_most_half_a_step_and_the_scales_rounding(w: np.ndarray) -> None:
    q, scale = to_nearest(w, "q8g32")
    step = np.repeat(scale.astype(np.float64), 32, 1)
    error = np.abs(w.astype(np.float64) - step * q)
    # A scale rounded down by 2^-11 leaves the largest weight up to 127 · 2^-11 = 0.062 of a step beyond the clip.
    assert (error <= step * (0.5 + 127 * 2.0**-11 + 2.0**-15))[step >= 2.0**-14].all()


# Four bits: 8.6 % with the one scale that keeps the largest value, 8.1 % with sixteen around it. Three: the best uniform
# quantizer of normal values with eight levels leaves 19.3 % (Max, 1960), one fitted to each 32 of them somewhat less.
@pytest.mark.parametrize(("layout", "least", "most"), [("q4b32", 0.080, 0.0845), ("q3b32", 0.15, 0.193)])
def test_the_error_of_normal_weights_is_what_the_grid_predicts(
    layout: str, least: float, most: float
) -> None:
    w = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    q, scale = to_nearest(w, layout)
    back = np.repeat(scale.astype(np.float32), 32, 1) * (q.astype(np.float32) - 8)
    assert least < float(np.sqrt(((back - w) ** 2).mean())) < most


@pytest.mark.parametrize(("to", "least", "most"), [("int4", 0.07, 0.09), ("int3", 0.15, 0.193)])
@pytest.mark.filterwarnings("ignore:3 bits rounded to the nearest")
def test_verify_reports_each_tensor(
    tmp_path: Path, to: Literal["int4", "int3"], least: float, most: float
) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    quantize(checkpoint, tmp_path / "m.gguf", to=to)
    errors = dict(tensor_errors(checkpoint, tmp_path / "m.gguf"))
    assert least < errors["blk.1.ffn_exps.packed"] < most
    assert 0.07 < errors["blk.1.ffn_shexp.packed"] < 0.09
    assert 0.003 < errors["token_embd.weight"] < 0.008
    assert errors["blk.1.ffn_gate_inp.weight"] == 0


def test_three_bits_without_a_sample_say_that_they_should_have_one(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    with pytest.warns(KimiLiteWarning, match=r"lose more than they must; .* --calibrate"):
        quantize(checkpoint, tmp_path / "m.gguf", to="int3")


def test_quantizing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    for name in ("a", "b"):
        quantize(checkpoint, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def one_weight(directory: Path, name: str, value: float) -> None:
    """The first weight of a matrix of that name becomes `value`, in bfloat16."""
    for shard in sorted(directory.glob("*.safetensors")):
        raw = bytearray(shard.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        for found in (header[n] for n in sorted(header) if n.endswith(f".{name}.weight")):
            assert found["dtype"] == "BF16"
            at = 8 + length + found["data_offsets"][0]
            raw[at : at + 2] = np.float32(value).tobytes()[2:]
            shard.write_bytes(raw)
            return
    raise KeyError(name)


def without_shard(directory: Path) -> None:
    next(iter(sorted(directory.glob("*.safetensors")))).unlink()


def truncated_shard(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def damaged_header(directory: Path) -> None:
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def edited_config(directory: Path, key: str, value: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"][key] = value
    path.write_text(json.dumps(config))


def missing_tensor(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["vision_tower.patch_embed.proj.bias"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_shard, "not found, although the index names it"),
        (truncated_shard, "truncated"),
        (damaged_header, "header claims"),
        (missing_tensor, r"1 tensors are missing, such as vision_tower\.patch_embed\.proj\.bias"),
        (
            lambda d: edited_config(d, "moe_intermediate_size", 64),
            r"has shape \[96, 256\], expected \[64, 256\]; .*; and \d+ more$",
        ),
        (
            lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"),
            r"chat_template\.jinja: cannot be read as text",
        ),
        (lambda d: edited_config(d, "topk_method", "greedy"), "topk_method is 'greedy'"),
        (lambda d: (d / "tiktoken.model").unlink(), "tiktoken.model: not found"),
        (lambda d: (d / "config.json").unlink(), "config.json: not found"),
        (lambda d: one_weight(d, "q_proj", 20.0), r"^blk\.0\.attn_q\.weight: a weight is 20 in size"),
        (lambda d: one_weight(d, "down_proj", np.nan), r"^blk\.\S+: a weight is not a finite number"),
        (
            lambda d: one_weight(d, "kv_a_proj_with_mqa", -np.inf),
            r"^blk\.0\.attn_kv_a_mqa\.weight: .* not a finite",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    damage(checkpoint)
    with pytest.raises(ModelFileError, match=says) as caught:
        quantize(checkpoint, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_an_unknown_tensor_is_named_and_left_out(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    extra = dict.fromkeys(
        ("model.extra.weight", "model.layers.3.junk", "model.layers.0.self_attn.rotary_emb.inv_freq")
    )
    header |= {n: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for n in extra}
    new = json.dumps(header).encode()
    shard.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(extra, shard.name)
    path.write_text(json.dumps(index))
    with pytest.warns(KimiLiteWarning, match="1 unknown tensors, such as model.extra.weight"):
        quantize(checkpoint, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"to": "q3"}, "expected one of int4"),
        ({"to": "q8_0", "format": "int4"}, "--format int4 does not hold q8_0"),
        ({"to": "int4", "format": "gguf"}, "--format gguf does not hold int4"),
    ],
)
def test_contradicting_options_are_one_sentence(tmp_path: Path, arguments: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        quantize(tmp_path, tmp_path / "m.gguf", **arguments)  # type: ignore[arg-type]


def test_the_command_reports_and_exits_with_3_for_a_bad_checkpoint(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kimi_lite",
        "quantize",
        str(tmp_path / "none"),
        str(tmp_path / "m.gguf"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("kimi-lite: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_vision_sizes_of_the_tests_hide_no_transposition() -> None:
    assert len({TINY_VISION.hidden_size, TINY_VISION.ffn_size, TINY_TEXT.hidden_size}) == 3
