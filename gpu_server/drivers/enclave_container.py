"""The enclave in a container: its own image's in a simulation, on a Nitro host its runner's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from docker import APIClient
from docker.errors import APIError, ImageNotFound, NotFound

from gpu_server.drivers.docker_api import create_container, inspect_image, short
from gpu_server.drivers.docker_body import LABEL_INSTANCE
from gpu_server.drivers.docker_calls import EngineCalls, unreachable
from gpu_server.drivers.enclave_host import (
    KILLED,
    NOT_SEEN_GONE,
    ROLE,
    Ending,
    last_words,
    make_folder,
    make_of,
    remove_folder,
)
from gpu_server.ports import EnclaveDown, RuntimeUnreachable

T = TypeVar("T")

LABEL_ROLE: Final = "gpu-server.role"
LABEL_MAKE: Final = "gpu-server.make"

_CONFLICT: Final = 409

Body = Callable[[Mapping[str, Any]], dict[str, Any]]
"""What a container is made with, from what the engine knows of its image. May raise `EnclaveDown`."""


class ContainerEnclave:
    """`EnclaveHost` over one container of a Docker engine, of the name `gpu-server-enclave-INSTANCE`.

    `folder` is made for `uid` before each start, and removed after the end. `makes` is the command that makes
    the image, for people.
    """

    def __init__(
        self,
        instance: str,
        image: str,
        body: Body,
        *,
        makes: str = "./scripts/build_images.sh enclave",
        docker_host: str | None = None,
        folder: Path | None = None,
        uid: int = 0,
        call_timeout: float = 30.0,
    ) -> None:
        self.name: Final = f"gpu-server-enclave-{instance}"
        self._instance, self._image, self._body = instance, image, body
        self._makes = makes
        self._folder, self._uid = folder, uid
        self._calls = EngineCalls(docker_host, call_timeout)

    async def find(self) -> bool:
        """See the port. One that was made from another image, or with other settings, is not taken up."""

        def find(client: APIClient) -> bool:
            found = self._inspect(client)
            if found is None or not found["State"]["Running"]:
                return False
            try:
                wanted = self._made(client)[1]
            except (ImageNotFound, EnclaveDown):
                return True  # there is nothing better to be had
            return bool(found["Config"]["Labels"].get(LABEL_MAKE) == wanted)

        return await self._call(find)

    async def start(self) -> None:
        """See the port."""
        await self.stop(0.0)

        def start(client: APIClient) -> None:
            try:
                body, make = self._made(client)
            except ImageNotFound as error:
                raise EnclaveDown(
                    f"there is no image {self._image} on this machine: {self._makes} makes it (see"
                    " enclave_image/README.md)"
                ) from error
            if self._folder is not None:
                try:
                    make_folder(self._folder, self._uid)
                except OSError as error:
                    raise EnclaveDown(f"its folder cannot be used: {error}") from error
            try:
                body["Labels"] = {LABEL_INSTANCE: self._instance, LABEL_ROLE: ROLE, LABEL_MAKE: make}
                client.start(create_container(client, body, self.name))
            except APIError as error:
                if error.status_code == _CONFLICT:
                    raise EnclaveDown(f"another container has the name {self.name}") from error
                raise EnclaveDown(f"its container does not start: {short(error)}") from error

        await self._call(start)

    async def ended(self) -> str | None:
        """See the port; with the container's last line, where it left one."""

        def ended(client: APIClient) -> str | None:
            found = self._inspect(client)
            if found is None:
                return "its container has gone"
            if found["State"]["Running"]:
                return None
            logs = client.logs(found["Id"], stdout=True, stderr=True, tail=5)
            why = "its memory was too small" if found["State"]["OOMKilled"] else last_words(logs)
            return f"its container has ended with {found['State']['ExitCode']}{why and f': {why}'}"

        return await self._call(ended)

    async def stop(self, grace: float) -> Ending:
        """See the port."""

        def stop(client: APIClient) -> Ending:
            ending: Ending = "none"
            if (found := self._inspect(client)) is not None:
                ran = found["State"]["Running"]
                with contextlib.suppress(NotFound):
                    if ran and grace > 0:
                        client.stop(found["Id"], timeout=round(grace))
                        found = client.inspect_container(found["Id"])
                    ending = _ending(found["State"], ran=ran)
                    client.remove_container(found["Id"], v=True, force=True)
                if self._inspect(client) is not None:
                    raise RuntimeUnreachable(f"container {self.name} cannot be removed")
            if self._folder is not None:
                remove_folder(self._folder)
            return ending

        return await self._call(stop)

    def close(self) -> None:
        """See the port. A call later opens it again."""
        self._calls.close()

    async def _call(self, do: Callable[[APIClient], T]) -> T:
        if not self._calls.is_open:
            await self._calls.open()
        with unreachable():
            return await self._calls.call(do)

    def _inspect(self, client: APIClient) -> dict[str, Any] | None:
        """The container of our name, if it is ours."""
        try:
            found: dict[str, Any] = client.inspect_container(self.name)
        except NotFound:
            return None
        has = found["Config"]["Labels"] or {}
        ours = has.get(LABEL_INSTANCE) == self._instance and has.get(LABEL_ROLE) == ROLE
        return found if ours and found["Name"].lstrip("/") == self.name else None

    def _made(self, client: APIClient) -> tuple[dict[str, Any], str]:
        """The create request, and a name for all that it is made from. Raises `ImageNotFound`."""
        image = inspect_image(client, self._image)
        body = {"Image": self._image, **self._body(image)}
        return body, make_of([image["Id"], body])


def _ending(state: Mapping[str, Any], *, ran: bool) -> Ending:
    """How one that is removed next has ended. `ran` says whether it ran until it was asked to end."""
    status = state["ExitCode"]
    if state["Running"] or status in NOT_SEEN_GONE or status >= KILLED:
        return "killed"
    return "terminated" if ran else "ended"
