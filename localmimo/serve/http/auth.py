"""Access: which requests are answered (key, host, origin), and how large a body may be.

Knows headers and bytes; nothing of what a body means.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import Receive, Scope

from localmimo.serve.errors import ApiError
from localmimo.serve.http.listen import is_loopback

BODY_BYTES_PER_TOKEN = 64  # of the context: text, its escapes and the JSON around it
MIN_BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 30.0  # between two pieces of a body
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
PROTECTED = ("/v1/", "/metrics")


@dataclass(frozen=True, slots=True)
class AccessCheck:
    """What every request must satisfy. Without a key only programs of this machine are answered."""

    api_key: str | None = None
    cors: tuple[str, ...] = ()  # origins of web pages that may call

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError where the request is refused."""
        self._check_origin(headers)
        if self.api_key is None:
            self._check_host(headers)
        elif path.startswith(PROTECTED) and not self._knows_key(headers):
            raise ApiError(
                "key", "The API key is missing or wrong: send it as Authorization: Bearer KEY or x-api-key."
            )

    def _knows_key(self, headers: Mapping[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        # Digests have one length, so that not even the key's length shows in the time this takes.
        expected = _digest(self.api_key or "")
        return sum(hmac.compare_digest(_digest(key), expected) for key in given) > 0  # both are compared

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """A foreign web page may not use a visitor's browser to talk to this server."""
        origin = headers.get("origin")
        if origin is None or "*" in self.cors or origin in self.cors:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(
                "forbidden", f"The origin {origin[:100]} is not allowed; start with --cors ORIGIN."
            )

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Without a key a foreign name that resolves to this machine (DNS rebinding) is not served."""
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if host not in LOCAL_NAMES and not is_loopback(host):
            raise ApiError("forbidden", f"The host name {host[:100]!r} is not this machine's own.")


def body_limit(context: int) -> int:
    """Bytes of a body at most: more could not fit in the context."""
    return max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)


async def read_body(scope: Scope, receive: Receive, limit: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole body. Raises ApiError where it is too large, too slow or breaks off."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    body = bytearray()
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), timeout_s)
        except TimeoutError:
            raise ApiError("late", f"The body did not come within {timeout_s:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise ApiError("late", "The client left before the end of its body.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(len(body), limit)
    return bytes(body)


def _too_large(n_bytes: int, limit: int) -> ApiError:
    return ApiError("large", f"The body has {n_bytes:,} bytes; this server reads at most {limit:,}.")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
