"""What `kimi-lite serve` answers, asked by OpenAI's own client, and what it says to requests that are wrong."""

import json
import re
from contextlib import closing
from typing import Any

import pytest
from http_server import ASK, NAME, QUESTION, Running, running, shown, uri
from pydantic import BaseModel

import kimi_lite
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load(vram=0)


def test_an_answer_is_what_the_model_says(client: Any, model: kimi_lite.Model) -> None:
    reply, ours = client.chat.completions.create(model=NAME, messages=ASK), model.ask(QUESTION)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ours.text)
    assert choice.message.reasoning_content == ours.thinking != ""
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert reply.usage.prompt_tokens == ours.stats.prompt_tokens
    assert reply.usage.completion_tokens == ours.stats.tokens
    assert reply.usage.total_tokens == ours.stats.prompt_tokens + ours.stats.tokens
    assert reply.object == "chat.completion"
    again = client.chat.completions.create(model=NAME, messages=ASK)
    assert again.choices == reply.choices
    assert again.id != reply.id
    assert again.usage.prompt_tokens_details.cached_tokens == ours.stats.prompt_tokens - 1


def test_a_stream_is_the_answer_in_pieces(client: Any, nano: Running, model: kimi_lite.Model) -> None:
    ours = model.ask(QUESTION)
    asked = {"model": NAME, "messages": ASK, "stream": True}
    chunks = list(client.chat.completions.create(**asked))
    assert all(chunk.object == "chat.completion.chunk" and len(chunk.choices) == 1 for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    thinking = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thinking)) == ours.thinking
    assert "".join(delta.content or "" for delta in deltas) == ours.text
    begun = [bool(delta.content) for delta in deltas]
    assert not any(thinking[begun.index(True) :])  # all of it stands in front
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    *same, last = client.chat.completions.create(**asked, stream_options={"include_usage": True})
    assert len(same) == len(chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], ours.stats.tokens)
    with closing(nano.begin(asked)) as connection:
        raw = b""
        while b"[DONE]" not in raw:
            raw += connection.recv(1 << 16)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head.lower()
    assert b"access-control" not in head.lower()
    assert b"data: [DONE]\n\n" in body


def test_a_conversation_is_the_messages_that_were_sent(client: Any, model: kimi_lite.Model) -> None:
    def ours(*messages: Message) -> str:
        return "".join(event.text for event in model.reply(messages) if event.kind == "answer")

    first, second = "What is 12 + 34?", "Who are you?"
    earlier = ours(Message("user", first))
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": earlier, "reasoning_content": "this is not sent back to the model"},
        {"role": "user", "content": [{"type": "text", "text": second}]},
    ]
    expected = ours(Message("user", first), Message("assistant", earlier), Message("user", second))
    reply = client.chat.completions.create(model=NAME, messages=turns)
    assert reply.choices[0].message.content == expected
    system = Message("system", "Reply in a word.")
    n_with_system = [*model.reply([system, Message("user", first)])][-1].stats
    for role in ("system", "developer"):
        told = [{"role": role, "content": system.content}, turns[0]]
        reply = client.chat.completions.create(model=NAME, messages=told)
        assert n_with_system is not None
        assert reply.usage.prompt_tokens == n_with_system.prompt_tokens
    assert model.conversation.messages == []  # `reply` keeps none


def test_pictures_stand_where_the_message_has_them(client: Any, model: kimi_lite.Model) -> None:
    for colour in ("red", "blue"):
        content = [shown(colour), {"type": "text", "text": "What colour is it?"}]
        reply = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}])
        assert reply.choices[0].message.content == colour
    parts = [{"type": "text", "text": "What colour"}, shown("red"), {"type": "text", "text": " is it?"}]
    reply = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": parts}], logprobs=True
    )
    (picture,) = model.encode([uri("red")])
    *_, done = model.reply([Message("user", ("What colour", picture, " is it?"))], logprobs=0)
    assert done.logprobs is not None
    assert done.stats is not None
    expected = [token.logprob for token in done.logprobs[done.stats.thinking_tokens :]]
    assert [token.logprob for token in reply.choices[0].logprobs.content] == expected


