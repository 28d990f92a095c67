"""Pictures from the web, against a server that does everything wrong."""

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kimi_lite import fetch
from kimi_lite.errors import UsageError

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
# A key and a certificate for 127.0.0.1 that nobody trusts, made for this test.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg8kS9bskP162xs73O
gKgqJnrgmjI1fVnuU7gveUUw+UShRANCAATgUPtSgy2t9mq9SXC7eUySItf3DKeW
j29dDC4OpjLbVggw1lf87pvMywKG9ixNrm5ancYAmJVay/lJs2nhYfXS
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUTuIG18pnR749XqgosVME9tBGQpswCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyNDE2MTAwOFoYDzIxMjYxMDMx
MTYxMDA4WjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATgUPtSgy2t9mq9SXC7eUySItf3DKeWj29dDC4OpjLbVggw1lf87pvM
ywKG9ixNrm5ancYAmJVay/lJs2nhYfXSo2QwYjAdBgNVHQ4EFgQUK7ZkGvmuGyQe
OJck/PA3Ag/51DkwHwYDVR0jBBgwFoAUK7ZkGvmuGyQeOJck/PA3Ag/51DkwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IDXLfcVnPSjvuLHnh+UYYwHIXx8Q96lmpIRPAzVczCRzAiEAmBHxXyYVyFfIcXl4
TieH+4zs7eK3L4aUVikV0zIEAxE=
-----END CERTIFICATE-----
"""
released = threading.Event()  # ends whatever hangs


class Badly(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        name, _, rest = self.path[1:].partition("/")
        if name == "ok":
            self.reply(200, PICTURE)
        elif name == "missing":
            self.reply(404, b"")
        elif name == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif name == "hang":
            released.wait(20)
        elif name == "headers":  # never finishes its headers
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            while not released.wait(0.05):
                self.wfile.write(b"X: y\r\n")
        elif name == "drip":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
            while not released.wait(0.05):
                self.wfile.write(b"x")
        elif name == "endless":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
            while not released.is_set():
                self.wfile.write(bytes(1 << 16))
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(PICTURE)

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # we hang up on most of these


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server's address, which alone counts as public besides what is."""
    real = fetch.is_public
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or real(address))
    released.clear()
    with Quiet(("127.0.0.1", 0), Badly) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        released.set()
        running.shutdown()


def test_a_picture_arrives_also_through_redirects(server: str) -> None:
    assert fetch.fetch(f"{server}/ok") == PICTURE
    assert fetch.fetch(f"{server}/to//ok") == PICTURE
    assert fetch.fetch(f"{server}/to/{server}/to//ok") == PICTURE


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing", "answered 404"),
        ("/to/http://10.0.0.1/x.png", "private address 10.0.0.1"),
        ("/to/http://[::1]/x.png", "private address ::1"),
        ("/to/http://169.254.169.254/latest", "private address 169.254.169.254"),
        ("/to/file:///etc/passwd", "only http and https"),
        ("/to/ftp://127.0.0.1/x", "only http and https"),
        ("/short", "cut short"),
    ],
)
def test_what_a_server_does_wrong_is_one_sentence(server: str, path: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fetch.fetch(server + path)


def test_letters_of_other_scripts_are_written_as_the_web_does(server: str) -> None:
    assert fetch.fetch(f"{server}/ok/käse?größe=1") == PICTURE
    assert fetch._ascii("käse.example:80") == "xn--kse-qla.example:80"


@pytest.mark.parametrize("trusted", [False, True])
def test_certificates_are_checked(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    (tmp_path / "both.pem").write_text(CERTIFICATE)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(tmp_path / "both.pem")
    if trusted:
        ours = ssl.create_default_context(cafile=str(tmp_path / "both.pem"))
        monkeypatch.setattr(ssl, "create_default_context", lambda: ours)
    with Quiet(("127.0.0.1", 0), Badly) as running:
        running.socket = here.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{running.server_port}/ok"
        if trusted:
            assert fetch.fetch(url) == PICTURE
        else:
            with pytest.raises(UsageError, match="certificate verify failed"):
                fetch.fetch(url)
        running.shutdown()


def test_a_circle_of_redirects_ends(server: str) -> None:
    with pytest.raises(UsageError, match="redirected more than 4 times"):
        fetch.fetch(f"{server}/to/" * 9 + "missing")


@pytest.mark.parametrize("path", ["/hang", "/headers", "/drip"])
def test_a_slow_server_is_left_at_the_deadline(
    server: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.5)
    with pytest.raises(UsageError, match="no complete answer"):
        fetch.fetch(server + path)


def test_an_endless_answer_is_left_at_the_bound(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 2 << 20)
    with pytest.raises(UsageError, match="more than 2 MB"):
        fetch.fetch(f"{server}/endless")


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.8.9.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.1.1 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
    ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1""".split(),
)
def test_private_addresses_are_known_in_every_form(address: str) -> None:
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_not_refused(address: str) -> None:
    assert fetch.is_public(address)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9/x", "private address"),
        ("http://localhost/x", "private address"),
        ("http://2130706433/x", "private address 127.0.0.1"),  # 127.0.0.1 as one number
        ("http://0x7f.1/x", "private address 127.0.0.1"),
        ("http://[::ffff:127.0.0.1]/x", "private address"),
        ("http://user@example.org/x", "not allowed"),
        ("http://a\\@127.0.0.1/x", "not allowed"),
        ("http://example.org:port/x", "not a valid address"),
        ("http:///x", "only http and https"),
    ],
)
def test_addresses_that_are_refused_at_once(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fetch.fetch(url)


def test_an_unknown_host_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_addresses", lambda host, port, deadline: [])
    with pytest.raises(UsageError, match=r"'nowhere\.example' is not known"):
        fetch.fetch("http://nowhere.example/x.png")
