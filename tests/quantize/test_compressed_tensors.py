"""Checkpoints in compressed-tensors' 4 bits, written and read: against the format's own package, and transformers."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from commands import command
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kimi_lite.errors import DoesNotFitError, KimiLiteError, KimiLiteWarning, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import GgufFile
from kimi_lite.formats.packed import matrix_bytes, mlp_bytes, split_mlp, unpack
from kimi_lite.quantize.calibrate import Passage
from kimi_lite.quantize.convert import quantize
from kimi_lite.quantize.verify import tensor_errors
from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, write_checkpoint

IN_4_BITS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sample() -> list[Passage]:
    ids = np.random.default_rng(5).integers(0, 512, (4, 96))
    return [Passage(row.tolist()) for row in ids]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def scheme_of(directory: Path) -> QuantizationScheme:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    found = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert isinstance(found, QuantizationScheme)
    return found


def decompressed(directory: Path) -> dict[str, NDArray[np.float32]]:
    """Every matrix that stands in few bits, by its published name, as the package reads it."""
    tensors, scheme, out = tensors_of(directory), scheme_of(directory), {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            stem = name.removesuffix("weight_packed")
            state = {n.removeprefix(stem): t for n, t in tensors.items() if n.startswith(stem)}
            state["weight_scale"] = state["weight_scale"].float()  # else the products are rounded to bf16
            out[f"{stem}weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
    return out


def packed_matrices(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The text model's matrices in a packed file by their published names, without a prefix."""
    file = GgufFile(path)
    table = (
        file.metadata[f"kimi_lite.packed.{key}"] for key in ("name", "layout", "count", "rows", "columns")
    )
    theirs = {"ffn": "mlp.", "ffn_exps": "mlp.experts.{}.", "ffn_shexp": "mlp.shared_experts."}
    others = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"}
    for name, layout, count, rows, columns in zip(*table, strict=True):
        data = file.tensors[name].data
        if not name.startswith("blk."):
            continue
        _, layer, kind, _ = name.split(".") if name.count(".") == 3 else (*name.split(".")[:3], "")
        at = f"model.layers.{layer}."
        if kind in others:
            assert data.size == matrix_bytes(layout, rows, columns)
            yield f"{at}{others[kind]}.weight", unpack(data, layout, rows, columns)
        if kind in theirs:
            size = mlp_bytes(layout, rows, columns)
            for e in range(count):
                parts = split_mlp(data[e * size : (e + 1) * size], layout, rows, columns)
                shapes = ((rows, columns), (rows, columns), (columns, rows))
                for part, data_of, shape in zip(("gate", "up", "down"), parts, shapes, strict=True):
                    yield f"{at}{theirs[kind].format(e)}{part}_proj.weight", unpack(data_of, layout, *shape)


@pytest.mark.parametrize("calibrate", [False, True], ids=["nearest", "calibrated"])
def test_the_package_reads_the_weights_of_the_int4_file(tmp_path: Path, calibrate: bool) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    for out, form in (("out", "compressed-tensors"), ("m.gguf", None)):
        quantize(checkpoint, tmp_path / out, format=form, sample=sample if calibrate else None)
    theirs = decompressed(tmp_path / "out")
    ours = {f"language_model.{name}": weight for name, weight in packed_matrices(tmp_path / "m.gguf")}
    assert set(theirs) == set(ours)
    assert (
        len(ours) == 3 * 2 + 3 + 2 * 3 * 9
    )  # q and o; the dense MLP; two layers of eight experts and a shared one
    for name, weight in ours.items():
        assert np.array_equal(theirs[name], weight), name