class Sum(BaseModel):
    total: int


def test_an_answer_keeps_to_a_schema_or_an_expression(client: Any) -> None:
    asked = {"model": NAME, "messages": [{"role": "user", "content": "What is 12 + 34?"}], "max_tokens": 200}
    reply = client.chat.completions.parse(**asked, response_format=Sum)
    assert isinstance(reply.choices[0].message.parsed, Sum)
    reply = client.chat.completions.create(
        **asked, response_format={"type": "json_object"}, extra_body={"thinking_budget": 5}
    )
    assert reply.choices[0].finish_reason == "length" or isinstance(
        json.loads(reply.choices[0].message.content), dict
    )
    reply = client.chat.completions.create(**asked, extra_body={"regex": "[a-c]{5}"})
    assert re.fullmatch("[a-c]{5}", reply.choices[0].message.content)


def test_every_setting_arrives(client: Any, model: kimi_lite.Model) -> None:
    def asked(**settings: object) -> tuple[str, str, str]:
        own = ("thinking_budget", "top_k", "min_p", "repetition_penalty")
        extra = {name: settings.pop(name) for name in own if name in settings}
        reply = client.chat.completions.create(model=NAME, messages=ASK, extra_body=extra, **settings)
        message = reply.choices[0].message
        thinking = getattr(message, "reasoning_content", "")
        return thinking, message.content, reply.choices[0].finish_reason

    def ours(options: SamplingOptions | None = None, **settings: Any) -> tuple[str, str, str]:
        answer = model.ask(QUESTION, options=options, **settings)
        return answer.thinking, answer.text, answer.reason

    plain = ours()
    assert asked(max_tokens=8) == asked(max_completion_tokens=8) == ours(max_tokens=8) != plain
    assert asked(thinking_budget=6) == ours(thinking_budget=6) != plain
    assert asked(stop="a") == asked(stop=["zz", "a"]) == ours(stop=("a",)) != plain
    hot = {"temperature": 2.0, "seed": 5}
    drawn = ours(SamplingOptions(temperature=2.0, seed=5))
    assert asked(**hot) == drawn != plain
    for name, value in (
        ("top_p", 0.5),
        ("top_k", 2),
        ("min_p", 0.3),
        ("presence_penalty", 2.0),
        ("repetition_penalty", 1.5),
    ):
        changed = ours(SamplingOptions(**hot, **{name: value}))  # type: ignore[arg-type]
        assert asked(**hot, **{name: value}) == changed != drawn, name
    first = model.ask(QUESTION, logprobs=0).logprobs
    assert first is not None
    bias = {first[0].id: -100.0}
    assert (
        asked(logit_bias={str(k): v for k, v in bias.items()})
        == ours(SamplingOptions(logit_bias=bias))
        != plain
    )


@pytest.mark.parametrize("budget", [None, 6])
def test_logprobs_are_those_of_the_content(client: Any, model: kimi_lite.Model, budget: int | None) -> None:
    extra = {"thinking_budget": budget}
    asked = {"model": NAME, "messages": ASK, "logprobs": True, "top_logprobs": 3, "extra_body": extra}
    (choice,) = client.chat.completions.create(**asked).choices
    ours = model.ask(QUESTION, logprobs=3, thinking_budget=budget)
    assert ours.logprobs is not None
    content = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode().strip() == ours.text
    expected = ours.logprobs[-len(content) :]
    assert [(bytes(t.bytes), t.logprob) for t in content] == [(t.bytes, t.logprob) for t in expected]
    assert [[(bytes(o.bytes), o.logprob) for o in t.top_logprobs] for t in content] == [
        [(o.bytes, o.logprob) for o in t.top] for t in expected
    ]
    *_, last = client.chat.completions.create(**asked, stream=True)
    assert last.choices[0].logprobs.model_dump() == choice.logprobs.model_dump()


