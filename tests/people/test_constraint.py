"""Answers that must be JSON of a schema, or match an expression, judged by `json` and `re`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import command

import kimi_lite
from kimi_lite.errors import UsageError
from kimi_lite.runtime.constraint import Constraint
from kimi_lite.runtime.sampling import Sampler, SamplingOptions

SUM = "What is 38 + 47?"
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": -9999, "maximum": 9999},
        "parity": {"enum": ["even", "odd", "◁/think▷"]},
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["sum", "parity", "steps"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load(context=1024, vram=0)


def deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


def conforms(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and list(data) == ["sum", "parity", "steps"]
        and type(data["sum"]) is int
        and abs(data["sum"]) <= 9999
        and data["parity"] in ("even", "odd", "◁/think▷")
        and len(data["steps"]) <= 3
        and all(isinstance(step, str) and len(step) <= 12 for step in data["steps"])
    )


@pytest.mark.parametrize("question", [SUM, "Who are you?", 'Reverse "planet".'])
def test_an_answer_is_json_of_the_schema_whatever_is_drawn(model: kimi_lite.Model, question: str) -> None:
    for seed in range(6):
        options = SamplingOptions(temperature=1.5 * (seed > 0), seed=seed)
        answer = model.ask(question, schema=SCHEMA, options=options, max_tokens=400)
        assert answer.reason == "stop", answer
        assert conforms(answer.data), answer
        assert answer.data == json.loads(answer.text)


def test_thinking_stays_what_it_is_without_a_schema(model: kimi_lite.Model) -> None:
    free, held = model.ask(SUM), model.ask(SUM, schema=json.dumps(SCHEMA))
    assert free.thinking
    assert free.data is None
    assert held.thinking == free.thinking
    assert conforms(held.data)
    # A chain that the budget closes, at whatever token, is followed by such an answer too.
    for budget in range(1, 8):
        cut = model.ask(SUM, schema=SCHEMA, thinking_budget=budget)
        assert free.thinking.startswith(cut.thinking)
        assert len(cut.thinking) < len(free.thinking)
        assert conforms(cut.data), cut


@pytest.mark.parametrize(
    "regex", [r"(yes|no), [a-z]{1,8}\.", r"a/b|c\/d", r"[^\x00-~]{2}", r"[a-c]{3}\t ", "◁/?think▷!?"]
)
def test_an_answer_matches_an_expression_as_a_whole(model: kimi_lite.Model, regex: str) -> None:
    for seed in range(4):
        options = SamplingOptions(temperature=2.0 * (seed > 0), seed=seed)
        answer = model.ask("Who are you?", regex=regex, options=options, max_tokens=200)
        assert answer.reason == "stop"
        assert answer.data is None
        assert re.fullmatch(regex.replace(r"\/", "/"), answer.text) or regex.startswith("◁"), answer


class Receipt:
    """What a pydantic model offers, as far as it is asked for."""

    def __init__(self, total: int) -> None:
        self.total = total

    @staticmethod
    def model_json_schema() -> Mapping[str, Any]:
        return {
            "type": "object",
            "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 999}},
            "required": ["total"],
        }

    @classmethod
    def model_validate_json(cls, text: str) -> "Receipt":
        return cls(**json.loads(text))


def test_objects_have_the_properties_that_are_named_unless_the_schema_says_more(
    model: kimi_lite.Model,
) -> None:
    named = {
        "type": "object",
        "properties": {"properties": {"const": {"properties": {"a": 1}}}},
        "required": ["properties"],
    }
    for seed in range(5):
        options = SamplingOptions(temperature=1.5 * (seed > 0), seed=seed)
        held = model.ask("Who are you?", schema=named, options=options, max_tokens=300)
        assert held.data == {"properties": {"properties": {"a": 1}}}, held
    tokenizer = model.engine.tokenizer
    wide = {**named, "additionalProperties": {"type": "boolean"}}
    for schema, more in ((named, False), (wide, True), ({"allOf": [named, {"type": "object"}]}, True)):
        constraint = Constraint(tokenizer, schema=schema)
        for token in tokenizer.encode('{"properties": {"properties": {"a": 1}}'):
            assert constraint.allowed()[token]
            constraint.accept(token)
        assert constraint.allowed()[tokenizer.encode(",")[0]] == more, schema
        assert constraint.allowed()[tokenizer.encode("}")[0]]


def test_a_pydantic_model_is_a_schema_and_gets_an_instance(model: kimi_lite.Model) -> None:
    data = model.ask(SUM, schema=Receipt).data
    assert isinstance(data, Receipt)
    assert 0 <= data.total <= 999


def test_a_complete_answer_ends_by_itself_and_one_that_is_cut_off_is_no_data(model: kimi_lite.Model) -> None:
    whole = model.ask(SUM, schema=Receipt)
    exact = model.ask(SUM, schema=Receipt, max_tokens=whole.stats.tokens)
    assert (exact.reason, exact.text) == ("stop", whole.text)
    short = model.ask(SUM, schema=Receipt, max_tokens=whole.stats.tokens - 1)
    assert (short.reason, short.data) == ("length", None)
    assert whole.text.startswith(short.text)
    cut = model.ask("Who are you?", schema={"type": "object", "required": ["a"]}, max_tokens=2)
    assert cut.reason == "length"
    assert cut.data is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schema": "{"}, "not JSON"),
        ({"schema": "[" * 100_000}, "not JSON"),
        ({"schema": deep(5_000)}, "nested too deeply"),
        ({"schema": {"const": {1, 2}}}, "holds what JSON cannot"),
        ({"schema": "[1]"}, "expected a JSON object"),
        ({"schema": 7}, "expected a JSON object"),
        ({"schema": {"type": "colour"}}, "schema cannot be followed"),
        ({"schema": {"$ref": "https://example.com/schema.json"}}, "schema cannot be followed"),
        ({"schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "schema cannot be followed"),
        ({"schema": {"enum": ["x" * (1 << 20)]}}, "at most 1,048,576"),
        ({"regex": "("}, "expression cannot be followed"),
        ({"regex": "(?=a)b"}, "expression cannot be followed"),
        ({"regex": "a", "schema": {}}, "one of them"),
    ],
)
def test_what_cannot_be_followed_is_said_at_once(
    model: kimi_lite.Model, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        model.ask(SUM, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=says):
        next(model.chat(SUM, **arguments))
    assert model.conversation.messages == []


def test_ask_takes_a_schema_from_a_file_or_the_line(tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    done = command("ask", "-q", "--schema", str(file), SUM)
    assert done.returncode == 0
    assert conforms(json.loads(done.stdout))
    reply = json.loads(command("ask", "-q", "--json", "--schema", json.dumps(SCHEMA), SUM).stdout)
    assert reply["data"] == json.loads(reply["answer"]) == json.loads(done.stdout)
    assert "data" not in json.loads(command("ask", "-q", "--json", SUM).stdout)
    assert re.fullmatch("[0-9]{2}", command("ask", "-q", "--regex", "[0-9]{2}", SUM).stdout.strip())
    cut = command("ask", "-q", "--json", "--max-tokens", "2", "--schema", str(file), SUM)
    assert cut.returncode == 7
    assert json.loads(cut.stdout)["data"] is None
    gone = command("ask", "-q", "--schema", str(tmp_path / "none.json"), SUM)
    assert gone.returncode == 2
    assert gone.stderr.startswith("kimi-lite: --schema")
    assert len(gone.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 5.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.999}],
)
def test_only_tokens_that_are_allowed_are_drawn(options: dict[str, Any]) -> None:
    logits_V = np.linspace(9, -9, 50).astype(np.float32)
    allowed_V = np.zeros(64, np.bool_)  # of padded logits
    allowed_V[[7, 31, 49]] = True
    sampler = Sampler(SamplingOptions(seed=0, repetition_penalty=1.2, presence_penalty=1.0, **options), 50)
    drawn = {sampler.draw(logits_V, [3, 7], allowed_V) for _ in range(300)}
    assert drawn <= {7, 31, 49}
    assert drawn == {7, 31, 49} or options.get("temperature") != 5.0
