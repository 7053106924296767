"""CURVE keys from the auth key that a scheduler and its clients share, and where one may go without.

Both sides derive both key pairs: `hashlib.scrypt` with n = 2**15, r = 8, p = 1 and the salt below gives 64 bytes, of
which the first 32 are the server's secret key and the last 32 the clients'. So who holds the auth key can prove it to
the other side, and who does not can neither answer for a scheduler nor ask one (RFC 26, CurveZMQ; RFC 27, ZAP).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zmq
    from zmq.auth.thread import ThreadAuthenticator

__all__ = [
    "KEY_VARIABLE",
    "Keys",
    "address_of",
    "checked_key",
    "is_loopback",
    "key_from",
    "numeric",
    "require_packages",
]

KEY_VARIABLE = "EPLB_AUTH_KEY"
"""Environment variable that holds the auth key, MindIE's name."""

_SALT = b"lplb.eplb_scheduler CURVE keys, version 1"
_N, _R, _P = (
    2**15,
    8,
    1,
)  # 32 MiB and about 0.1 s: a recorded handshake lets an auth key be guessed, so a guess must cost
_LEAST, _MOST = 8, 1024  # bytes of an auth key
_DOMAIN = "lplb"


def require_packages() -> None:
    """Refuse to go on without what the service needs, and load all of it: later there may be no file to open it with.

    Raises:
        ImportError: pyzmq or msgpack is missing, or pyzmq comes without CURVE; the message says how to get them.
    """
    try:
        import msgpack  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401
        import zmq
        import zmq.auth.thread
        import zmq.utils.monitor
    except ImportError as error:
        raise ImportError(
            f'the scheduler service needs pyzmq and msgpack: pip install "lplb[service]" ({error})', name=error.name
        ) from error
    if not zmq.has("curve"):
        raise ImportError('this pyzmq was built without CURVE, which its wheels have: pip install "lplb[service]"')


def checked_key(auth_key: object) -> bytes:
    """Return an auth key as bytes. No message shows the key.

    Raises:
        TypeError: it is neither text nor bytes.
        ValueError: it has fewer than 8 or more than 1024 bytes.
    """
    if not isinstance(auth_key, (str, bytes)):
        raise TypeError(f"auth_key is a {type(auth_key).__name__}, allowed is a str, bytes or None")
    key = auth_key.encode("utf-8", "surrogateescape") if isinstance(auth_key, str) else auth_key
    if not _LEAST <= len(key) <= _MOST:
        raise ValueError(f"auth_key has {len(key)} bytes, allowed are {_LEAST} to {_MOST}")
    return key


def key_from(auth_key: str | bytes | None) -> bytes | None:
    """Return the auth key that a caller gave, or else the environment's, or ``None``: an empty variable is none.

    Raises:
        TypeError, ValueError: as `checked_key`.
    """
    if auth_key is None:
        auth_key = os.environ.get(KEY_VARIABLE) or None
    return None if auth_key is None else checked_key(auth_key)


def numeric(host: str) -> str:
    """Return an address of a host, so that what is checked is what is used; IPv4 first.

    Raises:
        ValueError: the name is not known here.
    """
    *_, address = min(_found(host), key=lambda entry: entry[0] != socket.AF_INET)
    return str(address[0])


def address_of(host: str, port: int) -> str:
    """ZeroMQ's name for a numeric address and a port."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether all addresses of a host are this machine's own, reachable from nowhere else.

    Raises:
        ValueError: the name is not known here.
    """
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in _found(host))


def _found(host: str) -> list[Any]:
    try:
        return list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host is {host!r}, allowed is a name or an address known here: {error}") from error


@dataclass(frozen=True, repr=False)
class Keys:
    """The key pairs of an auth key, in Z85; the auth key itself is not kept, and ``repr`` shows nothing."""

    server_public: bytes
    server_secret: bytes = field(compare=False)
    client_public: bytes
    client_secret: bytes = field(compare=False)

    @classmethod
    def of(cls, auth_key: bytes) -> Keys:
        """Derive the keys, which takes about 0.1 s and 32 MiB."""
        import zmq
        from zmq.utils import z85

        seed = hashlib.scrypt(auth_key, salt=_SALT, n=_N, r=_R, p=_P, maxmem=2**26, dklen=64)
        server, client = z85.encode(seed[:32]), z85.encode(seed[32:])
        return cls(zmq.curve_public(server), server, zmq.curve_public(client), client)

    def __repr__(self) -> str:
        """Show no key."""
        return "Keys(...)"

    def secure_client(self, dealer: zmq.Socket[Any]) -> None:
        """Let a socket, before it connects, talk to a holder of the auth key only."""
        dealer.curve_serverkey = self.server_public
        dealer.curve_publickey = self.client_public
        dealer.curve_secretkey = self.client_secret

    def secure_server(self, router: zmq.Socket[Any]) -> ThreadAuthenticator:
        """Let a socket, before it binds, talk to holders of the auth key only.

        Returns:
            What checks the clients, on a thread; to be stopped after the socket is closed.
        """
        import zmq
        from zmq.auth.thread import ThreadAuthenticator

        silent = logging.Logger("zmq.auth", logging.CRITICAL + 1)  # it would log the clients' keys
        gate = ThreadAuthenticator(router.context, log=silent)
        gate.configure_curve_callback(domain=_DOMAIN, credentials_provider=_OneKey(self.client_public))
        gate.start()
        router.zap_domain = _DOMAIN.encode()
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it, a gate that has died would let everybody in
        router.curve_server = True
        router.curve_secretkey = self.server_secret
        return gate


class _OneKey:
    """Lets one public key in, for `zmq.auth`."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Tell whether a client has the key."""
        return hmac.compare_digest(key, self._public)
