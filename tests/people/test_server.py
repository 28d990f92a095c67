"""`kimi-lite serve` as a server: who may ask, how much, how many at once, and what becomes of an answer whose reader leaves."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import command
from http_server import ASK, NAME, QUESTION, WAIT_S, Running, endless, running, shown

import kimi_lite
from kimi_lite import server
from kimi_lite.errors import UsageError


@pytest.fixture(scope="module")
def model() -> kimi_lite.Model:
    return kimi_lite.load(vram=0)


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


def test_a_question_between_two_turns_makes_nothing_be_read_again() -> None:
    """As programs do that ask for a title of the chat; without memory for it, or with too little, the chat is read anew."""
    turn = [{"role": "user", "content": "One, two, three, and so on. " * 12 + QUESTION}]
    title = [{"role": "user", "content": "A title for this chat, please. " * 12}]
    for memory, known in ((), True), (("--cache-ram", "0"), False), (("--cache-ram", "10k"), False):
        with running(*memory) as one:
            asked = one.client().chat.completions.create
            first = asked(model=NAME, messages=turn)
            asked(model=NAME, messages=title)
            said = [*turn, {"role": "assistant", "content": first.choices[0].message.content}, *ASK]
            again = asked(model=NAME, messages=said).usage
            n_known, n_first = again.prompt_tokens_details.cached_tokens, first.usage.prompt_tokens
            assert n_first > 80
            assert (n_known >= n_first - 1) == known, (n_known, n_first)


def test_memory_for_conversations_is_for_our_own_engine() -> None:
    other = SimpleNamespace(engine=SimpleNamespace(path=Path("model.gguf")))
    with pytest.raises(UsageError, match="--cache-ram is for kimi-lite's own engine; leave it out"):
        server.Service(other, cache_ram=1000)  # type: ignore[arg-type]
    assert server.Service(other).cache_ram is None  # type: ignore[arg-type]


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
        (
            ("--cache-ram", "lots"),
            "--cache-ram is 'lots'; give a size such as 8G, 1.5G or 800M, or 0 for none",
        ),
    ):
        done = command("serve", *arguments)
        assert done.returncode == 2, arguments
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "is empty" in command("serve", KIMI_LITE_API_KEY=" ").stderr
    for option, least in (("--max-tokens", 1), ("--thinking-budget", 0)):  # this one once the model is there
        done = command("serve", "--port", "0", option, str(least - 1))
        assert (done.returncode, done.stderr.count("\n")) == (2, 2)
        assert f"is {least - 1}; expected at least {least}" in done.stderr


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
