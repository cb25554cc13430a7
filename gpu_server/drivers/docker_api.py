"""The few places where the Docker SDK needs a word of its own: connecting, attaching, errors, types."""

from __future__ import annotations

import os
import socket
from typing import Any, Final
from urllib.parse import urlsplit

import requests
import urllib3
from docker import APIClient
from docker.errors import APIError, DockerException, NotFound
from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool
from docker.utils import parse_host

# Everything the SDK raises when the engine does not answer. APIError (it did answer) is one of them, so it is
# to be caught first where the answer matters.
ENGINE_ERRORS: Final = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)

_UNIX: Final = "http+unix://"
_HTTP_PORT: Final = 2375
_HEAD_BYTES: Final = 16 * 1024
_MESSAGE_LENGTH: Final = 400


def connect(docker_host: str | None, timeout: float) -> APIClient:
    """A client of its own connections, its version agreed with the engine. Raises `ENGINE_ERRORS`."""
    url = str(parse_host(docker_host))
    limit: Any = timeout  # the stubs want whole seconds, the library takes any
    is_unix = url.startswith(_UNIX)
    if is_unix:
        _UnixConnection(url, url.removeprefix(_UNIX), limit).probe()
    client = APIClient(base_url=docker_host, timeout=limit)
    client.trust_env = False  # no proxy of the environment stands before the engine
    if is_unix:
        client.mount("http+docker://", _UnixAdapter(url, limit))
    return client


def _unix_socket(path: str, limit: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(limit)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


class _UnixConnection(UnixHTTPConnection):
    """The SDK's connection, but for a leak: its socket stays open when connecting fails, as it does at every
    try while an engine is away (docker 7.2, `UnixHTTPConnection.connect`)."""

    def connect(self) -> None:
        self.sock = _unix_socket(self.unix_socket, self.timeout)

    def probe(self) -> None:
        """Raises OSError when nobody listens."""
        self.connect()
        self.close()


class _UnixPool(UnixHTTPConnectionPool):
    def _new_conn(self) -> Any:
        limit: Any = self.timeout
        return _UnixConnection(self.base_url, self.socket_path, limit)


class _UnixAdapter(UnixHTTPAdapter):
    def get_connection(self, url: str | bytes, proxies: Any = None) -> Any:
        with self.pools.lock:
            pool = self.pools.get(url)
            if pool is None:
                pool = self.pools[url] = _UnixPool(
                    str(url), self.socket_path, self.timeout, self.max_pool_size
                )
            return pool


def inspect_image(client: APIClient, image: str) -> dict[str, Any]:
    """What the engine knows of an image. Raises `ImageNotFound`."""
    found: dict[str, Any] = client.inspect_image(image)  # type: ignore[no-untyped-call]
    return found


def create_container(client: APIClient, body: dict[str, Any], name: str) -> str:
    """Create from a full request body; the new container's id."""
    created: dict[str, Any] = client.create_container_from_config(body, name)  # type: ignore[no-untyped-call]
    return str(created["Id"])


def attach(client: APIClient, container_id: str) -> socket.socket:
    """The raw connection of an attach to stdout and stderr, the caller's to close.

    The SDK's response holds the same connection and would close it when collected; it is closed here.
    """
    raw: Any = client.attach_socket(container_id, {"stdout": 1, "stderr": 1, "stream": 1, "logs": 0})
    connection = socket.socket(fileno=os.dup(raw.fileno()))
    raw._response.close()
    raw.close()
    return connection


def raw_body(client: APIClient, docker_host: str | None, path: str) -> socket.socket:
    """The connection of a GET at the first byte of its answer, which lasts for as long as the engine writes.

    Asked for in HTTP/1.0, so that the answer is not cut into chunks. Raises `ENGINE_ERRORS`.
    """
    url = str(parse_host(docker_host))
    limit = float(client.timeout)
    if url.startswith(_UNIX):
        connection = _unix_socket(url.removeprefix(_UNIX), limit)
    else:
        parts = urlsplit(url)
        connection = socket.create_connection((parts.hostname, parts.port or _HTTP_PORT), limit)
    try:
        connection.sendall(f"GET /v{client.api_version}{path} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        _require_body(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_body(connection: socket.socket) -> None:
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)  # one at a time: what follows is not ours to read
        if not byte or len(head) > _HEAD_BYTES:
            raise DockerException("the engine's answer broke off")
        head += byte
    status, *fields = head.decode("latin-1").lower().split("\r\n")
    code = status.partition(" ")[2][:3]
    if code != "200":
        kind = NotFound if code == "404" else APIError
        raise kind(f"the engine answered {code}", explanation=one_line(status))
    if any(field.startswith("transfer-encoding:") and "chunked" in field for field in fields):
        raise DockerException("the engine's answer is cut into chunks")


def short(error: Exception) -> str:
    """An engine's error as one line for people."""
    return one_line(str(getattr(error, "explanation", None) or error))


def one_line(text: str) -> str:
    """Text of an engine, without line breaks and not too long."""
    return " ".join(text.split())[:_MESSAGE_LENGTH]
