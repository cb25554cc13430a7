"""The enclave's life: started or adopted, initialised, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import structlog

from gpu_server.drivers.clock import BootClock
from gpu_server.drivers.enclave_body import SOCKET_NAME, runner_body, simulated_body
from gpu_server.drivers.enclave_container import ContainerEnclave
from gpu_server.drivers.enclave_host import EnclaveHost, make_of
from gpu_server.drivers.enclave_link import EnclaveLink, EnclaveStatus
from gpu_server.drivers.enclave_process import ProcessEnclave
from gpu_server.enclave_renewal import Restart, newest
from gpu_server.ports import (
    Clock,
    EnclaveDown,
    EnclaveHealth,
    EnclaveRefused,
    Renewal,
    RuntimeUnreachable,
)
from gpu_server.sealed.frames import Code
from gpu_server.sealed.grant import Binding
from gpu_server.settings import Settings

T = TypeVar("T")

CHECK_SECONDS: Final = 2.0
BOOT_SECONDS: Final = 120.0
"""From the order to start to the first answer. A Nitro Enclave's kernel boots in some seconds, its runner may
have to try again for a minute."""
BOOT_PAUSE_SECONDS: Final = 0.05
STOP_GRACE_SECONDS: Final = 10.0
MISSES: Final = 3
"""After so many checks without an answer an enclave that still runs is ended and started again."""
FIRST_BACKOFF_SECONDS: Final = 0.5
LAST_BACKOFF_SECONDS: Final = 60.0
STEADY_SECONDS: Final = 60.0
"""An enclave that lived for so long is started again without the backoff of those before it."""

STOPPING: Final = "the service is stopping"

log = structlog.get_logger()


class EnclaveSupervisor:
    """Port `Enclave`, over a host and a link. `run` is the one task that starts and watches it.

    `records` gives, at each start, slot id -> hash of its newest wash record (zeros where there is none yet).
    Whatever the reason for a start is: a wash may join it until the key is being made.
    """

    def __init__(
        self,
        host: EnclaveHost,
        link: EnclaveLink,
        *,
        mode: Literal["simulated", "nitro"],
        clock: Clock,
        records: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        self.mode: Literal["simulated", "nitro"] = mode
        self.restarts = 0
        """How often it was started again in this life of the service, by itself or by a wash."""
        self._host, self._link, self._clock, self._records = host, link, clock, records
        self._health = _down("it has not been started yet")
        self._looked = self._up = self._stopped = False
        self._misses = 0
        self._failure = ""  # of the last start, until one succeeds
        self._had_one = False
        self._backoff, self._start_at = 0.0, 0.0
        self._steady_since: float | None = None
        self._current: Restart | None = None  # under way; its washes and others may still join
        self._next: Restart | None = None  # ordered, and not begun
        self._last: Restart | None = None  # has made the key that there is
        self._turned_away = False  # an opening was refused since the last start
        self._turn = asyncio.Lock()  # whoever starts, ends or checks it is alone with it
        self._wake = asyncio.Event()

    @property
    def health(self) -> EnclaveHealth:
        """What was last seen of it."""
        return self._health

    async def run(self) -> None:
        """Start or adopt the enclave and watch over it, until cancelled (which leaves it as it is, for the
        next life of the service) or `stop` was called. For `engine.spawn("enclave", supervisor.run())`."""
        try:
            while not self._stopped:
                self._wake.clear()
                async with self._turn:
                    pause = await self._step()
                await self._clock.sleep_until(self._clock.now() + pause, wake=self._wake)
            async with self._turn:
                pass  # `stop` is done with it
        finally:
            self._stopped = True
            self._disappoint(EnclaveDown(STOPPING))
            self._link.close()
            self._host.close()

    async def stop(self) -> None:
        """End the enclave in order; `run` returns. Not for a handover: the next life adopts what runs."""
        self._stopped = True
        self._disappoint(EnclaveDown(STOPPING))
        self._wake.set()
        async with self._turn:
            self._up, self._health = False, _down(STOPPING)
            self._link.close()
            try:
                await self._host.stop(STOP_GRACE_SECONDS)
            except RuntimeUnreachable as error:
                log.warning("enclave.not_stopped", reason=str(error))
            self._host.close()

    def renew(self, slot_ids: tuple[str, ...]) -> Renewal:
        """See the port."""
        restart = self._current or self._next
        if restart is None:
            restart = Restart(self._clock, self._wake.set)
            if self._stopped:
                restart.failed(EnclaveDown(STOPPING))
            else:
                self._next = restart
        self._wake.set()
        return restart.join(slot_ids, self._hello)

    async def attest(self, nonce: bytes) -> bytes:
        """See the port."""
        if not self._health.healthy:
            self._turned_away = True
        return await self._ask(lambda: self._link.hello(nonce))

    async def grant(self, binding: Binding, for_recipient: bytes) -> bytes:
        """See the port."""
        self._require(binding.epoch)
        try:
            return await self._ask(lambda: self._link.grant(binding, for_recipient))
        except EnclaveRefused:
            self._require(binding.epoch)
            raise

    async def _hello(self, epoch: bytes, nonce: bytes) -> bytes:
        self._require(epoch)
        document = await self.attest(nonce)
        self._require(epoch)  # it may have waited for a connection
        return document

    def _require(self, epoch: bytes | None = None) -> None:
        if not self._health.healthy:
            raise EnclaveDown(f"the enclave is not available: {self._health.reason}")
        if epoch not in (None, self._health.epoch):
            raise EnclaveDown("it was started anew meanwhile, with another key")

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        self._require()
        try:
            return await ask()
        except EnclaveDown:
            self._wake.set()  # whoever watches should look now, not at the next round
            raise

    # -- the one who watches --------------------------------------------------------------------------------

    async def _step(self) -> float:
        """Do what is due; how long to wait for the next, in seconds."""
        try:
            if not self._stopped:
                await self._do_what_is_due()
        except EnclaveDown as error:
            self._fell(error)
        except RuntimeUnreachable as error:
            # Nothing is known of it, so nothing is concluded; it may well be running.
            self._disappoint(error)
            self._health = _down(str(error))
        except Exception as error:  # noqa: BLE001  # it must not cost the node its plain sessions
            self._fell(EnclaveDown(f"a bug of the one who watches over it: {error!r}"))
        now = self._clock.now()
        if self._current is not None:
            return max(min(self._current.due_at - now, CHECK_SECONDS), 0.0)
        return CHECK_SECONDS if self._up else max(self._start_at - now, FIRST_BACKOFF_SECONDS)

    async def _do_what_is_due(self) -> None:
        if not self._looked:
            self._up = await self._host.find()
            self._looked = True
            self._steady_since = self._clock.now()
            if self._up:
                self._had_one = True
                log.info("enclave.found")
        if self._next is not None and not self._next.is_wanted:
            self._next = None
        if self._current is not None:
            await self._hold(self._current)
        elif self._up and (self._next is None or self._is_awaited()):
            await self._check()
        elif self._clock.now() >= self._start_at:
            await self._start()

    def _is_awaited(self) -> bool:
        """Whether washes still fetch the documents of the last restart, or openings that it had to refuse
        come again: they are not robbed of it. Washes that follow each other leave no time between by
        themselves."""
        last = self._last
        return last is not None and self._clock.now() < last.served_at(turned_away=self._turned_away)

    async def _start(self) -> None:
        """End the old one, see it gone, and see a new one answer that has no key. Raises `EnclaveDown` and
        `RuntimeUnreachable`."""
        restart, self._next, self._last = self._next or Restart(self._clock, self._wake.set), None, None
        self._current, self._turned_away = restart, False
        self._say("it waits for the old one to end")
        self._link.close()
        ending = await self._host.stop(STOP_GRACE_SECONDS)  # the runner's is to terminate its enclave
        self._up, self._misses = False, 0
        if self._stopped:
            raise EnclaveDown(STOPPING)
        if ending == "killed":
            log.warning("enclave.killed", reason="it did not end in order within its time")
        if self._had_one:
            self.restarts += 1
        self._had_one = True
        self._say("it boots")
        began = self._clock.now()
        await self._host.start()
        while True:
            try:
                status = await self._link.status()
                if status.epoch is None:
                    break
                # Not made by us: the one before, which is not quite gone, or somebody was faster with INIT.
                why = "what answers already has its key"
            except EnclaveRefused as error:
                why = str(error)
            except EnclaveDown as error:
                if (ended := await self._host.ended()) is not None:
                    raise EnclaveDown(ended) from error
                why = str(error)
            if self._stopped or self._clock.now() >= began + BOOT_SECONDS:
                raise EnclaveDown(f"it was started and does not answer: {why}")
            await self._clock.sleep_until(self._clock.now() + BOOT_PAUSE_SECONDS)
        self._require_mode(status)
        self._up = True
        if self._steady_since is None:
            self._steady_since = self._clock.now()
        milliseconds = round((self._clock.now() - began) * 1000)
        restart.booted({"boot_ms": milliseconds, "old": ending, "version": status.version})
        self._say(_of_washes(restart))

    async def _hold(self, restart: Restart) -> None:
        """See that a fresh one is well until its key is due, and then have it made. Raises `EnclaveDown` and
        `RuntimeUnreachable`."""
        if self._clock.now() >= restart.due_at:
            await self._make_key(restart)
            return
        status = await self._look()
        if status is not None:
            if status.epoch is not None:
                raise EnclaveDown("what answers already has its key")
            self._say(_of_washes(restart))

    async def _check(self) -> None:
        """Ask one that runs how it is. Raises `EnclaveDown` when it has to be started again."""
        status = await self._look()
        if status is None:
            return
        if status.epoch is None:  # somebody has replaced it
            await self._make_key(Restart(self._clock, self._wake.set))
        else:
            self._ready(status.epoch)

    async def _look(self) -> EnclaveStatus | None:
        """What it says of itself; None where nothing follows from that it does not. Raises `EnclaveDown` when
        it has to be started again."""
        try:
            status = await self._link.status()
        except (EnclaveDown, EnclaveRefused) as error:
            if isinstance(error, EnclaveRefused) and error.code == Code.BUSY:
                return None  # so it is alive
            self._misses += 1
            self._health = _down(str(error))
            if (why := await self._host.ended()) is not None:
                raise EnclaveDown(why) from error
            if self._misses >= MISSES:
                raise EnclaveDown(f"{error}, {MISSES} times in a row") from error
            return None
        self._misses = 0
        self._require_mode(status)
        return status

    def _require_mode(self, status: EnclaveStatus) -> None:
        if status.mode != self.mode:
            raise EnclaveDown(f"what answers is a {status.mode} enclave, and not a {self.mode} one")

    async def _make_key(self, restart: Restart) -> None:
        """INIT, with the newest record of every slot. Raises `EnclaveDown`."""
        self._current = None  # from here on who comes gets another restart
        taken = restart.close()
        try:
            epoch = await self._link.init(newest(self._records(), taken))
        except (EnclaveDown, EnclaveRefused) as error:
            down = EnclaveDown(f"it does not make its key: {error}")
            restart.failed(down)
            raise down from error
        except BaseException:
            restart.failed(EnclaveDown("it does not make its key"))
            raise
        self._ready(epoch)
        self._last = restart
        restart.made(epoch)

    def _ready(self, epoch: bytes) -> None:
        if epoch != self._health.epoch:
            log.info("enclave.ready", mode=self.mode, epoch=epoch.hex())
        self._failure = ""
        self._health = EnclaveHealth(healthy=True, reason=None, epoch=epoch)

    def _say(self, what: str) -> None:
        """Why it is not there now."""
        washed = self._current is not None and self._current.is_wanted
        why = f"it is being {'restarted by a wash' if washed else 'started'} ({what})"
        if self._failure:
            why = f"it is being started again; the last time: {self._failure}"
        self._health = _down(why)

    def _fell(self, error: EnclaveDown) -> None:
        """It is down, and will be started again, the later the oftener that has happened."""
        now, why = self._clock.now(), str(error)
        if self._steady_since is not None and now - self._steady_since >= STEADY_SECONDS:
            self._backoff = 0.0
        self._backoff = min(2 * self._backoff or FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS)
        self._looked, self._up, self._misses, self._steady_since = True, False, 0, None
        self._start_at = now + self._backoff
        self._failure, self._health = why, _down(why)
        if not self._stopped:
            log.error("enclave.down", reason=why, retry_in=self._backoff)
        if self._current is not None:
            self._current.failed(error)
            self._current = None

    def _disappoint(self, why: EnclaveDown | RuntimeUnreachable) -> None:
        """Nothing comes of the restarts that washes wait for."""
        for restart in (self._current, self._next):
            if restart is not None:
                restart.failed(why)
        self._current = self._next = None


def enclave_of(
    settings: Settings,
    runtime_name: str,
    instance: str,
    run_dir: Path,
    docker_host: str | None,
    *,
    records: Callable[[], Mapping[str, bytes]] = dict,
) -> EnclaveSupervisor | None:
    """The enclave that the settings want; None for ENCLAVE=off. `run_dir` is RUN_DIR, `records` as in
    `EnclaveSupervisor`.

    A Nitro Enclave is held by a container in any case, a simulated one where workers are containers too.
    """
    if settings.enclave == "off":
        return None
    host: EnclaveHost
    if settings.enclave == "nitro":
        image = settings.enclave_runner_image
        host = ContainerEnclave(
            instance,
            image,
            lambda _: _runner(settings),
            makes=f"docker build -t {image} enclave_image/runner",
            docker_host=docker_host,
        )
        link = EnclaveLink((settings.enclave_cid, settings.enclave_port))
        return EnclaveSupervisor(host, link, mode="nitro", clock=BootClock(), records=records)
    folder = _folder(run_dir, instance)
    if runtime_name == "docker":
        # Where we are root: nobody's, for certain no worker's (those count up from the base).
        uid = settings.worker_uid_base - 1 if os.geteuid() == 0 else os.geteuid()

        def body(image: Mapping[str, Any]) -> dict[str, Any]:
            return simulated_body(image, folder=folder, uid=uid)

        image = settings.enclave_image
        host = ContainerEnclave(instance, image, body, docker_host=docker_host, folder=folder, uid=uid)
    else:
        host = program_process(instance, folder)
    link = EnclaveLink(folder / SOCKET_NAME)
    return EnclaveSupervisor(host, link, mode="simulated", clock=BootClock(), records=records)


async def remove_leftover(runtime_name: str, instance: str, run_dir: Path, docker_host: str | None) -> None:
    """For a service that has no enclave: end the one that an earlier life, killed or of other settings, left.
    Raises nothing; what cannot be removed now is left to the next start."""
    host: EnclaveHost = program_process(instance, _folder(run_dir, instance))
    if runtime_name == "docker":
        host = ContainerEnclave(
            instance, "", lambda _: {}, docker_host=docker_host, folder=_folder(run_dir, instance)
        )
    try:
        await host.stop(STOP_GRACE_SECONDS)
    except RuntimeUnreachable as error:
        log.warning("enclave.not_stopped", reason=str(error))
    finally:
        host.close()


def program_process(instance: str, folder: Path) -> ProcessEnclave:
    """The enclave's program as a process, simulated, listening in `folder`."""
    root = Path(__file__).parents[1]
    sources = sorted(
        [*(root / "enclave_image/enclave").glob("*.py"), *(root / "gpu_server/sealed").glob("*.py")]
    )
    return ProcessEnclave(
        instance,
        folder,
        # The socket's path is relative to the folder: an absolute one may be too long for a socket.
        (sys.executable, "-m", "enclave", "--simulated", "--socket", SOCKET_NAME),
        environment={
            "PYTHONPATH": f"{root / 'enclave_image'}:{root}",
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        make=make_of([hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]),
    )


def _folder(run_dir: Path, instance: str) -> Path:
    """Where the enclave's socket is: beside the run folders of sessions, which are washed."""
    return run_dir / f"{instance[:8]}.enclave"


def _runner(settings: Settings) -> dict[str, Any]:
    try:
        eif = settings.enclave_eif_path.stat()
    except OSError as error:
        raise EnclaveDown(
            f"there is no enclave image file {settings.enclave_eif_path}: enclave_image/build.sh makes it"
        ) from error
    body = runner_body(
        eif=settings.enclave_eif_path,
        memory_mb=settings.enclave_memory_mb,
        cpu_count=settings.enclave_cpu_count,
        cid=settings.enclave_cid,
    )
    # So that an enclave of another image file is not adopted.
    return {**body, "Env": [f"EIF_STAMP={eif.st_size}-{eif.st_mtime_ns}"]}


def _of_washes(restart: Restart) -> str:
    done, of = restart.progress
    return f"{done} of {of} washes have their records" if of else "it makes its key"


def _down(why: str) -> EnclaveHealth:
    return EnclaveHealth(healthy=False, reason=why, epoch=None)