def test_what_is_not_in_4_bits_is_copied_and_so_are_the_files_beside(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    (checkpoint / "modeling_kimi_vl.py").write_text("# code of the model's own\n")
    (checkpoint / "consolidated.pth").write_bytes(b"other weights")
    result = quantize(checkpoint, tmp_path / "out", format="compressed-tensors")
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "out")
    left = {name for name in before if name.split(".")[-2] not in IN_4_BITS}
    assert {n for n in after if ".weight_" not in n} == left
    assert all(torch.equal(before[name], after[name]) for name in left)
    names = {p.name for p in checkpoint.iterdir() if "safetensors" not in p.name} - {"consolidated.pth"}
    assert {p.name for p in (tmp_path / "out").iterdir() if "safetensors" not in p.name} == names
    for name in names - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((checkpoint / "config.json").read_text())
    assert result.paths == (tmp_path / "out",)
    assert result.n_bytes == sum(t.numel() * t.element_size() for t in after.values())


@pytest.mark.parametrize("prefix", ["", "model."], ids=["as published", "as transformers 5 calls it"])
def test_the_package_takes_just_those_layers_for_4_bits(tmp_path: Path, prefix: str) -> None:
    """By the rules of config.json, told of every matrix as a linear layer."""
    checkpoint = write_checkpoint(tmp_path / "c")
    quantize(checkpoint, tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    ignore = QuantizationConfig.model_validate(config).ignore or []
    packed = {n.removesuffix(".weight_packed") for n in tensors_of(tmp_path / "out") if n.endswith("_packed")}
    layer, taken = nn.Linear(1, 1), set()
    for name, tensor in tensors_of(checkpoint).items():
        stem = name.removesuffix(".weight")
        if tensor.ndim == 2 and "embed" not in name and is_match(prefix + stem, layer, ["Linear"], ignore):
            taken.add(stem)
    assert taken == packed


def test_transformers_runs_it(tmp_path: Path) -> None:
    """Its matrices are those of the int4 file to the bit, and its answers near those of the published weights."""
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    quantize(checkpoint, tmp_path / "out", format="compressed-tensors")
    quantize(checkpoint, tmp_path / "m.gguf")
    ids, logits = torch.arange(40, 80)[None], {}
    for name in ("c", "out"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.inference_mode():
            logits[name] = model(ids).logits[0]
    state = model.state_dict()
    ours = dict(packed_matrices(tmp_path / "m.gguf"))
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"].float().numpy()
    for e in range(8):  # it holds experts unpacked, in bf16
        parts = (ours[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up"))
        expected = torch.from_numpy(np.concatenate(list(parts))).bfloat16().float().numpy()
        assert np.array_equal(gate_up[e], expected)
    # Rounding to the nearest of 4 bits leaves 8 % of the weights' size as error, in each of some ten products on the way.
    error = (logits["out"] - logits["c"]).norm() / logits["c"].norm()
    assert 0.02 < error < 0.35


GROUPS = [32, 64, 128, None]


def compress(directory: Path, bits: int, group: int | None, which: tuple[str, ...] = IN_4_BITS) -> None:
    """The checkpoint's matrices of these names become what the package makes of them."""
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "group" if group else "channel"}
    if group:
        weights["group_size"] = group
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    tensors, out = tensors_of(directory), {}
    for name, tensor in tensors.items():
        if name.split(".")[-2] not in which:
            out[name] = tensor
            continue
        grouped = tensor.float().reshape(len(tensor), -1, group or tensor.shape[1])
        scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).bfloat16()
        state = {"weight": tensor.float(), "weight_scale": scale.float()}
        stem = name.removesuffix("weight")
        state = PackedQuantizationCompressor.compress(state, scheme) | {"weight_scale": scale}
        out |= {f"{stem}{part}": t.contiguous() for part, t in state.items()}
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(out, directory / "model.safetensors")
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"]
    ).model_dump(mode="json")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def wide(directory: Path) -> Path:
    """A checkpoint whose matrices have columns in multiples of 128."""
    return write_checkpoint(directory, text=replace(TINY_TEXT, expert_hidden_size=128), vision=None)


@pytest.mark.parametrize("group", GROUPS)
def test_four_bits_are_kept_as_they_are(tmp_path: Path, group: int | None) -> None:
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 4, group)
    quantize(checkpoint, tmp_path / "m.gguf")
    quantize(checkpoint, tmp_path / "q4_0.gguf", to="q4_0")
    theirs = decompressed(checkpoint)
    ours = dict(packed_matrices(tmp_path / "m.gguf"))
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert np.array_equal(weight, theirs[name]), name
    standard = {t.name: t for t in gguf.GGUFReader(tmp_path / "q4_0.gguf").tensors}
    for name, expected in {
        "blk.1.attn_q": theirs["model.layers.1.self_attn.q_proj.weight"],
        "blk.2.ffn_down_exps": np.stack(
            [theirs[f"model.layers.2.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
        ),
    }.items():
        stored = standard[f"{name}.weight"]
        assert stored.tensor_type.name == "Q4_0"
        assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), expected)
    assert dict(tensor_errors(checkpoint, tmp_path / "m.gguf"))["blk.1.ffn_exps.packed"] == 0


