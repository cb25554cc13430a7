"""Puts the service together from its settings: which drivers, which keys, what runs in which order."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import structlog
from ulid import ULID

from gpu_server import presets
from gpu_server.certificates import NodeKeyUnusable, NodeSeal
from gpu_server.core import events as ev
from gpu_server.core.node import Node
from gpu_server.core.rows import RowsUnusable
from gpu_server.core.slots import SlotSpec
from gpu_server.drivers.clock import BootClock, boot_id
from gpu_server.drivers.docker import DockerRuntime
from gpu_server.drivers.gpu_gates import NvmlGates
from gpu_server.drivers.inventory import choose_inventory
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.drivers.kms import AwsKeyService
from gpu_server.drivers.models import store_of
from gpu_server.drivers.process import ProcessRuntime
from gpu_server.drivers.residue import residue_of
from gpu_server.drivers.run_folder import RunFolders
from gpu_server.drivers.scrubber import ContainerScrubber, program_process
from gpu_server.drivers.spool import Spool
from gpu_server.enclave import EnclaveSupervisor, enclave_of, remove_leftover
from gpu_server.enclave_renewal import too_many
from gpu_server.engine import Engine
from gpu_server.inputs import Inputs
from gpu_server.launch import Launcher
from gpu_server.opening import Opening
from gpu_server.ports import (
    Clock,
    ContainerRuntime,
    Enclave,
    GpuScrubber,
    JournalFailing,
    JournalUnusable,
    KeyService,
    ModelStore,
    RuntimeUnreachable,
    SlotInventory,
    WashUnreachable,
)
from gpu_server.reaper import Reaper
from gpu_server.recovery import recover
from gpu_server.settings import Settings
from gpu_server.slot_wash import Equipment
from gpu_server.streams import Streams

SHUTDOWN_EXTRA_SECONDS = 30.0

log = structlog.get_logger()


class StartRefusedByNode(Exception):
    """The service must not start like this. The message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the HTTP edge serves from. `enclave` is None on a node that has none. `seal` is the node's own, by
    which its certificates are known."""

    settings: Settings
    engine: Engine
    presets: presets.Presets
    models: ModelStore
    runtime: ContainerRuntime
    clock: Clock
    internal_key: str
    fingerprint_key: bytes
    seal: NodeSeal
    enclave: Enclave | None = None
    keys: KeyService | None = None
    warnings: tuple[str, ...] = ()
    opening: Opening = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "opening", Opening(self.engine, self.enclave, self.keys))


@asynccontextmanager
async def open_service(
    settings: Settings, *, on_broken: Callable[[], None] = lambda: None
) -> AsyncIterator[Service]:
    """Start everything, and take up what an earlier life left. At the end every session ends and no container
    stays behind; but after `Engine.hand_over`, or a bug, all is left to the next life.

    Raises `StartRefusedByNode`, `PresetsError` or `InventoryError` with what to change.
    """
    with (
        closing(_lock(settings.state_dir)),
        _open_journal(settings.state_dir) as journal,
        ExitStack() as after_all,
    ):
        loaded = _load_presets(settings)
        instance = _instance_id(settings.state_dir)
        runtime = await _choose_runtime(settings, instance)
        inventory = await choose_inventory(
            cpu_slots=settings.cpu_slots,
            device_ids=settings.gpu_device_ids,
            tiers=settings.gpu_device_difficulty,
        )
        slots = await inventory.discover()
        if settings.enclave != "off" and (why := too_many(len(slots))) is not None:
            raise StartRefusedByNode(why)
        seal = _open_seal(settings)
        _own_run_dir(settings.run_dir)
        spool = _open_spool(settings, instance)
        clock, models, inputs = BootClock(), store_of(settings), Inputs(spool)
        streams = Streams(
            max_bytes_each=settings.stream_history_bytes,
            max_bytes_total=settings.stream_total_bytes,
            spool=spool,
        )
        # Fences grow from life to life also where the journal was lost: none begins below the wall clock.
        node = Node(settings.rules(), judge=seal.judge, first_fence=time.time_ns() // 1_000_000)
        # Before the journal says that this boot is known: a start that is refused has not noticed a reboot.
        _enter_runtime(settings.state_dir, runtime.name)
        with _refusing_to_start(settings):
            rebooted = recover(
                node,
                journal=journal,
                spool=spool,
                streams=streams,
                inputs=inputs,
                boot_id=boot_id(),
                wall_offset=time.time() - clock.now(),
            )
        enclave = enclave_of(
            settings,
            runtime.name,
            instance,
            settings.run_dir,
            _docker_host(),
            records=lambda: {slot.spec.id: slot.head for slot in node.slots},
        )
        folders = RunFolders(_session_folders(settings, instance))
        scrubber, lacking = await _choose_scrubber(settings, runtime, instance, slots)
        if scrubber is not None:
            after_all.callback(scrubber.close)
        engine = Engine(
            node,
            journal=journal,
            spool=spool,
            streams=streams,
            runtime=runtime,
            folders=folders,
            inputs=inputs,
            launcher=Launcher(
                find_preset=loaded.get,
                models=models,
                inputs=inputs,
                uid_base=settings.worker_uid_base,
                gpu_memory_utilization=settings.gpu_memory_utilization,
            ),
            clock=clock,
            equipment=Equipment(
                seal=seal,
                residue=residue_of(
                    runtime, folders, served_by=lambda session_id: engine.served_by(session_id)
                ),
                scrubber=scrubber,
                gates=NvmlGates(settings.state_dir, clock) if scrubber is not None else None,
                enclave=enclave,
                step_seconds=settings.wash_step_seconds,
                give_up=settings.wash_give_up_seconds,
            ),
            certificates_kept=settings.certificates_kept,
            on_broken=on_broken,
        )
        keys = AwsKeyService(settings.kms_endpoint_url) if enclave is not None else None
        service = Service(
            settings=settings,
            engine=engine,
            presets=loaded,
            models=models,
            runtime=runtime,
            clock=clock,
            internal_key=settings.internal_api_key or _own_key(settings.state_dir),
            fingerprint_key=spool.secret()[0],
            seal=seal,
            enclave=enclave,
            keys=keys,
            warnings=(*runtime.warnings, *_warnings(settings), *lacking),
        )
        async with models.open(), engine.running():
            _start_work(engine, inventory, settings, enclave, runtime=runtime.name, instance=instance)
            engine.report(ev.NodeStarted(slots=slots, rebooted=rebooted))
            for warning in service.warnings:
                log.warning("service.warning", warning=warning)
            log.info("service.started", runtime=runtime.name, slots=[slot.id for slot in slots])
            in_order = False
            try:
                yield service
                in_order = True
            finally:
                patience = settings.stop_grace_seconds + SHUTDOWN_EXTRA_SECONDS
                # Whoever failed to serve, on a port that is taken for one, must not end what was adopted.
                failed = not in_order and any(node.live_sessions())
                leave = engine.handed_over or engine.broken is not None or failed
                if not leave and await engine.shut_down(patience):
                    (settings.state_dir / "runtime").unlink(missing_ok=True)
                    with suppress(OSError):  # there is none, or it is not empty
                        _session_folders(settings, instance).rmdir()
                if not leave and enclave is not None:  # last: one that hangs takes its time
                    await enclave.stop()
                if keys is not None:
                    keys.close()
        log.info("service.handed_over" if engine.handed_over else "service.stopped")


def new_id(kind: str) -> str:
    """`s_` or `t_` and a ULID: unique, and in order of time."""
    return f"{kind}_{ULID()}"


def made_at(entity_id: str) -> int:
    """When an id was made, in whole seconds since 1970: the same whenever it is asked for, also by another
    life of the service on a machine whose clock was set meanwhile."""
    return ULID.from_str(entity_id.partition("_")[2]).milliseconds // 1000


def _start_work(
    engine: Engine,
    inventory: SlotInventory,
    settings: Settings,
    enclave: EnclaveSupervisor | None,
    *,
    runtime: str,
    instance: str,
) -> None:
    reaper = Reaper(engine, inventory, reading_interval=settings.gpu_metrics_refresh_interval)
    engine.spawn("reaper: ticks", reaper.ticks())
    engine.spawn("reaper: rounds", reaper.rounds())
    engine.spawn("reaper: runtime", reaper.watch_runtime())
    if enclave is not None:
        engine.spawn("enclave", enclave.run())
    else:  # an earlier life may have had one
        engine.spawn(
            "enclave: leftover", remove_leftover(runtime, instance, settings.run_dir, _docker_host())
        )


def _open_seal(settings: Settings) -> NodeSeal:
    try:
        return NodeSeal.open(
            settings.state_dir,
            enclave=settings.enclave != "off",
            allow_simulated=settings.enclave == "simulated",
        )
    except NodeKeyUnusable as error:
        raise StartRefusedByNode(str(error)) from error


async def _choose_scrubber(
    settings: Settings, runtime: ContainerRuntime, instance: str, slots: tuple[SlotSpec, ...]
) -> tuple[GpuScrubber | None, tuple[str, ...]]:
    """What scrubs the GPUs of this node, and a warning where it will not be able to: then no GPU gets out of
    its wash but into quarantine."""
    limit = settings.wash_step_seconds
    if not any(slot.is_gpu for slot in slots):
        return None, ()
    if runtime.name == "process":
        return program_process(limit=limit), ()
    scrubber = ContainerScrubber(instance, settings.carwash_image, limit=limit, docker_host=_docker_host())
    try:
        missing = await scrubber.missing()
    except WashUnreachable as error:
        missing = str(error)
    return scrubber, (f"no GPU can be washed: {missing}",) if missing is not None else ()


def _docker_host() -> str | None:
    return os.environ.get("DOCKER_HOST") or None


async def _choose_runtime(settings: Settings, instance: str) -> ContainerRuntime:
    """Docker, or processes where there is certainly neither an engine nor a GPU. Fails closed."""
    if settings.runtime == "process" or (settings.runtime == "auto" and not _docker_belongs_here()):
        return ProcessRuntime(instance, _session_folders(settings, instance), _working_dir(settings))
    runtime = DockerRuntime(instance, docker_host=_docker_host())
    try:
        await runtime.ping()
    except RuntimeUnreachable as error:
        await runtime.close()
        raise StartRefusedByNode(
            f"the Docker engine does not answer ({error}). Start it, or set RUNTIME=process to run workers"
            " as plain processes, which isolates nothing."
        ) from error
    return runtime


def _own_run_dir(run_dir: Path) -> None:
    """RUN_DIR belongs to this user alone to write: whoever else could, could swap a session's socket."""
    try:
        run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        status = run_dir.stat()
    except OSError as error:
        raise StartRefusedByNode(f"RUN_DIR {run_dir} cannot be used: {error}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StartRefusedByNode(
            f"RUN_DIR {run_dir} must belong to the service, and nobody else may write there"
        )


