"""One model behind HTTP, for programs that speak OpenAI's chat completions (chat_completions.py).

    kimi-lite serve model.gguf          then http://127.0.0.1:8080/v1 in any such program

One thread runs the model, one request after the other; those that wait stand in a line of bounded length. Who goes away is noticed
at once, and the model stops within a token, or a layer of the prompt.

A server that anybody can reach answers anybody, so it listens to this machine alone unless a key is set. Pages in a browser
cannot use it either: without a key the name that was asked for must be this machine's (which stops DNS rebinding), a body
must be declared as JSON (which no page may send elsewhere unasked), and no answer allows another origin.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_lite.api import Event, Model, check_limits
from kimi_lite.chat_completions import Asked, Completion, conversation, read
from kimi_lite.errors import DoesNotFitError, KimiLiteError, UsageError
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.prompt_cache import PromptCache
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.vision import EncodedImage

MAX_BODY = 64 << 20  # bytes of a request: every one in line is kept
BODY_S = 60.0  # within which all of it must have come
MAX_WAITING = 16  # requests in line, behind the one that runs
MAX_CONNECTIONS = 128
SILENT_S = 5.0  # after which a stream begins without the model's first word, and lives by comments
CACHE_RAM = 512_000_000  # bytes for conversations that others have pushed out: 31,000 tokens at full size
LEAVING_S = 10  # that answers get to end in, once the server was told to
LOCAL = {"127.0.0.1", "localhost", "::1"}
BUG = "kimi-lite met a bug of its own; its standard error has the traceback"


class GoneError(Exception):
    """Whoever asked has left."""


class Job:
    """A request on its way through the model's thread: events come out, and that nobody waits for them any more goes in."""

    def __init__(self) -> None:
        self._gone = threading.Event()
        self._events = asyncio.Queue[Event | BaseException]()
        self._loop = asyncio.get_running_loop()

    def put(self, event: Event | BaseException) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        self._gone.set()
        self.put(GoneError())

    def go_on(self, *_: object) -> None:
        """Raises GoneError where there is no reason to."""
        if self._gone.is_set():
            raise GoneError

    async def event(self, patience: float | None = None) -> Event | None:
        """The next one, or None if none comes for so many seconds; raises what ended the model's work."""
        try:
            async with asyncio.timeout(patience):
                event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, BaseException):
            raise event
        return event


@dataclass
class Service:
    """An open model and what its requests may do. `app` is the ASGI application. Raises UsageError for limits that cannot be."""

    model: Model
    key: str | None = None
    fetch: bool = False  # pictures that a request names by their URL
    options: SamplingOptions = field(default_factory=SamplingOptions)  # where a request is silent
    max_tokens: int | None = None  # likewise
    thinking_budget: int | None = None  # likewise
    quiet: bool = True  # no line on standard error for each answer
    cache_ram: int | None = None  # bytes for conversations that others have pushed out; by default CACHE_RAM

    def __post_init__(self) -> None:
        check_limits(self.max_tokens, self.thinking_budget)
        engine = self.model.engine
        if isinstance(engine, Engine):
            engine.prompts = PromptCache(CACHE_RAM if self.cache_ram is None else self.cache_ram)
        elif self.cache_ram is not None:
            raise UsageError(
                "--cache-ram is for kimi-lite's own engine; leave it out with --engine llama.cpp"
            )
        self.name = self.model.engine.path.stem
        self._n_jobs = 0  # running or in line
        self._thread = ThreadPoolExecutor(1, "model")
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: Mapping[Any, Any] = {
            HTTPException: _refused,
            KimiLiteError: _failed,
            ClientDisconnect: _unread,
            GoneError: _unread,
            Exception: _bug,
        }
        self.app = Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life), self.key)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok", "running_or_waiting": self._n_jobs})

    async def _models(self, request: Request) -> Response:
        engine = self.model.engine
        entry = {
            "id": self.name,
            "object": "model",
            "created": int(engine.path.stat().st_mtime),
            "owned_by": "kimi-lite",
            "context_length": engine.context,
        }
        if name := request.path_params.get("name"):
            self._check_name(name)
            return _json(entry)
        return _json({"object": "list", "data": [entry]})

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise HTTPException(404, f"there is no model {name[:80]!r} here; this server has {self.name!r}")

    async def _chat(self, request: Request) -> Response:
        if self._n_jobs > MAX_WAITING:
            text = f"{MAX_WAITING} requests wait already; ask again later"
            raise HTTPException(503, text, {"Retry-After": "10"})
        job = Job()
        self._n_jobs += 1
        watch, streams = None, False
        try:
            asked = read(await _body(request))
            self._check_name(asked.model)
            completion = Completion(self.name, asked)
            self._thread.submit(self._answer, asked, job)
            watch = asyncio.create_task(_watch(request, job))
            if asked.stream:
                first = await job.event(SILENT_S)  # what is refused by then has a status of its own
                streams = True
                return Stream(self._chunks(job, completion, first), lambda: self._leave(job))
            while completion.done is None:
                if event := await job.event():
                    completion.add(event)
            return _json(completion.whole())
        finally:
            if watch:
                watch.cancel()  # a stream watches by itself
            if not streams:
                self._leave(job)

    def _leave(self, job: Job) -> None:
        job.leave()
        self._n_jobs -= 1

    async def _chunks(self, job: Job, completion: Completion, event: Event | None) -> AsyncIterator[bytes]:
        """Server-sent events until the answer has ended or failed; what has begun gets no other status, so failing is one of them."""
        yield _sent(completion.opening())
        try:
            while True:
                if event is None:
                    yield b": still reading\n\n"  # so that nobody in between takes the connection for dead
                else:
                    for chunk in completion.chunks(event):
                        yield _sent(chunk)
                if completion.done is not None:
                    break
                event = await job.event(SILENT_S)
        except KimiLiteError as error:
            yield _sent(_error(_status(error), str(error)))
        except Exception:
            yield _sent(_error(500, BUG))
            raise
        yield b"data: [DONE]\n\n"

    def _answer(self, asked: Asked, job: Job) -> None:
        """In the model's thread: all of one answer."""
        started = time.monotonic()
        try:
            job.go_on()
            for event in self._events(asked, job):
                job.go_on()
                job.put(event)
        except GoneError:
            self._say("no answer: whoever asked has left")
        except BaseException as error:
            job.put(error)
            self._say(f"no answer: {error}")
        else:
            stats = event.stats
            assert stats is not None
            self._say(
                f"{stats.prompt_tokens} tokens read ({stats.reused} known), {stats.tokens} written "
                f"({stats.decode_tok_per_s:.1f} tok/s), {time.monotonic() - started:.1f} s"
            )

    def _events(self, asked: Asked, job: Job) -> Iterator[Event]:
        def encode(sources: Sequence[object]) -> list[EncodedImage]:
            return self.model.encode(sources, job.go_on)

        return self.model.reply(
            conversation(asked.messages, encode, self.fetch),
            options=asked.options(self.options),
            max_tokens=_given(asked.max_completion_tokens, asked.max_tokens, self.max_tokens),
            thinking_budget=_given(asked.thinking_budget, self.thinking_budget),
            stop=asked.stops,
            schema=asked.schema,
            regex=asked.regex,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            on_progress=job.go_on,
        )

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(f"kimi-lite: {text}", file=sys.stderr, flush=True)


