"""Putting the service together: what it refuses to start with, what it keeps, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import time
from base64 import b64decode
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from gpu_server import presets, service
from gpu_server.core.notices import UNNUMBERED
from gpu_server.core.sessions import TaskType
from gpu_server.core.slots import SlotSpec, Tier
from gpu_server.drivers.inventory import CpuInventory
from gpu_server.drivers.journal import SqliteJournal
from gpu_server.drivers.process import ProcessRuntime
from gpu_server.enclave import EnclaveSupervisor
from gpu_server.engine import Submission
from gpu_server.ports import InventoryError, JournalFailing, SlotInventory, SlotReading, WashUnreachable
from gpu_server.sealed.attestation import verify
from gpu_server.sealed.wash import verify_chain
from gpu_server.service import Service, StartRefusedByNode, made_at, new_id, open_service
from gpu_server.settings import Settings
from tests.app.reading import Event, all_events, parse
from tests.fakes.gpu_wash import FakeScrubber

ROOT = Path(__file__).parents[2]
PRESETS = f"""
models:
  echo:
    stream:
      docker_image: gpu-server/echo:dev
      process_command: [python, {ROOT}/worker_images/echo/worker.py]
      model: none
    forbidden:
      docker_image: elsewhere/image
"""


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots without a device, whatever this machine has; workers that find the SDK."""

    async def choose(*, cpu_slots: int, **_: Any) -> SlotInventory:
        return CpuInventory(cpu_slots, {})

    monkeypatch.setattr(service, "choose_inventory", choose)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "worker_images/sdk"))


def settings_in(tmp_path: Path, **changes: Any) -> Settings:
    file = tmp_path / "config" / "presets.yaml"
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        file.write_text(PRESETS)
    given = {
        "runtime": "process",
        "state_dir": tmp_path / "state",
        "run_dir": tmp_path / "run",
        "model_presets_file": file,
        "stop_grace_seconds": 0.5,
    }
    return Settings(_env_file=None, **(given | changes))


def submit(opened: Service, session_id: str | None = None, **metadata: Any) -> str:
    """One task of the echo worker; its id."""
    return opened.engine.submit(
        Submission(
            task_id=new_id("t"),
            tenant="a",
            task_type=TaskType.SESSION,
            tier=Tier.LOW,
            model_id="echo",
            task_preset="stream",
            session_id=session_id,
            new_session_id=new_id("s"),
            timeout=60,
            body=orjson.dumps({"metadata": metadata}),
        )
    )


async def events_of(opened: Service, task_id: str) -> list[Event]:
    stream = opened.engine.streams.get(task_id)
    assert stream is not None
    async with asyncio.timeout(60):
        return await all_events(stream)


async def run(opened: Service, session_id: str | None = None, **metadata: Any) -> list[Event]:
    """One task of the echo worker, to its end."""
    return await events_of(opened, submit(opened, session_id, **metadata))


async def saw(opened: Service, task_id: str, text: str) -> None:
    """Wait until a task has said this."""
    stream = opened.engine.streams.get(task_id)
    assert stream is not None
    async with asyncio.timeout(60):
        async for chunk in stream.read():
            if any(event.data.get("delta") == text for event in parse(chunk)):
                return


def said(events: list[Event]) -> str:
    return "".join(event.data["delta"] for event in events if event.name == "text_delta")


def kept_in(tmp_path: Path) -> Path:
    """Where this node's spool is."""
    (kept,) = (tmp_path / "run").glob("*.kept")
    return kept


async def test_a_real_worker(tmp_path: Path) -> None:
    """The parts together run a task in a real process, and at the end leave neither process nor run folder,
    but what can still be read of the task."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        events = await run(opened, prompt="hello there", log="a line")
        assert [event.data["delta"] for event in events if event.name == "text_delta"] == ["hello ", "there"]
        assert {"stream": "stdout", "line": "a line"} in [event.data for event in events]
        assert events[-1].data["status"] == "completed"
        (worker,) = await opened.runtime.list_workers()
        assert worker.running
    (left,) = (tmp_path / "run").iterdir()
    assert left == kept_in(tmp_path)
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert sorted(path.name for path in (tmp_path / "state").glob("journal*")) == ["journal.db"]
    looking = ProcessRuntime("x", settings.run_dir, tmp_path)
    assert await looking.list_workers() == ()


async def test_leftovers_of_a_former_life(tmp_path: Path) -> None:
    """What an earlier life left is gone before a lease; what is not this service's is left alone."""
    async with open_service(settings_in(tmp_path)):
        (own,) = (tmp_path / "state" / "instance_id").read_text().split()
    old, others = tmp_path / "run" / own[:8] / "s_old", tmp_path / "run" / "s_others"
    for folder in (old, others):
        (folder / "share").mkdir(parents=True)
        (folder / "share" / "file").write_text("x")
    async with open_service(settings_in(tmp_path)) as opened:
        events = await run(opened, prompt="x")
        assert events[-1].data["status"] == "completed"
        assert (old.exists(), others.exists()) == (False, True)