def test_eight_bits_are_read_and_rounded(tmp_path: Path) -> None:
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 8, 128)
    theirs = decompressed(checkpoint)
    quantize(checkpoint, tmp_path / "bf16.gguf", to="bf16")
    for tensor in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors:
        if tensor.name == "blk.1.attn_output.weight":
            expected = torch.from_numpy(theirs["model.layers.1.self_attn.o_proj.weight"]).bfloat16()
            back = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(back, expected.float().numpy())
            break
    else:
        raise AssertionError("o is missing")
    quantize(checkpoint, tmp_path / "m.gguf")
    assert 0.07 < dict(tensor_errors(checkpoint, tmp_path / "m.gguf"))["blk.1.ffn_exps.packed"] < 0.09


def test_keys_and_values_in_4_bits_are_read_too(tmp_path: Path) -> None:
    """kv_b is taken apart by heads, and keys are turned round, so it goes through floats."""
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 4, 32, ("kv_b_proj",))
    quantize(checkpoint, tmp_path / "m.gguf")
    errors = dict(tensor_errors(checkpoint, tmp_path / "m.gguf"))
    assert 0 < errors["blk.1.attn_k_b.weight"] < 0.008
    assert 0 < errors["blk.1.attn_v_b.weight"] < 0.008


def test_calibrating_rounds_what_is_not_in_4_bits_yet(tmp_path: Path) -> None:
    """Experts in 4 bits, as Kimi-K2-Thinking has them; attention and the head are left to be rounded."""
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 4, 32, ("gate_proj", "up_proj", "down_proj"))
    quantize(checkpoint, tmp_path / "plain.gguf")
    quantize(checkpoint, tmp_path / "m.gguf", sample=sample)
    plain, calibrated = (dict(packed_matrices(tmp_path / n)) for n in ("plain.gguf", "m.gguf"))
    for name, weight in decompressed(checkpoint).items():
        assert np.array_equal(calibrated[name], weight), name
    for name in ("q_proj", "o_proj"):
        at = f"model.layers.1.self_attn.{name}.weight"
        assert not np.array_equal(calibrated[at], plain[at])


def test_three_bits_of_four_are_warned_of(tmp_path: Path) -> None:
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 4, 32)
    with pytest.warns(KimiLiteWarning, match="4 bits already; --to int4 keeps them as they are"):
        quantize(checkpoint, tmp_path / "m.gguf", to="int3", sample=sample)
    errors = dict(tensor_errors(checkpoint, tmp_path / "m.gguf"))
    assert errors["blk.1.ffn_exps.packed"] > 0.1
    assert errors["blk.1.ffn_shexp.packed"] == 0


