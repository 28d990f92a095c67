"""A server in a process of its own, as `kimi-lite serve` starts it, and what its tests ask."""

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
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import openai

import kimi_lite
from kimi_lite.runtime.reference.pictures import scene

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