async def test_another_runtime_after_a_crash(tmp_path: Path) -> None:
    """Another runtime cannot see what a crash left, so it does not start; after an orderly end it may."""
    note = tmp_path / "state" / "runtime"
    async with open_service(settings_in(tmp_path)):
        assert note.read_text() == "process\n"
    assert not note.exists()
    note.write_text("docker\n")
    with pytest.raises(StartRefusedByNode, match="RUNTIME=docker"):
        async with open_service(settings_in(tmp_path)):
            pass


# -- another life -----------------------------------------------------------------------------------------


async def test_handed_over(tmp_path: Path) -> None:
    """The next life of the service finds worker, session and task as they are, and goes on with them."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        task_id = submit(opened, prompt=" ".join(f"w{n}" for n in range(12)), delay_ms=50)
        await saw(opened, task_id, "w2 ")
        (worker,) = await opened.runtime.list_workers()
        session_id = opened.engine.node.tasks[task_id].session_id
        secret = opened.fingerprint_key
        opened.engine.hand_over()
    assert (tmp_path / "state" / "runtime").read_text() == "process\n"
    async with open_service(settings) as opened:
        assert (await opened.runtime.list_workers()) == (worker,)
        assert opened.fingerprint_key == secret
        events = await events_of(opened, task_id)
        assert said(events) == " ".join(f"w{n}" for n in range(12))
        numbered = [event.number for event in events if event.name not in UNNUMBERED]
        assert numbered == list(range(1, len(numbered) + 1))
        assert events[-1].data["status"] == "completed"
        assert said(await run(opened, session_id, prompt="more")) == "more"
        assert (await opened.runtime.list_workers()) == (worker,)
    assert list((tmp_path / "run").iterdir()) == [kept_in(tmp_path)]
    assert not (tmp_path / "state" / "runtime").exists()


async def test_after_a_bug(tmp_path: Path) -> None:
    """A service that has met a bug leaves everything to its next life too."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        await run(opened, prompt="x")
        (session,) = opened.engine.node.sessions.values()
        (worker,) = await opened.runtime.list_workers()
        opened.engine._break("a bug")
    async with open_service(settings) as opened:
        assert said(await run(opened, session.id, prompt="y")) == "y"
        assert (await opened.runtime.list_workers()) == (worker,)


async def test_who_cannot_serve_ends_nothing(tmp_path: Path) -> None:
    """A life that fails before it is asked to end, on a port that is taken for one, leaves what it found."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        await run(opened, prompt="x")
        (session,) = opened.engine.node.sessions.values()
        opened.engine.hand_over()
    with pytest.raises(ExceptionGroup) as failed:
        async with open_service(settings):
            raise OSError("address already in use")
    assert failed.group_contains(OSError, match="address already in use")
    async with open_service(settings) as opened:
        assert said(await run(opened, session.id, prompt="y")) == "y"


async def test_after_an_orderly_end(tmp_path: Path) -> None:
    """What has ended can be looked at and read in the next life."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        task_id = submit(opened, prompt="hello")
        events = await events_of(opened, task_id)
    async with open_service(settings) as opened:
        assert await events_of(opened, task_id) == [e for e in events if e.name not in UNNUMBERED]
        (session,) = opened.engine.node.sessions.values()
        assert (session.state, session.close_reason) == ("closed", "shutdown")