def edited(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj."


def with_part(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}{part}"] = make(tensors[f"{Q}weight_scale"])

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            with_part("weight_zero_point", lambda s: s.int()),
            "expected symmetric rounding with columns in order",
        ),
        (with_part("weight_g_idx", lambda s: s.int()), "expected symmetric rounding with columns in order"),
        (
            lambda t: t.pop(f"{Q}weight_scale"),
            r"q_proj\.weight_scale is missing; the checkpoint is incomplete",
        ),
        (
            with_part("weight_packed", lambda s: torch.zeros(512, 24, dtype=torch.int32)),
            r"q_proj\.weight_packed is I32 \[512, 24\]; expected I32 \[512, 32\] \(4 bits\) or \[512, 64\] \(8 bits\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}),
            r"model\.norm\.weight is stored as I32, expected one of BF16, F16, F32",
        ),
        (with_part("weight_scale", lambda s: s[:, :3].clone()), "expected a float for every 32 channels of"),
        (with_part("weight_scale", lambda s: s.repeat(1, 2)), "or for a multiple of 32"),
        (with_part("weight_scale", lambda s: s * float("nan")), "a scale is not a finite number"),
        (with_part("weight_scale", lambda s: s.float() * 1e9), "a scale is too large for float16"),
    ],
)
def test_a_form_that_is_not_read_is_one_sentence(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    checkpoint = wide(tmp_path / "c")
    compress(checkpoint, 4, 32)
    edited(checkpoint, edit)
    with pytest.raises(ModelFileError, match=says):
        quantize(checkpoint, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"quant_method": "fp8", "fmt": "e4m3"},
            "quantized as 'fp8' in the format None; expected the published",
        ),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "the format 'float-quantized'"),
        ("awq", "quantized as None"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_another_quantized_checkpoint_is_one_sentence(
    tmp_path: Path, config: object, says: str, inside: bool
) -> None:
    path = write_checkpoint(tmp_path / "c") / "config.json"
    whole = json.loads(path.read_text())
    (whole["text_config"] if inside else whole)["quantization_config"] = config
    path.write_text(json.dumps(whole))
    with pytest.raises(ModelFileError, match=says):
        quantize(tmp_path / "c", tmp_path / "m.gguf")


def test_where_it_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)

    def says(
        error: type[KimiLiteError], match: str, out: str, source: Path = checkpoint, **options: Any
    ) -> None:
        with pytest.raises(error, match=match):
            quantize(source, tmp_path / out, format="compressed-tensors", **options)

    says(UsageError, "--format compressed-tensors does not hold int3", "out", to="int3")
    says(UsageError, "c exists already; give the name of a new directory", "c")
    says(ModelFileError, r"the directory .*nowhere does not exist", "nowhere/out")
    quantize(checkpoint, tmp_path / "done", format="compressed-tensors")
    says(UsageError, "done is in compressed-tensors form already; copy it", "again", tmp_path / "done")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    says(DoesNotFitError, r"out: needs [\d,]+ bytes, but .* has 1,000 free", "out")
    assert {p.name for p in tmp_path.iterdir()} == {"c", "done"}


def test_what_is_interrupted_leaves_nothing_and_an_empty_directory_may_be_there(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    (tmp_path / "out").mkdir()

    def stop(name: str, done: int, total: int) -> None:
        assert done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, tmp_path / "out", format="compressed-tensors", progress=stop)
    assert {p.name for p in tmp_path.iterdir()} == {"c", "out"}
    assert not any((tmp_path / "out").iterdir())
    quantize(checkpoint, tmp_path / "out", format="compressed-tensors")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_shards_are_cut_between_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    quantize(checkpoint, tmp_path / "one", format="compressed-tensors")
    monkeypatch.setattr("kimi_lite.quantize.compressed.SHARD_BYTES", 200_000)
    quantize(checkpoint, tmp_path / "many", format="compressed-tensors")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 5
    assert all(path.name.endswith(f"-of-{len(shards):05d}.safetensors") for path in shards)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_command_line_writes_and_reads_it(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", vision=None)
    done = command(
        "quantize", str(checkpoint), str(tmp_path / "out"), "--format", "compressed-tensors", "--verify"
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "out")), done.stderr
    assert "0.0000%  output.weight" in done.stderr
    assert "8.3" in next(line for line in done.stderr.splitlines() if line.endswith("blk.1.ffn_exps.packed"))
    done = command("quantize", str(tmp_path / "out"), str(tmp_path / "m.gguf"))
    assert done.returncode == 0, done.stderr
    done = command("quantize", str(checkpoint), str(tmp_path / "out"), "--format", "compressed-tensors")
    assert done.returncode == 2
    assert done.stderr.endswith("out exists already; give the name of a new directory\n")
