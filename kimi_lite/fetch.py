"""One picture from the web, with nothing left to chance: bounded size, bounded time, public addresses only.

A name is resolved once, every address it gives must be public, and the connection goes to the address that was
checked, so that an answer which changes in between leads nowhere. Redirects are followed a few times, each with the
same checks. Proxies, cookies and credentials are not used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from kimi_lite.errors import UsageError

MAX_BYTES = 50 << 20
MAX_SECONDS = 30.0
MAX_REDIRECTS = 4
CHUNK = 1 << 16
URL_CHARACTERS = "%/:=&?~+!$,;'@()*[]-._"  # that stay as they are; spaces and controls were refused before


def fetch(url: str) -> bytes:
    """The body behind an http or https URL.

    Raises:
        UsageError: a private or unknown host, an error status, too many redirects, too much or too slow an answer.
    """
    deadline = time.monotonic() + MAX_SECONDS
    at = url
    for _ in range(MAX_REDIRECTS + 1):
        body, redirect = _get(url, at, deadline)
        if redirect is None:
            return body
        at = urljoin(at, redirect)
    raise UsageError(f"{url}: redirected more than {MAX_REDIRECTS} times; give the picture's own address")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet, also when it is wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if wrapped:
            return is_public(str(wrapped))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


def _get(shown: str, url: str, deadline: float) -> tuple[bytes, str | None]:
    """The body, or where a redirect leads."""
    parts = _checked(shown, url)
    try:
        plain = _connect(shown, parts, deadline)
        # A timeout of the socket bounds each wait; this bounds their sum, through handshake, headers and body alike.
        handle = plain.dup()
        alarm = threading.Timer(_left(deadline), _hang_up, [handle])
        alarm.daemon = True
        alarm.start()
    except OSError as error:
        raise _failure(shown, error, deadline) from None
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80)
    try:
        secure = parts.scheme == "https"
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            if secure
            else plain
        )
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=URL_CHARACTERS)
        connection.request(
            "GET", target, headers={"Host": _ascii(parts.netloc), "User-Agent": "kimi-lite", "Accept": "*/*"}
        )
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
            return b"", location
        if response.status != 200:
            raise UsageError(
                f"{shown}: the server answered {response.status} {response.reason}; expected a picture"
            )
        return _body(shown, response, deadline), None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(shown, error, deadline) from None
    finally:
        alarm.cancel()
        handle.close()
        connection.close()
        plain.close()


def _ascii(host: str) -> str:
    """A host as it stands in a header; names in other scripts have a spelling of their own for that."""
    return host if host.isascii() else host.encode("idna").decode()


def _hang_up(handle: socket.socket) -> None:
    with contextlib.suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)


def _checked(shown: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises for a port that is no number
    except ValueError as error:
        raise UsageError(f"{shown}: not a valid address ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{shown}: leads to {url!r}; only http and https addresses are fetched")
    if "@" in parts.netloc or "\\" in url or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise UsageError(f"{shown}: credentials, backslashes and spaces are not allowed in an address")
    return parts


def _connect(shown: str, parts: SplitResult, deadline: float) -> socket.socket:
    """A connection to an address that was checked. Raises OSError besides UsageError."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = _addresses(host, port, deadline)
    if not addresses:
        raise UsageError(f"{shown}: the host {host!r} is not known; check the address and the connection")
    private = [a for a in addresses if not is_public(a)]
    if private:
        raise UsageError(
            f"{shown}: {host!r} is the private address {private[0]}; only public addresses are fetched"
        )
    return socket.create_connection((addresses[0], port), timeout=_left(deadline))


def _addresses(host: str, port: int, deadline: float) -> list[str]:
    """What a name resolves to; in a thread, because the system's resolver takes no deadline."""
    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(
                str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_left(deadline))
    return list(found)


def _body(shown: str, response: http.client.HTTPResponse, deadline: float) -> bytes:
    parts: list[bytes] = []
    total = 0
    while chunk := response.read1(CHUNK):
        parts.append(chunk)
        total += len(chunk)
        if total > MAX_BYTES:
            raise UsageError(
                f"{shown}: more than {MAX_BYTES >> 20} MB; download it, make it smaller and give the file"
            )
        _left(deadline)
    _left(deadline)  # an end that the alarm made is no end
    if response.length:
        raise UsageError(f"{shown}: the answer was cut short; try again, or download it and give the file")
    return b"".join(parts)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _failure(shown: str, error: Exception, deadline: float) -> UsageError:
    if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
        return UsageError(
            f"{shown}: no complete answer within {MAX_SECONDS:.0f} seconds; download it and give the file"
        )
    return UsageError(
        f"{shown}: cannot be fetched ({getattr(error, 'strerror', None) or error or type(error).__name__})"
    )