@contextmanager
def _refusing_to_start(settings: Settings) -> Iterator[None]:
    """What an earlier life left cannot be used: say what, and touch nothing."""
    try:
        yield
    except OSError as error:
        raise StartRefusedByNode(f"RUN_DIR {settings.run_dir} cannot be used: {error}") from error
    except (JournalUnusable, JournalFailing) as error:
        raise StartRefusedByNode(f"the journal in STATE_DIR cannot be used: {error}") from error
    except RowsUnusable as error:
        path = settings.state_dir / "journal.db"
        raise StartRefusedByNode(
            f"the journal {path} cannot be used: {error}. To go on without it, move it away: the service then"
            " starts without memory of its sessions, and removes their containers."
        ) from error


@contextmanager
def _open_journal(state_dir: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(state_dir / "journal.db")
    try:
        journal.open()
    except JournalUnusable as error:
        raise StartRefusedByNode(f"the journal in STATE_DIR cannot be used: {error}") from error
    try:
        yield journal
    finally:
        with suppress(JournalFailing):  # what could not be written until now
            journal.write(())
        journal.close()


def _load_presets(settings: Settings) -> presets.Presets:
    loaded = presets.load(settings.model_presets_file, settings.allowed_docker_images)
    for model_id, name, preset in loaded:
        if not loaded.allows(preset.docker_image):
            log.warning("preset.image_not_allowed", model_id=model_id, preset=name, image=preset.docker_image)
    return loaded


def _open_spool(settings: Settings, instance: str) -> Spool:
    """Beside the run folders, and closed to everybody else."""
    spool = Spool(settings.run_dir / f"{instance[:8]}.kept")
    with _refusing_to_start(settings):
        spool.open()
    return spool


def _enter_runtime(state_dir: Path, name: str) -> None:
    """Note which runtime has workers from here on. Only that one can see, and remove, what a crash leaves."""
    note = state_dir / "runtime"
    before = note.read_text().strip() if note.exists() else name
    if before != name:
        raise StartRefusedByNode(
            f"this service last ran with RUNTIME={before} and was not stopped in order, so it may have left"
            f" workers that RUNTIME={name} cannot see. Start it once with RUNTIME={before}."
        )
    note.write_text(name + "\n")


def _session_folders(settings: Settings, instance: str) -> Path:
    """Where this instance's run folders are: what else lies in RUN_DIR is not ours to wash. Kept short, since
    a socket's path may have 107 bytes."""
    return settings.run_dir / instance[:8]


def _docker_belongs_here() -> bool:
    """Whether this machine has a Docker socket, names an engine, or has a GPU that needs one."""
    places = (Path("/var/run/docker.sock"), Path("/dev/nvidiactl"))
    return bool(os.environ.get("DOCKER_HOST")) or any(place.exists() for place in places)


def _working_dir(settings: Settings) -> Path:
    """Process commands are relative to the folder that holds `config/`."""
    return settings.model_presets_file.parent.parent


def _lock(state_dir: Path) -> IO[str]:
    """One service for one STATE_DIR: a second one is refused."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        raise StartRefusedByNode(f"STATE_DIR {state_dir} cannot be used: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StartRefusedByNode(f"another service uses STATE_DIR {state_dir}") from error
    return lock


def _instance_id(state_dir: Path) -> str:
    """The name by which this node's containers are known, made once."""
    return _kept(state_dir / "instance_id", lambda: secrets.token_hex(8))


def _own_key(state_dir: Path) -> str:
    """The internal key of a service that was given none; made once, and only its place is told."""
    path = state_dir / "internal_api_key"
    key = _kept(path, lambda: secrets.token_urlsafe(32))
    log.warning(
        "service.internal_api_key", message="INTERNAL_API_KEY is not set; using the key in", path=str(path)
    )
    return key


def _kept(path: Path, make: Callable[[], str]) -> str:
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        text = make()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
    if not text:
        raise StartRefusedByNode(f"{path} is empty; remove it to have a new one made")
    return text


def _warnings(settings: Settings) -> tuple[str, ...]:
    found = []
    if os.geteuid() != 0:
        found.append("the service is not root: all workers run with its own uid")
    if not _on_tmpfs(settings.run_dir):
        found.append(f"RUN_DIR {settings.run_dir} is not on a tmpfs: run folders reach the disk")
    if settings.enclave == "simulated":
        found.append("the enclave is simulated: its attestation proves nothing, and a real KMS refuses it")
    return tuple(found)


def _on_tmpfs(path: Path) -> bool:
    """Whether the file system that holds `path` is a tmpfs, by /proc/mounts; False where there is none."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    resolved = path.resolve()
    holding = [(Path(m[1]), m[2]) for m in mounts if resolved.is_relative_to(m[1])]
    deepest = max(holding, key=lambda mount: len(mount[0].parts), default=(Path("/"), ""))
    return deepest[1] == "tmpfs"
