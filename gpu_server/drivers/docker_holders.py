"""Which GPUs other people's containers were given: read from inspect answers alone, no engine needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from gpu_server.drivers.docker_body import LABEL_INSTANCE

ALL: Final = "all"
_NO_DEVICES: Final = frozenset({"", "void", "none"})
_CDI_PREFIX: Final = "nvidia.com/gpu="
_DEVICE_NODE: Final = re.compile(r"/dev/nvidia([0-9]+)")


def foreign_gpu_holders(inspects: Iterable[Mapping[str, Any]], instance: str) -> dict[str, str]:
    """GPU -> description of the running container that was given it and is not of this instance.

    A GPU is named as the container named it: a UUID (or a prefix of one), an index as text, or "all".
    """
    found: dict[str, str] = {}
    for inspect in inspects:
        config = inspect.get("Config") or {}
        if (config.get("Labels") or {}).get(LABEL_INSTANCE) == instance:
            continue
        if not (inspect.get("State") or {}).get("Running"):
            continue
        name = str(inspect.get("Name", "")).lstrip("/")
        description = (
            f"container {name} ({str(inspect.get('Id', ''))[:12]}, image {config.get('Image', '?')})"
        )
        for gpu in given_gpus(inspect):
            found.setdefault(gpu, description)
    return found


def given_gpus(inspect: Mapping[str, Any]) -> tuple[str, ...]:
    """The GPUs one container was given, by any of the ways an engine has for it."""
    host = inspect.get("HostConfig") or {}
    gpus: dict[str, None] = {}
    for request in host.get("DeviceRequests") or ():
        gpus.update(dict.fromkeys(_requested(request)))
    if str(host.get("Runtime") or "").startswith("nvidia"):
        gpus.update(dict.fromkeys(_visible((inspect.get("Config") or {}).get("Env") or ())))
    for device in host.get("Devices") or ():
        if node := _DEVICE_NODE.fullmatch(str(device.get("PathOnHost", ""))):
            gpus[node[1]] = None
    return tuple(gpus)


def _requested(request: Mapping[str, Any]) -> Iterable[str]:
    driver = request.get("Driver") or ""
    ids = [str(device) for device in request.get("DeviceIDs") or ()]
    if driver == "cdi":
        return [device.removeprefix(_CDI_PREFIX) for device in ids if device.startswith(_CDI_PREFIX)]
    capabilities = {name for group in request.get("Capabilities") or () for name in group}
    if driver != "nvidia" and not capabilities & {"gpu", "nvidia"}:
        return ()
    if ids:
        return ids
    count = int(request.get("Count") or 0)
    # The engine gives the first N devices for a count of N, and every one for -1.
    return (ALL,) if count < 0 else map(str, range(count))


def _visible(env: Iterable[str]) -> Iterable[str]:
    # The last one counts, as in an environment.
    value = dict(entry.partition("=")[::2] for entry in env).get("NVIDIA_VISIBLE_DEVICES", "")
    if value in _NO_DEVICES:
        return ()
    return [device.strip() for device in value.split(",") if device.strip() not in _NO_DEVICES]
