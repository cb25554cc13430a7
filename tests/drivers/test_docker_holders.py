"""Who else was given GPUs, from inspect answers."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_server.drivers.docker_holders import foreign_gpu_holders, given_gpus

GPU = [["gpu"]]


def inspect(
    *,
    host: dict[str, Any] | None = None,
    env: list[str] | None = None,
    labels: dict[str, str] | None = None,
    running: bool = True,
) -> dict[str, Any]:
    return {
        "Id": "0123456789abcdef",
        "Name": "/trainer",
        "State": {"Running": running},
        "Config": {"Image": "train:1", "Env": env, "Labels": labels},
        "HostConfig": host or {},
    }


def requests(*found: dict[str, Any]) -> dict[str, Any]:
    return {"DeviceRequests": list(found)}


@pytest.mark.parametrize(
    ("host", "env", "gpus"),
    [
        ({}, None, ()),
        ({"DeviceRequests": None}, None, ()),
        (requests({"Driver": "", "Count": -1, "DeviceIDs": None, "Capabilities": GPU}), None, ("all",)),
        (requests({"Driver": "", "Count": 2, "DeviceIDs": None, "Capabilities": GPU}), None, ("0", "1")),
        (requests({"Driver": "nvidia", "Count": 0, "DeviceIDs": ["GPU-a", "1"]}), None, ("GPU-a", "1")),
        (requests({"Driver": "", "Count": -1, "Capabilities": [["tpu"]]}), None, ()),
        (requests({"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-a", "x/y=z"]}), None, ("GPU-a",)),
        (requests({"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}), None, ("all",)),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=all"], ("all",)),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=GPU-a, GPU-b"], ("GPU-a", "GPU-b")),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_VISIBLE_DEVICES=void"], ()),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=none", "BROKEN"], ()),
        ({"Runtime": "nvidia"}, None, ()),
        ({"Runtime": "runc"}, ["NVIDIA_VISIBLE_DEVICES=all"], ()),
        ({"Devices": [{"PathOnHost": "/dev/nvidia3"}, {"PathOnHost": "/dev/nvidiactl"}]}, None, ("3",)),
    ],
)
def test_every_way_to_give_a_gpu_is_seen(
    host: dict[str, Any], env: list[str] | None, gpus: tuple[str, ...]
) -> None:
    """Device requests, CDI names, the NVIDIA runtime's variable and plain devices are all read."""
    assert given_gpus(inspect(host=host, env=env)) == gpus


def test_only_running_containers_of_others_hold_gpus() -> None:
    """Our own and stopped ones are no holders; another instance's are, and are described."""
    host = requests({"Driver": "nvidia", "DeviceIDs": ["GPU-a"]})
    ours = inspect(host=host, labels={"gpu-server.instance": "i"})
    stopped = inspect(host=host, running=False)
    assert foreign_gpu_holders([ours, stopped], "i") == {}
    other = inspect(host=host, labels={"gpu-server.instance": "other"})
    assert foreign_gpu_holders([ours, other], "i") == {
        "GPU-a": "container trainer (0123456789ab, image train:1)"
    }