BAD: dict[str, tuple[object, int, str]] = {
    "no JSON": (b"{", 400, "cannot be read"),
    "no UTF-8": (b'{"messages": "\xff"}', 400, "cannot be read"),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "cannot be read"),
    "another type": ({"messages": "hello"}, 400, "$.messages"),
    "deep": (b'{"x": ' + b"[" * 100_000, 400, "cannot be read"),
    "not a number": (b'{"messages": [], "temperature": NaN}', 400, "cannot be read"),
    "no messages": ({"messages": []}, 400, "no messages"),
    "a tool's turn": ({"messages": [{"role": "tool", "content": "5"}]}, 400, "$.messages[0].role"),
    "sound": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        400,
        "$.messages[0].content[0].type",
    ),
    "tools": ({"messages": ASK, "tools": [{"type": "function"}]}, 400, "tools"),
    "a call": ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "tools"),
    "two answers": ({"messages": ASK, "n": 2}, 400, "n is 2"),
    "frequency": ({"messages": ASK, "frequency_penalty": 0.5}, 400, "presence_penalty"),
    "cold": ({"messages": ASK, "temperature": -1}, 400, "temperature is -1"),
    "seed": ({"messages": ASK, "temperature": 1, "seed": -1}, 400, "seed is -1"),
    "nothing": ({"messages": ASK, "max_tokens": 0}, 400, "max_tokens is 0"),
    "many logprobs": ({"messages": ASK, "logprobs": True, "top_logprobs": 101}, 400, "expected 0 to 100"),
    "an empty stop": ({"messages": ASK, "stop": [""]}, 400, "a stop text is empty"),
    "bias": ({"messages": ASK, "logit_bias": {"99999999": 1}}, 400, "logit_bias names token 99999999"),
    "schema": (
        {
            "messages": ASK,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}},
        },
        400,
        "the schema cannot be followed",
    ),
    "regex": ({"messages": ASK, "regex": "("}, 400, "the regular expression cannot be followed"),
    "another model": ({"messages": ASK, "model": "gpt-4"}, 404, f"this server has '{NAME}'"),
    "too long": ({"messages": [{"role": "user", "content": "a b " * 9000}]}, 400, "but the context holds"),
    "a broken picture": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}],
                }
            ]
        },
        400,
        "not a picture",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_sentence(nano: Running, name: str, stream: bool) -> None:
    body, status, text = BAD[name]
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    got, _, reply = nano.send("POST", "/v1/chat/completions", body)
    assert got == status
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert text in reply["error"]["message"]
    assert "\n" not in reply["error"]["message"]


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "file:///etc/hostname", "-", "https://192.0.2.1/a.png", "~/a.png", ""]
)
def test_no_request_opens_what_this_machine_has(nano: Running, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    got, _, reply = nano.send(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
    )
    assert got == 400
    assert f"image_url is {url!r}; expected the picture itself" in reply["error"]["message"]


def test_urls_are_fetched_if_the_server_was_told_to() -> None:
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]
    body = {"messages": [{"role": "user", "content": content}]}
    with running("--fetch") as fetching:
        got, _, reply = fetching.send("POST", "/v1/chat/completions", body)
    assert got == 400
    assert "127.0.0.1" in reply["error"]["message"]  # fetch.py's own refusal: not a public address
    assert "data:" not in reply["error"]["message"]


def test_what_is_not_there_says_so_in_the_same_form(nano: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/", 404),
    ):
        got, _, reply = nano.send(method, path)
        assert (got, set(reply["error"])) == (status, {"message", "type", "param", "code"}), path
    got, _, reply = nano.send("GET", f"/v1/models/{NAME}")
    assert (got, reply["id"], reply["context_length"]) == (200, NAME, 8192)
