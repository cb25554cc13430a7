"""Settings: each from the environment, and each wrong value named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gpu_server.core.sessions import Rules
from gpu_server.core.slots import Tier
from gpu_server.settings import Settings


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this machine, and no .env."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


VALUES: dict[str, tuple[str, Any]] = {
    "http_host": ("0.0.0.0", "0.0.0.0"),
    "http_port": ("0", 0),
    "http_max_connections": ("7", 7),
    "log_level": ("debug", "debug"),
    "internal_api_key": ("k" * 16, "k" * 16),
    "runtime": ("process", "process"),
    "state_dir": ("/a/state", Path("/a/state")),
    "run_dir": ("/a/run", Path("/a/run")),
    "model_presets_file": ("/a/presets.yaml", Path("/a/presets.yaml")),
    "allowed_docker_images": ("a/*, b@sha256:00,", ("a/*", "b@sha256:00")),
    "worker_uid_base": ("3000", 3000),
    "gpu_device_ids": ("0,GPU-ab12", ("0", "GPU-ab12")),
    "gpu_device_difficulty": ("0:low, GPU-1:high,", {"0": Tier.LOW, "GPU-1": Tier.HIGH}),
    "cpu_slots": ("0", 0),
    "gpu_metrics_refresh_interval": ("0.5", 0.5),
    "fsx_mount_point": ("/a/fsx", Path("/a/fsx")),
    "model_cache_dir": ("/a/models", Path("/a/models")),
    "models_require_manifest": ("true", True),
    "model_prefetch": ("off", "off"),
    "auto_fetch_models": ("true", True),
    "model_source_s3_uri": ("s3://bucket/models/", "s3://bucket/models"),
    "file_service_url": ("http://files:8080/", "http://files:8080"),
    "file_service_internal_key": ("secret-of-the-service", "secret-of-the-service"),
    "gpu_memory_utilization": ("0.5", 0.5),
    "enclave": ("nitro", "nitro"),
    "enclave_cid": ("17", 17),
    "enclave_port": ("6000", 6000),
    "enclave_image": ("a/enclave", "a/enclave"),
    "enclave_runner_image": ("a/runner", "a/runner"),
    "enclave_eif_path": ("/a/enclave.eif", Path("/a/enclave.eif")),
    "enclave_memory_mb": ("1024", 1024),
    "enclave_cpu_count": ("4", 4),
    "kms_endpoint_url": ("http://127.0.0.1:8002", "http://127.0.0.1:8002"),
    "default_model_pool": ("chat", "chat"),
    "session_queue_max_size": ("0", 0),
    "gpu_wait_max_seconds": ("0", 0.0),
    "gpu_wait_max_tasks": ("0", 0),
    "stop_grace_seconds": ("0", 0.0),
    "default_task_timeout": ("7", 7.0),
    "wash_same_tenant": ("light", "light"),
    "carwash_image": ("a/carwash", "a/carwash"),
    "certificates_kept": ("1", 1),
    "max_body_bytes": ("1024", 1024),
    "metadata_max_depth": ("1", 1),
    "stream_history_bytes": ("65536", 65536),
    "stream_total_bytes": ("1048576", 1 << 20),
}


COMPANY = {
    "auto_fetch_models": {"MODEL_SOURCE_S3_URI": "s3://bucket"},
    "file_service_url": {"FILE_SERVICE_INTERNAL_KEY": "k"},
}
"""What some settings cannot be without."""


@pytest.mark.parametrize("name", Settings.model_fields)
def test_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is read from the environment under its own name."""
    text, expected = VALUES.get(name, ("4001.5", 4001.5))
    assert getattr(Settings(), name) != expected
    for other, needed in COMPANY.get(name, {}).items():
        monkeypatch.setenv(other, needed)
    monkeypatch.setenv(name.upper(), text)
    assert getattr(Settings(), name) == expected


