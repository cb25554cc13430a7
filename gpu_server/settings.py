"""Settings, from the environment and `.env`. `.env.example` and README document every one of them."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gpu_server.core.sessions import Rules
from gpu_server.core.slots import Tier


def _comma_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _tiers(value: object) -> object:
    """`0:low,1:high` -> {"0": "low", "1": "high"}."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition(":") for part in value.split(",") if part.strip()]
    if any(not device.strip() for device, _, _ in pairs):
        raise ValueError("write it as device:tier, for example 0:low,1:high")
    return {device.strip(): tier.strip() for device, _, tier in pairs}


def _s3_uri(text: str) -> str:
    """s3://bucket or s3://bucket/prefix, without a slash at the end."""
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/\s]+)*/?", text):
        raise ValueError("write it as s3://bucket or s3://bucket/prefix")
    return text.rstrip("/")


def _http_url(text: str) -> str:
    """An address without anything that would be lost or told on: user, password, query."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("write it as http://host:port or https://host/path")
    if parts.username is not None or parts.password is not None:
        raise ValueError("leave user and password out; the key has a setting of its own")
    return text.rstrip("/")


def _header_text(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("only visible ASCII characters, without spaces, can be sent in a header")
    return text


POOL_NAME = r"^[A-Za-z0-9._:/-]{1,128}$"
MAX_SECONDS = 1e9
"""About 30 years: a time that is later than that, or infinite, has no date."""
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
SecondsFromZero = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)]
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
S3Uri = Annotated[str, AfterValidator(_s3_uri)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]


def _default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/gpu-server")
    return Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")) / "gpu-server"


def _default_run_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/run/gpu-server")
    return Path(os.environ.get("XDG_RUNTIME_DIR", f"/tmp/gpu-server-{os.geteuid()}")) / "gpu-server"


class Settings(BaseSettings):
    """Every setting of the service. Times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    http_host: str = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    http_max_connections: Annotated[int, Field(ge=1)] = 4096
    internal_api_key: Annotated[str | None, Field(min_length=16)] = None

    runtime: Literal["auto", "docker", "process"] = "auto"
    state_dir: AbsolutePath = Field(default_factory=_default_state_dir)
    run_dir: AbsolutePath = Field(default_factory=_default_run_dir)
    model_presets_file: AbsolutePath = Path("config/model_presets.yaml")
    allowed_docker_images: CommaList = ("gpu-server/*",)
    worker_uid_base: Annotated[int, Field(ge=1000, le=2_000_000_000)] = 20000

    gpu_device_ids: CommaList | None = None
    gpu_device_difficulty: Annotated[dict[str, Tier], NoDecode, BeforeValidator(_tiers)] = Field(
        default_factory=dict
    )
    cpu_slots: Annotated[int, Field(ge=0, le=1024)] = 2
    gpu_metrics_refresh_interval: Seconds = 10.0

    fsx_mount_point: AbsolutePath = Path("/fsx")
    model_cache_dir: AbsolutePath | None = None
    models_require_manifest: bool = False
    model_prefetch: Literal["auto", "off"] = "auto"
    auto_fetch_models: bool = False
    model_source_s3_uri: S3Uri | None = None
    file_service_url: HttpUrl | None = None
    file_service_internal_key: Annotated[str | None, AfterValidator(_header_text)] = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9

    enclave: Literal["off", "simulated", "nitro"] = "off"
    enclave_cid: Annotated[int, Field(ge=4, le=(1 << 32) - 2)] = 16
    enclave_port: Annotated[int, Field(ge=1, le=(1 << 32) - 2)] = 5000
    enclave_image: str = "gpu-server/enclave:dev"
    enclave_runner_image: str = "gpu-server/enclave-runner:dev"
    enclave_eif_path: AbsolutePath = Path("/var/lib/gpu-server/enclave.eif")
    enclave_memory_mb: Annotated[int, Field(ge=64)] = 512
    enclave_cpu_count: Annotated[int, Field(ge=1)] = 2
    kms_endpoint_url: HttpUrl | None = None
    default_model_pool: Annotated[str, Field(pattern=POOL_NAME)] = "default"

    session_idle_timeout_seconds: Seconds = 300.0
    session_max_lifetime_seconds: Seconds = 3600.0
    session_queue_max_size: Annotated[int, Field(ge=0)] = 5
    default_task_timeout: Seconds = 300.0
    max_task_timeout: Seconds = 3600.0
    gpu_wait_max_seconds: SecondsFromZero = 600.0
    gpu_wait_max_tasks: Annotated[int, Field(ge=0)] = 100
    stop_grace_seconds: SecondsFromZero = 10.0
    cancel_grace_seconds: Seconds = 10.0
    lifetime_grace_seconds: Seconds = 30.0
    shutdown_grace_seconds: SecondsFromZero = 30.0
    disconnect_grace_seconds: Annotated[float, Field(ge=1, le=MAX_SECONDS)] = 30.0
    task_retention_seconds: Seconds = 600.0
    tombstone_retention_seconds: Seconds = 3600.0

    wash_step_seconds: Seconds = 60.0
    wash_give_up_seconds: Seconds = 300.0
    wash_same_tenant: Literal["full", "light"] = "full"
    carwash_image: str = "gpu-server/carwash:dev"
    certificates_kept: Annotated[int, Field(ge=1)] = 1000

    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    metadata_max_depth: Annotated[int, Field(ge=1, le=200)] = 32
    stream_history_bytes: Annotated[int, Field(ge=1 << 16)] = 8 << 20
    stream_total_bytes: Annotated[int, Field(ge=1 << 20)] = 256 << 20
    sse_ping_seconds: Seconds = 15.0

    @model_validator(mode="after")
    def _timeouts_agree(self) -> Settings:
        if self.default_task_timeout > self.max_task_timeout:
            raise ValueError("DEFAULT_TASK_TIMEOUT is longer than MAX_TASK_TIMEOUT")
        return self

    @model_validator(mode="after")
    def _models_have_a_source(self) -> Settings:
        if self.file_service_url is not None and self.file_service_internal_key is None:
            raise ValueError("FILE_SERVICE_URL needs FILE_SERVICE_INTERNAL_KEY")
        if self.auto_fetch_models and not (self.model_source_s3_uri or self.file_service_url):
            raise ValueError("AUTO_FETCH_MODELS needs MODEL_SOURCE_S3_URI or FILE_SERVICE_URL")
        return self

    @property
    def models_dir(self) -> Path:
        return self.model_cache_dir or self.fsx_mount_point / "models"

    @property
    def node_name(self) -> str:
        return socket.gethostname()

    def rules(self) -> Rules:
        """The limits that the core follows."""
        return Rules(
            idle_timeout=self.session_idle_timeout_seconds,
            max_lifetime=self.session_max_lifetime_seconds,
            session_queue_max=self.session_queue_max_size,
            gpu_wait_max=self.gpu_wait_max_seconds,
            gpu_wait_max_tasks=self.gpu_wait_max_tasks,
            stop_grace=self.stop_grace_seconds,
            cancel_grace=self.cancel_grace_seconds,
            lifetime_grace=self.lifetime_grace_seconds,
            disconnect_grace=self.disconnect_grace_seconds,
            task_retention=self.task_retention_seconds,
            tombstone_retention=self.tombstone_retention_seconds,
            light_wash=self.wash_same_tenant == "light",
        )
