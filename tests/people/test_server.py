"""`kimi-lite serve` as programs meet it: asked by OpenAI's own client, and by clients that do everything wrong."""

import asyncio
import base64
import http.client
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from commands import command
from pydantic import BaseModel

import kimi_lite
from kimi_lite import server
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message

NAME = "kimi-vl-nano-int4"
QUESTION = 'Reverse "planet".'
ASK = [{"role": "user", "content": QUESTION}]
WAIT_S = 60.0  # for what comes at once: a test that needs it all has failed


class Running:
    """A server in a process of its own, and what it says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self._lines = process, queue.Queue[str]()
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.said(r"answers at http://127\.0\.0\.1:(\d+)/v1")[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)

    def said(self, expression: str) -> "re.Match[str]":
        """The next line that matches."""
        while True:
            if found := re.search(expression, self._lines.get(timeout=WAIT_S)):
                return found

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def send(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and the body read as JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)) as connection:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            kind = {"content-type": "application/json"} if data is not None else {}
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {**kind, **named})
            reply = connection.getresponse()
            return reply.status, dict(reply.headers), json.loads(reply.read() or b"null")

    def wait_for(self, n: int) -> None:
        """Until so many requests run or wait."""
        until = time.monotonic() + WAIT_S
        while (found := self.send("GET", "/health")[2]["running_or_waiting"]) != n:
            assert time.monotonic() < until, f"{found} requests run or wait, not {n}"

    def begin(self, body: object) -> socket.socket:
        """A request whose answer is read by whoever likes to, through the socket."""
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection


def heard() -> None:
    """In the new process: who started the tests in the background may have had SIGINT ignored, which is passed on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_lite", "serve", "--port", "0", "--vram", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=heard,
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def nano() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(nano: Running) -> Iterator[Any]:
    with nano.client() as found:
        yield found


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load(vram=0)


def endless(model: kimi_lite.Model, **more: object) -> dict[str, object]:
    """A request whose answer fills the context, which takes seconds, because what would end it is forbidden."""
    return {
        "messages": ASK,
        "stream": True,
        "logit_bias": {str(token): -1e9 for token in model.engine.stop_ids},
        **more,
    }


