"""The create requests of the enclave's containers."""

from __future__ import annotations

from pathlib import Path

from gpu_server.drivers.docker_body import seccomp_profile
from gpu_server.drivers.enclave_body import runner_body, simulated_body

IMAGE = {"Config": {"Cmd": ["/usr/bin/python3", "program"]}}


def test_a_simulated_enclave_is_hardened() -> None:
    """No network, no capability, nothing writable but the folder of its socket, not root, memory and
    processes bounded, and the workers' own seccomp profile."""
    body = simulated_body(IMAGE, folder=Path("/run/x.enclave"), uid=65532)
    host = body["HostConfig"]
    assert body["User"] == "65532:65532"
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["Privileged"] is False
    assert host["SecurityOpt"] == ["no-new-privileges", f"seccomp={seccomp_profile()}"]
    assert [mount["Source"] for mount in host["Mounts"]] == ["/run/x.enclave"]
    assert host["Memory"] == host["MemorySwap"] > 0
    assert host["PidsLimit"] > 0
    assert host["Ulimits"] == [{"Name": "core", "Soft": 0, "Hard": 0}]


def test_the_image_says_which_program() -> None:
    """The command is the image's own, told to simulate: the same program that runs in an enclave."""
    body = simulated_body(IMAGE, folder=Path("/run/x.enclave"), uid=1)
    assert body["Cmd"][:2] == IMAGE["Config"]["Cmd"]
    assert body["Cmd"][2:] == ["--simulated", "--socket", "/run/enclave/enclave.sock"]


def test_the_runner_gets_what_nitro_cli_needs() -> None:
    """The device, huge pages, the image file to read, folders of its own for sockets and log, no network."""
    body = runner_body(eif=Path("/var/lib/enclave.eif"), memory_mb=512, cpu_count=2, cid=16)
    host = body["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert [device["PathOnHost"] for device in host["Devices"]] == ["/dev/nitro_enclaves"]
    mounts = {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in host["Mounts"]}
    assert mounts == {
        "/enclave.eif": ("/var/lib/enclave.eif", True),
        "/dev/hugepages": ("/dev/hugepages", False),
    }
    assert {"/run/nitro_enclaves", "/var/log/nitro_enclaves"} <= host["Tmpfs"].keys()
    assert body["Cmd"] == [
        *("--eif", "/enclave.eif", "--memory", "512", "--cpu-count", "2", "--cid", "16"),
    ]
    assert host["RestartPolicy"] == {"Name": "no"}