class Stream(StreamingResponse):
    """Server-sent events, with something to do at their end however they end, even before the first."""

    def __init__(self, chunks: AsyncIterator[bytes], at_end: Any) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


class Guard:
    """What is looked at of every request before anything else is."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self.key is None:
            host = headers.get("host", "")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in LOCAL:
                return _refusal(403, f"the Host header is {host[:80]!r}; expected 127.0.0.1 or localhost")
        elif scope["path"] != "/health":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            known = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
            if scheme.lower() != "bearer" or not known:
                text = "the key is missing or wrong; expected the header Authorization: Bearer KEY"
                return _refusal(401, text, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return _refusal(415, f"the Content-Type is {kind[:80]!r}; expected application/json")
        return None


async def _body(request: Request) -> bytes:
    """What was sent, within bounds of size and time."""
    body, declared = bytearray(), request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > MAX_BODY
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if too_large := too_large or len(body) > MAX_BODY:
                    break
    except TimeoutError:
        raise HTTPException(408, f"the request did not come within {BODY_S:.0f} s") from None
    if too_large:
        raise HTTPException(413, f"the request has more than {MAX_BODY >> 20} MB; send smaller pictures")
    return bytes(body)


async def _watch(request: Request, job: Job) -> None:
    """Lets the job know when nobody waits for it any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.leave()


def _given(*values: int | None) -> int | None:
    """The first that is."""
    return next((value for value in values if value is not None), None)


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _sent(chunk: object) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _error(status: int, text: str) -> dict[str, object]:
    """An error in the format's shape, of which clients want all four keys."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


def _refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json(_error(status, text), status, headers)


def _status(error: KimiLiteError) -> int:
    return 400 if isinstance(error, UsageError) else 503 if isinstance(error, DoesNotFitError) else 500


async def _refused(request: Request, error: HTTPException) -> Response:
    return _refusal(error.status_code, error.detail, error.headers)


async def _failed(request: Request, error: KimiLiteError) -> Response:
    return _refusal(_status(error), str(error))


async def _unread(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _bug(request: Request, error: Exception) -> Response:
    return _refusal(500, BUG)


def read_key(file: Path | None) -> str | None:
    """What requests must carry, from a file or KIMI_LITE_API_KEY: other users of the machine could read an argument.

    Raises UsageError where there is no key in what should hold it.
    """
    if file is None:
        key, where = os.environ.get("KIMI_LITE_API_KEY"), "KIMI_LITE_API_KEY"
    else:
        where = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{where}: cannot be read ({error.strerror}); give a file that holds the key"
            ) from None
        except ValueError:
            raise UsageError(f"{where}: not UTF-8 text; give a file that holds the key") from None
    if key is not None and not key.strip():
        raise UsageError(f"{where} is empty; put a key there that cannot be guessed, or leave it away")
    return None if key is None else key.strip()


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A socket at this address; port 0 takes a free one.

    Raises:
        UsageError: there is no such port or it is taken, the name means nothing, or other machines could reach it without a key.
    """
    where = f"--host {host} --port {port}"
    if not 0 <= port <= 65535:  # the system would take it as another one
        raise UsageError(f"{where}: a port is 0 to 65535, where 0 means a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if key is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UsageError(
                f"{where}: other machines could ask without a key; set one by --api-key-file or in KIMI_LITE_API_KEY"
            )
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who comes before the model is there waits
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where}: cannot be listened to ({reason}); choose another") from None
    return listening


def serve(service: Service, listening: socket.socket) -> None:
    """Answer at a socket until interrupted; answers that run then have LEAVING_S seconds to end in."""
    if hasattr(signal, "SIGPIPE") and threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGPIPE, signal.SIG_IGN
        )  # who hangs up must not end us, as `| head` ends other commands
    config = uvicorn.Config(
        service.app,
        access_log=False,
        lifespan="on",
        limit_concurrency=MAX_CONNECTIONS,
        log_config=None,
        timeout_graceful_shutdown=LEAVING_S,
        ws="none",
    )
    uvicorn.Server(config).run([listening])