async def test_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another boot of the machine is noticed, also where the first start of it was refused."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        await run(opened, prompt="x")
        opened.engine.hand_over()
    monkeypatch.setattr(service, "boot_id", lambda: "another boot")
    note = tmp_path / "state" / "runtime"
    note.write_text("docker\n")
    with pytest.raises(StartRefusedByNode, match="RUNTIME=docker"):
        async with open_service(settings):
            pass
    note.write_text("process\n")
    async with open_service(settings) as opened:
        (session,) = opened.engine.node.sessions.values()
        assert session.close_reason == "node_restarted"


async def test_a_journal_that_is_damaged(tmp_path: Path) -> None:
    """The service does not start, says what to do, and touches nothing. Without the journal it starts."""
    settings = settings_in(tmp_path)
    async with open_service(settings) as opened:
        await run(opened, prompt="x")
    journal = tmp_path / "state" / "journal.db"
    content = bytearray(journal.read_bytes())
    content[4096:4196] = b"x" * 100
    journal.write_bytes(content)
    before = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    spooled = {path: path.read_bytes() for path in kept_in(tmp_path).iterdir()}
    with pytest.raises(StartRefusedByNode, match=r"(?s)journal\.db is damaged.*move it away"):
        async with open_service(settings):
            pass
    assert {path: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
    assert {path: path.read_bytes() for path in kept_in(tmp_path).iterdir()} == spooled
    journal.rename(tmp_path / "damaged.db")
    async with open_service(settings) as opened:
        assert opened.engine.node.tasks == {}
        assert {path.name for path in kept_in(tmp_path).iterdir()} == {".secret"}


async def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    """A journal that is whole, and makes no sense, is refused too, and says which file it is."""
    settings = settings_in(tmp_path)
    async with open_service(settings):
        pass
    with closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as connection:
        connection.execute("INSERT INTO tasks (id, row) VALUES ('t_1', '{}')")
        connection.commit()
    with pytest.raises(StartRefusedByNode, match=r"journal\.db cannot be used"):
        async with open_service(settings):
            pass


async def test_a_journal_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that could not remember anything does not start."""

    def write(journal: SqliteJournal, changes: Any) -> None:
        raise JournalFailing("database or disk is full")

    monkeypatch.setattr(SqliteJournal, "write", write)
    with pytest.raises(StartRefusedByNode, match="database or disk is full"):
        async with open_service(settings_in(tmp_path)):
            pass


async def test_a_spool_that_is_not_ours_alone(tmp_path: Path) -> None:
    """Whoever could read there could read prompts."""
    settings = settings_in(tmp_path)
    async with open_service(settings):
        pass
    kept_in(tmp_path).chmod(0o755)
    with pytest.raises(StartRefusedByNode, match=r"RUN_DIR .* 0700"):
        async with open_service(settings):
            pass


# -- starting ---------------------------------------------------------------------------------------------


async def test_a_run_dir_that_others_may_write(tmp_path: Path) -> None:
    """Whoever could write there could swap a session's socket."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(StartRefusedByNode, match="nobody else may write"):
        async with open_service(settings_in(tmp_path)):
            pass


async def test_one_service_for_a_state_dir(tmp_path: Path) -> None:
    """A second service on the same STATE_DIR is refused, until the first has ended."""
    settings = settings_in(tmp_path)
    async with open_service(settings):
        with pytest.raises(StartRefusedByNode, match="another service uses STATE_DIR"):
            async with open_service(settings):
                pass
    async with open_service(settings):
        pass


async def test_the_key_that_was_not_given(tmp_path: Path) -> None:
    """A service without a key makes one, readable by its owner alone, and keeps it; nothing logs it."""
    settings = settings_in(tmp_path)
    keys = []
    for _ in range(2):
        async with open_service(settings) as opened:
            keys.append(opened.internal_key)
    assert keys[0] == keys[1]
    assert len(keys[0]) >= 32
    path = tmp_path / "state" / "internal_api_key"
    assert path.read_text() == keys[0] + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    async with open_service(settings_in(tmp_path, state_dir=tmp_path / "other")) as opened:
        assert opened.internal_key != keys[0]


async def test_nothing_logs_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log says where the key is, not what it is."""
    async with open_service(settings_in(tmp_path)) as opened:
        key = opened.internal_key
    logged = "".join(capsys.readouterr())
    assert str(tmp_path / "state" / "internal_api_key") in logged
    assert key not in logged


async def test_the_key_that_was_given(tmp_path: Path) -> None:
    """A key from the settings is used and not written down."""
    async with open_service(settings_in(tmp_path, internal_api_key="k" * 20)) as opened:
        assert opened.internal_key == "k" * 20
    assert not (tmp_path / "state" / "internal_api_key").exists()


async def test_a_node_key_that_is_damaged(tmp_path: Path) -> None:
    """The service does not start, says what to do, and does not make another one."""
    (tmp_path / "state").mkdir(mode=0o700)
    key = tmp_path / "state" / "node_key"
    key.write_bytes(b"x" * 64)
    key.chmod(0o600)
    with pytest.raises(StartRefusedByNode, match="node_key is damaged"):
        async with open_service(settings_in(tmp_path)):
            pass
    assert key.read_bytes() == b"x" * 64


async def test_more_slots_than_an_enclave_can_name(tmp_path: Path) -> None:
    """A document names the newest record of each slot: where that cannot be, the service says so at once."""
    with pytest.raises(StartRefusedByNode, match="this node has 15 slots"):
        async with open_service(settings_in(tmp_path, cpu_slots=15, enclave="simulated")):
            pass
    async with open_service(settings_in(tmp_path, cpu_slots=15)) as opened:
        assert len(opened.engine.node.slots) == 15


GPU = SlotSpec(id="0", uuid="GPU-0001", name="GPU", memory_mb=1024, is_gpu=True)


class OneGpu:
    """A machine that has a GPU."""

    async def discover(self) -> tuple[SlotSpec, ...]:
        return (GPU,)

    async def readings(self) -> dict[str, SlotReading]:
        return {"0": SlotReading(memory_used_mb=0)}


class LackingScrubber(FakeScrubber):
    """Without its image."""

    why: str | Exception | None = "there is no image a/carwash on this machine"

    async def missing(self) -> str | None:
        if isinstance(self.why, Exception):
            raise self.why
        return self.why


@pytest.mark.parametrize("why", ["there is no image", WashUnreachable("no answer"), None])
async def test_the_scrubber(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str | Exception | None
) -> None:
    """Where no GPU can be scrubbed that is told at the start; a node without GPUs needs no scrubber."""
    made: list[tuple[Any, ...]] = []

    class Runtime:
        name = "docker"

    def scrubber(instance: str, image: str, **options: Any) -> LackingScrubber:
        made.append((instance, image, options))
        found = LackingScrubber()
        found.why = why
        return found

    monkeypatch.setattr(service, "ContainerScrubber", scrubber)
    settings = settings_in(tmp_path, carwash_image="a/carwash", wash_step_seconds=7)
    found, lacking = await service._choose_scrubber(settings, Runtime(), "i", (GPU,))  # type: ignore[arg-type]
    assert isinstance(found, LackingScrubber)
    assert lacking == ((f"no GPU can be washed: {why}",) if why is not None else ())
    assert made == [("i", "a/carwash", {"limit": 7, "docker_host": None})]
    nothing = await service._choose_scrubber(settings, Runtime(), "i", ())  # type: ignore[arg-type]
    assert nothing == (None, ())


async def test_a_gpu_without_a_scrub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is not served before it was washed, and locked away where that cannot be done."""

    async def choose(**_: Any) -> SlotInventory:
        return OneGpu()

    monkeypatch.setattr(service, "choose_inventory", choose)
    async with open_service(settings_in(tmp_path, wash_give_up_seconds=0.05)) as opened:
        (slot,) = opened.engine.node.slots
        async with asyncio.timeout(60):
            while slot.state != "quarantined":  # noqa: ASYNC110 (it comes by itself)
                await asyncio.sleep(0.02)
        assert "could not be washed within 0.05 s: scrub: " in (slot.fault or "")
        assert opened.engine.journal.certificates("0", 1) == ()


@pytest.mark.parametrize("name", ["internal_api_key", "instance_id"])
async def test_an_empty_file(tmp_path: Path, name: str) -> None:
    """An empty key or identity is no key and no identity."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / name).write_text("\n")
    with pytest.raises(StartRefusedByNode, match=f"{name} is empty"):
        async with open_service(settings_in(tmp_path)):
            pass


async def test_the_instance_is_kept(tmp_path: Path) -> None:
    """A node is the same instance in each of its lives, and finds its own workers by that."""
    settings = settings_in(tmp_path)
    async with open_service(settings):
        first = (tmp_path / "state" / "instance_id").read_text()
    async with open_service(settings):
        assert (tmp_path / "state" / "instance_id").read_text() == first


async def test_fences_grow_from_life_to_life(tmp_path: Path) -> None:
    """No lease of a later life has a fence of an earlier one, also where the journal was lost."""
    settings = settings_in(tmp_path)
    fences = []
    for life in range(3):
        if life == 2:
            (tmp_path / "state" / "journal.db").unlink()
        async with open_service(settings) as opened:
            await run(opened, prompt="x")
            fences.append(list(opened.engine.node.sessions.values())[-1].fence)
    assert fences[0] < fences[1] < fences[2]


@pytest.mark.parametrize("runtime", ["docker", "auto"])
async def test_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """Where Docker is wanted, or named, and does not answer, the service says what to do, and does not fall
    back to processes."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(StartRefusedByNode, match=r"does not answer .* RUNTIME=process"):
        async with open_service(settings_in(tmp_path, runtime=runtime)):
            pass
    async with open_service(settings_in(tmp_path)):
        pass


async def test_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has neither an engine nor a GPU, `auto` is processes."""
    monkeypatch.setattr(service, "_docker_belongs_here", lambda: False)
    async with open_service(settings_in(tmp_path, runtime="auto")) as opened:
        assert opened.runtime.name == "process"


async def test_presets_with_a_mistake(tmp_path: Path) -> None:
    """A presets file with a mistake stops the start, with its line; the lock is let go of."""
    settings = settings_in(tmp_path)
    settings.model_presets_file.write_text("models:\n  m:\n    p: {}\n")
    with pytest.raises(presets.PresetsError, match=r"presets\.yaml:3: models\.m\.p\.docker_image"):
        async with open_service(settings):
            pass
    settings.model_presets_file.write_text(PRESETS)
    async with open_service(settings):
        pass


async def test_no_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that cannot be listed stop the start."""

    async def choose(**_: Any) -> SlotInventory:
        raise InventoryError("NVML fails")

    monkeypatch.setattr(service, "choose_inventory", choose)
    with pytest.raises(InventoryError):
        async with open_service(settings_in(tmp_path)):
            pass


async def test_an_image_that_is_not_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset whose image is not allowed is told at the start and does not stop it."""
    async with open_service(settings_in(tmp_path)):
        pass
    logged = [line for line in "".join(capsys.readouterr()).splitlines() if "image_not_allowed" in line]
    assert len(logged) == 1
    assert "elsewhere/image" in logged[0]


async def test_a_state_dir_that_is_a_file(tmp_path: Path) -> None:
    """A STATE_DIR that cannot be used is refused by its name."""
    (tmp_path / "state").write_text("")
    with pytest.raises(StartRefusedByNode, match=r"STATE_DIR .* cannot be used"):
        async with open_service(settings_in(tmp_path)):
            pass


async def test_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What weakens the isolation is told: processes, a service that is not root, folders on a disk."""
    async with open_service(settings_in(tmp_path)) as opened:
        assert any("no isolation" in warning for warning in opened.warnings)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(service, "_on_tmpfs", lambda path: False)
    assert [warning.split(":")[0] for warning in service._warnings(settings_in(tmp_path))] == [
        "the service is not root",
        f"RUN_DIR {tmp_path / 'run'} is not on a tmpfs",
    ]
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(service, "_on_tmpfs", lambda path: True)
    assert service._warnings(settings_in(tmp_path)) == ()


MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /run tmpfs rw 0 0
ext4 /run/disk ext4 rw 0 0
tmpfs /runner tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/run/gpu-server", True), ("/run", True), ("/run/disk/x", False), ("/runners", False), ("/x", False)],
)
def test_tmpfs(path: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost mount decides whether a folder is on a tmpfs."""
    monkeypatch.setattr(Path, "read_text", lambda self: MOUNTS)
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    assert service._on_tmpfs(Path(path)) is expected


def test_ids() -> None:
    """Ids are unique and tell their kind."""
    ids = {new_id("t") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(found) == 28 and found.startswith("t_") for found in ids)


def test_an_id_says_when_it_was_made() -> None:
    """In whole seconds since 1970, and always the same."""
    assert made_at("t_01ARZ3NDEKTSV4RRFFQ69G5FAV") == 1469922850
    assert abs(made_at(new_id("s")) - time.time()) < 60


# -- the enclave ------------------------------------------------------------------------------------------


async def healthy(opened: Service) -> bytes:
    """Wait until the enclave is there; its epoch."""
    assert opened.enclave is not None
    async with asyncio.timeout(60):
        while not opened.enclave.health.healthy:  # noqa: ASYNC110 (it comes by itself)
            await asyncio.sleep(0.02)
    epoch = opened.enclave.health.epoch
    assert epoch is not None
    return epoch


async def test_a_simulated_enclave(tmp_path: Path) -> None:
    """It is started beside the service, attests itself, and ends with it; everybody is told what it is."""
    settings = settings_in(tmp_path, enclave="simulated")
    async with open_service(settings) as opened:
        epoch = await healthy(opened)
        assert any("simulated" in warning for warning in opened.warnings)
        assert opened.enclave is not None
        document = await opened.enclave.attest(bytes(32))
        found = verify(document, nonce=bytes(32), pcrs={}, allow_simulated=True)
        assert (found.epoch, found.simulated) == (epoch, True)
        assert opened.keys is not None
    assert not opened.enclave.health.healthy
    async with open_service(settings) as opened:
        assert await healthy(opened) != epoch


async def test_an_enclave_outlives_a_handover(tmp_path: Path) -> None:
    """The next version takes it up as it is, where no slot is washed, and one that wants none removes it."""
    settings = settings_in(tmp_path, enclave="simulated", cpu_slots=1)
    async with open_service(settings) as opened:
        await run(opened, prompt="x")
        epoch = await healthy(opened)
        opened.engine.hand_over()
    async with open_service(settings) as opened:
        assert await healthy(opened) == epoch
        opened.engine.hand_over()
    (socket,) = (tmp_path / "run").glob("*.enclave/enclave.sock")
    async with open_service(settings_in(tmp_path)) as opened:
        assert (opened.enclave, opened.keys) == (None, None)
        async with asyncio.timeout(60):
            while socket.exists():  # noqa: ASYNC110 (it goes by itself)
                await asyncio.sleep(0.02)


async def test_certificates(tmp_path: Path) -> None:
    """Every lease of every life ends with a certificate; those of a slot are one chain, which is verified by
    the node's key alone, and each has a document of an enclave that was born with it."""
    settings = settings_in(tmp_path, enclave="simulated", cpu_slots=1)
    for _ in range(2):
        async with open_service(settings) as opened:
            await run(opened, prompt="x")
            (slot,) = opened.engine.node.slots
            head = slot.head
            session = list(opened.engine.node.sessions.values())[-1]
            assert session.washed_before == (head.hex(),)
            assert await opened.engine.shut_down(60)
            assert session.washed_after == (slot.head.hex(),)
    with closing(SqliteJournal(tmp_path / "state" / "journal.db")) as journal:
        journal.open()
        rows = journal.certificates(slot.spec.id, 10)
    chain = verify_chain(
        [b64decode(row["certificate"]) for row in rows],
        node_key=opened.seal.public_key,
        head=slot.head,
        enclave="required",
        allow_simulated=True,
    )
    assert len(chain.certificates) == 4
    record = chain.certificates[-1].record
    residue = next(step for step in record.steps if step.name == "residue")
    assert residue.figures["run_folder"] == 1
    assert stat.S_IMODE((tmp_path / "state" / "node_key").stat().st_mode) == 0o600


async def test_sessions_end_before_the_enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An enclave that hangs, or cannot be ended, does not hold up the end of the sessions."""
    live: list[int] = []
    stop = EnclaveSupervisor.stop

    async def counting(enclave: EnclaveSupervisor) -> None:
        live.append(len(list(opened.engine.node.live_sessions())))
        await stop(enclave)

    monkeypatch.setattr(EnclaveSupervisor, "stop", counting)
    async with open_service(settings_in(tmp_path, enclave="simulated")) as opened:
        await healthy(opened)
        submit(opened)
        assert any(opened.engine.node.live_sessions())
    assert live == [0]
    assert not list((tmp_path / "run").glob("*.enclave"))
