"""Configuration files: every key accounted for, and one sentence for what cannot be honoured."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_lite.errors import KimiLiteWarning, ModelFileError
from kimi_lite.formats.config import ModelConfig, TextConfig
from kimi_lite.formats.vocab import Vocab
from kimi_lite.runtime.reference.random_checkpoint import TINY_TEXT, TINY_VISION, write_checkpoint

PUBLISHED_GGUF = {  # Kimi-VL-A3B, as llama.cpp's converter writes it
    "deepseek2.block_count": 27,
    "deepseek2.context_length": 131072,
    "deepseek2.embedding_length": 2048,
    "deepseek2.feed_forward_length": 11264,
    "deepseek2.attention.head_count": 16,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.rope.freq_base": 800000.0,
    "deepseek2.attention.layer_norm_rms_epsilon": 1e-05,
    "deepseek2.expert_count": 64,
    "deepseek2.expert_used_count": 6,
    "deepseek2.expert_group_count": 1,
    "deepseek2.expert_group_used_count": 1,
    "deepseek2.expert_gating_func": 2,
    "deepseek2.leading_dense_block_count": 1,
    "deepseek2.vocab_size": 163840,
    "deepseek2.attention.kv_lora_rank": 512,
    "deepseek2.attention.key_length": 576,
    "deepseek2.attention.value_length": 512,
    "deepseek2.attention.key_length_mla": 192,
    "deepseek2.attention.value_length_mla": 128,
    "deepseek2.expert_feed_forward_length": 1408,
    "deepseek2.expert_shared_count": 2,
    "deepseek2.expert_weights_scale": 2.446,
    "deepseek2.expert_weights_norm": True,
    "deepseek2.rope.dimension_count": 64,
}


def test_a_checkpoint_directory_gives_the_sizes_it_was_made_with(tmp_path: Path) -> None:
    config = ModelConfig.from_hf_dir(write_checkpoint(tmp_path))
    assert config.text == TINY_TEXT
    assert config.vision == TINY_VISION
    assert config.image is not None
    assert config.image.token_limit == 4096
    assert config.text.softmax_scale == 128**-0.5


def test_moonlight_keeps_its_keys_at_the_top(tmp_path: Path) -> None:
    config = ModelConfig.from_hf_dir(write_checkpoint(tmp_path, vision=None))
    assert config.vision is None
    assert config.text == TINY_TEXT
    assert config.text_prefix == ""


def test_the_published_gguf_keys_are_read_and_written_as_they_are() -> None:
    config = TextConfig.from_gguf({"general.architecture": "deepseek2", **PUBLISHED_GGUF}, "file")
    assert (config.nope_dim, config.rope_dim, config.value_dim, config.kv_rank) == (128, 64, 128, 512)
    assert config.gguf_metadata() == PUBLISHED_GGUF


def test_the_older_gguf_form_means_the_same_model() -> None:
    older = {k: v for k, v in PUBLISHED_GGUF.items() if not k.endswith("_mla")}
    older |= {"deepseek2.attention.head_count_kv": 16}
    older |= {"deepseek2.attention.key_length": 192, "deepseek2.attention.value_length": 128}
    new = TextConfig.from_gguf({"general.architecture": "deepseek2", **PUBLISHED_GGUF}, "file")
    assert TextConfig.from_gguf({"general.architecture": "deepseek2", **older}, "file") == new


def edited(directory: Path, edit: Callable[[dict[str, Any]], object], name: str = "config.json") -> Path:
    path = write_checkpoint(directory) / name
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(model_type="llava"), "'llava'; expected 'kimi_vl'"),
        (lambda c: c["text_config"].update(q_lora_rank=1536), "q_lora_rank is 1536"),
        (lambda c: c["text_config"].update(scoring_func="softmax"), "scoring_func is 'softmax'"),
        (lambda c: c["text_config"].update(rope_scaling={"type": "yarn", "factor": 4}), "rope_scaling"),
        (lambda c: c["text_config"].update(tie_word_embeddings=True), "tie_word_embeddings is True"),
        (lambda c: c["text_config"].update(num_key_value_heads=1), "num_key_value_heads"),
        (lambda c: c["text_config"].update(hidden_size="wide"), "hidden_size is 'wide'"),
        (lambda c: c["text_config"].update(num_experts_per_tok=99), "99 active experts of 8"),
        (lambda c: c["text_config"].pop("kv_lora_rank"), "'kv_lora_rank' is missing"),
        (lambda c: c["vision_config"].update(merge_kernel_size=[1, 2]), "merge_kernel_size"),
        (lambda c: c.pop("vision_config"), "'vision_config' is missing"),
    ],
)
def test_what_cannot_be_honoured_is_one_sentence(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(ModelFileError, match=says) as caught:
        ModelConfig.from_hf_dir(edited(tmp_path, edit))
    assert str(tmp_path) in str(caught.value) or "experts" in says
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(image_mean=0.5), "image_mean is 0.5; expected three numbers"),
        (lambda c: c.update(image_mean="123"), "image_mean is '123'; expected three numbers"),
        (lambda c: c.update(image_mean=[0.5, 0.5]), "expected three numbers"),
        (lambda c: c.update(image_mean=[0.5, 0.5, None]), "expected three numbers"),
        (lambda c: c.update(image_std=[0.5, 0.5, 0]), "expected three positive numbers"),
        (lambda c: c.update(image_std=[0.5, 0.5, float("nan")]), "expected three positive numbers"),
        (lambda c: c.update(in_token_limit="x" * 1000), "in_token_limit is 'x{79}; expected"),
    ],
)
def test_an_image_processor_that_is_none_is_one_sentence(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(ModelFileError, match=rf"preprocessor_config\.json: .*{says}"):
        ModelConfig.from_hf_dir(edited(tmp_path, edit, "preprocessor_config.json"))


ANYTHING: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**30,
    10**400,
    -0.5,
    3.5,
    float("nan"),
    1e308,
    "",
    "x",
    "1",
    [],
    [[]],
    {},
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each object or list of a JSON value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


@pytest.mark.filterwarnings("ignore:.*ignoring unknown keys")
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_whatever_stands_at_whatever_place_is_taken_or_one_sentence(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path) / name
    config = json.loads(path.read_text())
    said = []
    for inside, key in places(config):
        good = inside[key]
        for inside[key] in ANYTHING:
            path.write_text(json.dumps(config))
            try:
                Vocab.from_hf_dir(tmp_path, ModelConfig.from_hf_dir(tmp_path).text.vocab_size)
            except ModelFileError as error:
                said.append(str(error))
        inside[key] = good
    assert len(said) > len(ANYTHING)
    assert [text for text in said if "\n" in text or len(text) > 400 + len(str(path))] == []


def test_an_unknown_key_is_named_and_left(tmp_path: Path) -> None:
    directory = edited(tmp_path, lambda c: c["text_config"].update(brand_new_key=1))
    with pytest.warns(KimiLiteWarning, match="brand_new_key"):
        ModelConfig.from_hf_dir(directory)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "\x00\xff"])
def test_a_configuration_that_is_no_json_object_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileError, match=r"config\.json"):
        ModelConfig.from_hf_dir(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"general.architecture": "llama"}, "'llama'; expected 'deepseek2'"),
        ({"deepseek2.expert_gating_func": 1}, "expert_gating_func is 1"),
        ({"deepseek2.expert_weights_norm": False}, "expert_weights_norm"),
        ({"deepseek2.attention.q_lora_rank": 1536}, "q_lora_rank"),
        ({"deepseek2.rope.scaling.type": "yarn"}, "scaled rotary"),
        ({"deepseek2.block_count": "many"}, "block_count is 'many'"),
    ],
)
def test_a_gguf_of_another_model_is_one_sentence(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        TextConfig.from_gguf({"general.architecture": "deepseek2", **PUBLISHED_GGUF, **change}, "file.gguf")
