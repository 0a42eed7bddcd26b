"""Listening socket: the address, and whether other machines can reach it.

Knows sockets; imports nothing heavy.
"""

from __future__ import annotations

import ipaddress
import socket

from localmimo.errors import BadRequest


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises BadRequest where the address cannot be used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol_number, _, address = found[0]
        sock = socket.socket(family, kind, protocol_number)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(
            f"The server cannot listen on {host} port {port} ({reason}); give another --host or --port."
        ) from None
    sock.setblocking(False)
    return sock
