"""Fetching an image that is not on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable

from docker import APIClient
from docker.utils import parse_repository_tag

from gpu_server.core.errors import FailureCode
from gpu_server.drivers.docker_api import ENGINE_ERRORS, inspect_image, one_line, short
from gpu_server.ports import StartRefused


def pull(connect: Callable[[], APIClient], image: str, stop: threading.Event) -> str | None:
    """Pull an image, blocking, over a client of its own; None, or why it did not come.

    Ends at the next progress line after `stop` is set, which also makes the engine give the download up.
    """
    repository, tag = parse_repository_tag(image)
    try:
        client = connect()
    except ENGINE_ERRORS as error:
        return short(error)
    try:
        for line in client.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if stop.is_set():
                return "the download was given up"
            if "error" in line:
                return one_line(str(line["error"]))
        inspect_image(client, image)
    except ENGINE_ERRORS as error:
        return short(error)
    finally:
        client.close()
    return None


def image_missing(image: str, why: str) -> StartRefused:
    """The refusal for an image that cannot be started here."""
    return StartRefused(FailureCode.IMAGE_MISSING, f"image {image} is not available: {why}")