def test_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` counts, the environment counts more, and names that are not ours are left alone."""
    (tmp_path / ".env").write_text("HTTP_PORT=1\nCPU_SLOTS=7\nSOMEBODY_ELSES=1\n")
    monkeypatch.setenv("HTTP_PORT", "2")
    settings = Settings()
    assert (settings.http_port, settings.cpu_slots) == (2, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "http"),
        ("LOG_LEVEL", "loud"),
        ("INTERNAL_API_KEY", "too-short"),
        ("RUNTIME", "podman"),
        ("WORKER_UID_BASE", "0"),
        ("WORKER_UID_BASE", "999"),
        ("GPU_DEVICE_DIFFICULTY", "0"),
        ("GPU_DEVICE_DIFFICULTY", "0:medium"),
        ("GPU_DEVICE_DIFFICULTY", ":low"),
        ("CPU_SLOTS", "-1"),
        ("SESSION_IDLE_TIMEOUT_SECONDS", "0"),
        ("SESSION_MAX_LIFETIME_SECONDS", "inf"),
        ("TASK_RETENTION_SECONDS", "nan"),
        ("GPU_WAIT_MAX_SECONDS", "-1"),
        ("GPU_WAIT_MAX_SECONDS", "inf"),
        ("DISCONNECT_GRACE_SECONDS", "0.5"),
        ("MODEL_PREFETCH", "yes"),
        ("MODEL_SOURCE_S3_URI", "https://bucket"),
        ("MODEL_SOURCE_S3_URI", "s3://"),
        ("MODEL_SOURCE_S3_URI", "s3://Bucket/a b"),
        ("FILE_SERVICE_URL", "files:8080"),
        ("FILE_SERVICE_URL", "http://user" + ":word@files"),
        ("FILE_SERVICE_URL", "http://files/?key=1"),
        ("FILE_SERVICE_INTERNAL_KEY", "two\nlines"),
        ("ENCLAVE", "on"),
        ("ENCLAVE_CID", "3"),  # 0 to 3 are not an enclave's
        ("ENCLAVE_PORT", "0"),
        ("ENCLAVE_MEMORY_MB", "63"),
        ("ENCLAVE_CPU_COUNT", "0"),
        ("KMS_ENDPOINT_URL", "127.0.0.1:8002"),
        ("DEFAULT_MODEL_POOL", "with a space"),
        ("WASH_STEP_SECONDS", "0"),
        ("WASH_SAME_TENANT", "none"),
        ("CERTIFICATES_KEPT", "0"),
        ("GPU_MEMORY_UTILIZATION", "0"),
        ("GPU_MEMORY_UTILIZATION", "1.1"),
        ("MAX_BODY_BYTES", "10"),
        ("METADATA_MAX_DEPTH", "201"),
        ("STREAM_HISTORY_BYTES", "1000"),
    ],
)
def test_bad_values(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be used is refused under its setting's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert {str(error["loc"][0]).upper() for error in caught.value.errors()} == {name}


def test_timeouts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that is longer than the maximum is refused, naming both."""
    monkeypatch.setenv("MAX_TASK_TIMEOUT", "10")
    with pytest.raises(ValidationError, match="DEFAULT_TASK_TIMEOUT is longer than MAX_TASK_TIMEOUT"):
        Settings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"AUTO_FETCH_MODELS": "true"}, "AUTO_FETCH_MODELS needs MODEL_SOURCE_S3_URI or FILE_SERVICE_URL"),
        ({"FILE_SERVICE_URL": "http://files"}, "FILE_SERVICE_URL needs FILE_SERVICE_INTERNAL_KEY"),
    ],
)
def test_sources_agree(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching from nowhere, and a service that will not let us in, are refused at the start."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=message):
        Settings()


def test_tiers_of_uuids() -> None:
    """The last colon separates, so that a device's name may hold others."""
    settings = Settings.model_validate({"gpu_device_difficulty": "MIG:a:b:high"})
    assert settings.gpu_device_difficulty == {"MIG:a:b": Tier.HIGH}


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths count from where the service was started, `~` from the user's home."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("STATE_DIR", "~/state")
    monkeypatch.setenv("RUN_DIR", "run")
    settings = Settings()
    assert settings.state_dir == Path("/home/somebody/state")
    assert settings.run_dir == tmp_path / "run"
    assert settings.model_presets_file == tmp_path / "config/model_presets.yaml"


@pytest.mark.parametrize(
    ("uid", "state", "run"),
    [
        (0, "/var/lib/gpu-server", "/run/gpu-server"),
        (1000, "/xdg/state/gpu-server", "/xdg/run/gpu-server"),
    ],
)
def test_default_folders(uid: int, state: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has the system's folders, everybody else their own."""
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg/state")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/xdg/run")
    monkeypatch.setattr("os.geteuid", lambda: uid)
    settings = Settings()
    assert (str(settings.state_dir), str(settings.run_dir)) == (state, run)


def test_models_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models lie below FSX_MOUNT_POINT unless MODEL_CACHE_DIR says otherwise."""
    monkeypatch.setenv("FSX_MOUNT_POINT", "/mnt/fsx")
    assert Settings().models_dir == Path("/mnt/fsx/models")
    monkeypatch.setenv("MODEL_CACHE_DIR", "/cache")
    assert Settings().models_dir == Path("/cache")


def test_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every limit that the core follows comes from a setting of its own."""
    names = {
        "SESSION_IDLE_TIMEOUT_SECONDS": "idle_timeout",
        "SESSION_MAX_LIFETIME_SECONDS": "max_lifetime",
        "SESSION_QUEUE_MAX_SIZE": "session_queue_max",
        "GPU_WAIT_MAX_SECONDS": "gpu_wait_max",
        "GPU_WAIT_MAX_TASKS": "gpu_wait_max_tasks",
        "STOP_GRACE_SECONDS": "stop_grace",
        "CANCEL_GRACE_SECONDS": "cancel_grace",
        "LIFETIME_GRACE_SECONDS": "lifetime_grace",
        "DISCONNECT_GRACE_SECONDS": "disconnect_grace",
        "TASK_RETENTION_SECONDS": "task_retention",
        "TOMBSTONE_RETENTION_SECONDS": "tombstone_retention",
    }
    for number, name in enumerate(names, start=11):
        monkeypatch.setenv(name, str(number))
    rules = Settings().rules()
    assert rules == Rules(**{name: number for number, name in enumerate(names.values(), start=11)})
    monkeypatch.setenv("WASH_SAME_TENANT", "light")
    assert Settings().rules() == replace(rules, light_wash=True)
