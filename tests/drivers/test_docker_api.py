"""The corners of the Docker SDK."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from docker.errors import APIError, DockerException, NotFound

from gpu_server.drivers.docker_api import ENGINE_ERRORS, connect, raw_body, short
from tests.drivers.open_files import nothing_left_open
from tests.drivers.played_engine import PlayedEngine


def test_connecting_in_vain_leaks_nothing(tmp_path: Path) -> None:
    """Trying for hours while an engine is away costs no descriptor."""
    with nothing_left_open():
        for _ in range(3):
            with pytest.raises(ENGINE_ERRORS):
                connect(f"unix://{tmp_path}/none.sock", 1)


def test_errors_are_one_short_line() -> None:
    """What an engine says is made fit for a log line and a JSON message."""
    assert short(APIError("500", explanation="OCI runtime\n  create failed")) == "OCI runtime create failed"
    assert len(short(OSError("x" * 10_000))) == 400


async def test_a_raw_body_begins_at_its_first_byte(tmp_path: Path) -> None:
    """What the engine writes after its head comes untouched, to the end of the connection."""
    async with PlayedEngine(tmp_path / "docker.sock") as engine:
        engine.answers["/logs"] = b"HTTP/1.0 200 OK\r\nX: chunked\r\n\r\n\x01body\r\n\r\n"

        def read() -> bytes:
            client = connect(engine.host, 10)
            with raw_body(client, engine.host, "/logs?follow=1") as body, body.makefile("rb") as file:
                client.close()
                return file.read()

        assert await asyncio.to_thread(read) == b"\x01body\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n", NotFound),
        (b"HTTP/1.0 500 Internal Server Error\r\n\r\n", APIError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", DockerException),
        (b"HTTP/1.0 200 OK\r\nX-Cut", DockerException),
        (b"HTTP/1.0 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", DockerException),
        (b"\r\n\r\n", APIError),
    ],
)
async def test_what_is_no_raw_body_is_an_error(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    """A refusal, a body in chunks, and half an answer are told, and no connection is left open."""
    async with PlayedEngine(tmp_path / "docker.sock") as engine:
        engine.answers["/logs"] = answer

        def read() -> None:
            client = connect(engine.host, 10)
            try:
                raw_body(client, engine.host, "/logs")
            finally:
                client.close()

        with pytest.raises(error):
            await asyncio.to_thread(read)


@pytest.mark.docker
@pytest.mark.usefixtures("docker_engine")
def test_a_client_ignores_the_environments_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is set for the internet does not stand before the engine."""
    monkeypatch.setenv("ALL_PROXY", "http://localhost:1")
    client = connect(None, 10)
    assert client.ping()
    client.close()