def uri(colour: str) -> str:
    data = io.BytesIO()
    scene(colour, "circle", 1, (3, 3), np.random.default_rng(1))[0].save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def shown(colour: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": uri(colour), "detail": "high"}}


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


def test_pages_in_a_browser_cannot_use_it(nano: Running) -> None:
    for host in ("evil.test", "evil.test:80", "127.0.0.1.evil.test", "[::2]:80", ""):
        assert nano.send("GET", "/v1/models", host=host)[0] == 403, host
    for host in ("LOCALHOST", "127.0.0.1:1", "[::1]:8080"):
        assert nano.send("GET", "/v1/models", host=host)[0] == 200, host
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        got, _, reply = nano.send("POST", "/v1/chat/completions", {"messages": ASK}, content_type=kind)
        assert got == 415, kind
        assert "expected application/json" in reply["error"]["message"]
    got, headers, _ = nano.send(
        "OPTIONS", "/v1/chat/completions", origin="http://evil.test", access_control_request_method="POST"
    )
    assert got == 405
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_body_beyond_the_bound_is_not_taken(nano: Running) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    declared = f"Content-Length: {server.MAX_BODY + 1}\r\n\r\n"
    for lines, body in ((declared, b"{"), ("Transfer-Encoding: chunked\r\n\r\n", None)):
        with socket.create_connection(("127.0.0.1", nano.port), timeout=WAIT_S) as connection:
            connection.sendall((head + lines).encode() + (body or b""))
            if body is None:
                piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
                try:
                    for _ in range(server.MAX_BODY // 0x100000 + 2):
                        connection.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it hung up on us, which will do
            assert b" 413 " in connection.recv(1 << 16)


def test_a_key_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sésame\n", encoding="utf-8")
    for arguments, environment, key in (
        ((), {"KIMI_LITE_API_KEY": "open"}, "open"),
        (("--api-key-file", str(tmp_path / "key")), {"KIMI_LITE_API_KEY": "other"}, "sésame"),
    ):
        with running(*arguments, **environment) as guarded:
            for given in ({}, {"authorization": "Bearer opem"}, {"authorization": "open"}):
                got, headers, reply = guarded.send("GET", "/v1/models", **given)
                assert (got, reply["error"]["type"]) == (401, "authentication_error")
                assert headers["www-authenticate"] == "Bearer"
            sent = {"authorization": f"Bearer {key}".encode().decode("latin-1")}
            assert guarded.send("GET", "/v1/models", **sent)[0] == 200
            assert guarded.send("GET", "/v1/models", host="box.example", **sent)[0] == 200
            assert guarded.send("GET", "/health")[0] == 200


def test_what_cannot_be_listened_to_is_said_before_a_model_is_opened(nano: Running, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for arguments, text in (
        (("--host", "0.0.0.0"), "other machines could ask without a key"),
        (("--port", str(nano.port)), "cannot be listened to"),
        (("--port", "65536"), "a port is 0 to 65535"),
        (("--host", "no.such.name.invalid"), "cannot be listened to"),
        (("--api-key-file", str(tmp_path / "empty")), "is empty"),
        (("--api-key-file", str(tmp_path / "none")), "cannot be read"),
    ):
        done = command("serve", *arguments)
        assert done.returncode == 2, arguments
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "is empty" in command("serve", KIMI_LITE_API_KEY=" ").stderr


def test_work_stops_when_its_reader_leaves(nano: Running, model: kimi_lite.Model) -> None:
    long_prompt = [{"role": "user", "content": "a b " * 3000}]
    for body, read_first in (
        (endless(model), True),  # in the middle of an answer
        (endless(model, stream=False), False),  # which nobody has seen anything of
        (endless(model, messages=long_prompt), False),  # in the prompt, perhaps
    ):
        with closing(nano.begin(body)) as connection:
            if read_first:
                raw = b""
                while raw.count(b"data:") < 3:
                    raw += connection.recv(1 << 10)
        nano.said("no answer: whoever asked has left")
        got, _, reply = nano.send("POST", "/v1/chat/completions", {"messages": ASK})
        assert (got, reply["choices"][0]["message"]["content"]) == (200, model.ask(QUESTION).text)
        nano.said(r"tokens read .* written")
    assert nano.send("GET", "/health")[2] == {"status": "ok", "running_or_waiting": 0}


def test_a_line_has_an_end(nano: Running, model: kimi_lite.Model) -> None:
    body = endless(model)
    waiting = [nano.begin(body) for _ in range(server.MAX_WAITING + 1)]
    nano.wait_for(server.MAX_WAITING + 1)
    got, headers, reply = nano.send("POST", "/v1/chat/completions", {"messages": ASK})
    assert (got, headers["retry-after"]) == (503, "10")
    assert "wait already" in reply["error"]["message"]
    for connection in waiting:
        connection.close()
    nano.wait_for(0)
    assert nano.send("POST", "/v1/chat/completions", {"messages": ASK})[0] == 200


def test_several_at_once_each_get_their_own_answer(client: Any, model: kimi_lite.Model) -> None:
    questions = [f'Reverse "{word}".' for word in ("planet", "garden", "silver", "window")]

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return str(client.chat.completions.create(model=NAME, messages=messages).choices[0].message.content)

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(ask, questions))
    assert got == [model.ask(question).text for question in questions]
    assert len(set(got)) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM that a process could hear")
def test_what_runs_is_said_to_its_end_before_the_server_leaves(model: kimi_lite.Model) -> None:
    with running() as leaving:
        with closing(leaving.begin(endless(model, max_tokens=1500))) as connection:
            raw = connection.recv(1 << 10)
            leaving.process.send_signal(signal.SIGTERM)
            while piece := connection.recv(1 << 16):
                raw += piece
        assert b"data: [DONE]" in raw
        assert b'"finish_reason":"length"' in raw
        assert leaving.process.wait(WAIT_S) == -signal.SIGTERM
        with pytest.raises(OSError, match="refused"):
            leaving.begin({"messages": ASK})
    with running() as interrupted:
        interrupted.wait_for(0)
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.process.wait(WAIT_S) == 130


class Scripted:
    """What a service asks of a model, said by a script."""

    def __init__(self, script: Callable[[], Iterator[kimi_lite.Event]], path: Path) -> None:
        self.script = script
        self.engine = type("Engine", (), {"path": path, "context": 100})()

    def reply(self, messages: object, **arguments: object) -> Iterator[kimi_lite.Event]:
        return self.script()


class Busy(Scripted):
    """A model that reads or looks for as long as it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: iter(()), path)

    def encode(self, sources: object, on_progress: Callable[..., None]) -> list[Any]:
        while True:
            on_progress(0.5)

    def reply(self, messages: object, **arguments: Any) -> Iterator[kimi_lite.Event]:
        while True:
            arguments["on_progress"](1, 2)
        yield


async def answered(app: Any, body: object, *, leaves: bool = False) -> tuple[int, bytes]:
    """Status and body of one chat completion, without a network."""
    sent: list[Any] = []
    came = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        if came:
            return came.pop()
        if leaves:
            return {"type": "http.disconnect"}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": headers,
    }
    with suppress(RuntimeError):  # a bug goes on to whoever writes the log, after it was answered
        await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def test_a_stream_lives_through_silence_and_says_how_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.01)
    go_on = threading.Event()

    def fails(error: Exception, late: bool) -> Callable[[], Iterator[kimi_lite.Event]]:
        def script() -> Iterator[kimi_lite.Event]:
            if late:
                assert go_on.wait(WAIT_S)
                yield kimi_lite.Event("answer", "so far")
            raise error

        return script

    (tmp_path / "toy.gguf").touch()
    for error, status, text in (
        (kimi_lite.UsageError("too long"), 400, "too long"),
        (kimi_lite.DoesNotFitError("no room"), 503, "no room"),
        (kimi_lite.ModelFileError("NaN"), 500, "NaN"),
        (RuntimeError("a bug"), 500, server.BUG),
    ):
        go_on.clear()
        service = server.Service(Scripted(fails(error, late=False), tmp_path / "toy.gguf"))  # type: ignore[arg-type]
        got, body = asyncio.run(answered(service.app, {"messages": ASK}))
        assert (got, json.loads(body)["error"]["message"]) == (status, text)
        service = server.Service(Scripted(fails(error, late=True), tmp_path / "toy.gguf"))  # type: ignore[arg-type]
        timer = threading.Timer(0.2, go_on.set)
        timer.start()
        got, body = asyncio.run(answered(service.app, {"messages": ASK, "stream": True}))
        timer.join()
        assert got == 200
        assert body.count(b": still reading\n\n") > 1
        _, said, failed, *end = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
        assert b"so far" in said
        assert text in json.loads(failed)["error"]["message"]
        assert end == ([b"[DONE]"] if text != server.BUG else [])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", [QUESTION, [shown("red")]])
def test_neither_a_prompt_nor_a_picture_is_read_for_nobody(
    tmp_path: Path, stream: bool, content: object
) -> None:
    (tmp_path / "toy.gguf").touch()
    service = server.Service(Busy(tmp_path / "toy.gguf"))  # type: ignore[arg-type]
    body = {"messages": [{"role": "user", "content": content}], "stream": stream}
    assert asyncio.run(answered(service.app, body, leaves=True)) == (499, b"")
    service._thread.shutdown()  # which waits for the model's thread


def test_without_its_packages_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from kimi_lite.__main__ import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'kimi-lite[serve]'" in done.stderr
