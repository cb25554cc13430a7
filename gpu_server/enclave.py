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
from gpu_server.ports import Clock, EnclaveDown, EnclaveHealth, EnclaveRefused, RuntimeUnreachable
from gpu_server.sealed.frames import Code
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

log = structlog.get_logger()


class EnclaveSupervisor:
    """Port `Enclave`, over a host and a link. `run` is the one task that starts and watches it.

    `records` gives, at each start, the hash of the newest wash record of every slot.
    """

    def __init__(
        self,
        host: EnclaveHost,
        link: EnclaveLink,
        *,
        mode: Literal["simulated", "nitro"],
        clock: Clock,
        records: Callable[[], tuple[bytes, ...]] = tuple,
    ) -> None:
        self.mode: Literal["simulated", "nitro"] = mode
        self.restarts = 0
        """How often it was started again in this life of the service, by itself or by `restart`."""
        self._host, self._link, self._clock, self._records = host, link, clock, records
        self._health = _down("it has not been started yet")
        self._looked = self._up = self._stopped = False
        self._misses = 0
        self._failure = ""  # of the last start, until one succeeds
        self._had_one = False
        self._backoff, self._start_at, self._up_since = 0.0, 0.0, 0.0
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
            self._link.close()
            self._host.close()

    async def stop(self) -> None:
        """End the enclave in order; `run` returns. Not for a handover: the next life adopts what runs."""
        self._stopped = True
        self._wake.set()
        async with self._turn:
            self._up, self._health = False, _down("the service is stopping")
            self._link.close()
            try:
                await self._host.stop(STOP_GRACE_SECONDS)
            except RuntimeUnreachable as error:
                log.warning("enclave.not_stopped", reason=str(error))
            self._host.close()

    async def restart(self) -> None:
        """End it and start a new one, with a new key and the newest records. Sessions that are open go on.
        Raises `EnclaveDown` when that fails; then it is tried again in the background."""
        async with self._turn:
            if self._stopped:
                raise EnclaveDown("the service is stopping")
            self._looked = True
            try:
                await self._start()
            except (EnclaveDown, RuntimeUnreachable) as error:
                self._fell(str(error))
                self._wake.set()
                raise EnclaveDown(str(error)) from error

    async def attest(self, nonce: bytes) -> bytes:
        """See the port."""
        return await self._ask(lambda: self._link.hello(nonce))

    async def grant(
        self,
        *,
        tenant: str,
        pool: str,
        kms_key_arn: str,
        session_id: str,
        worker_key: bytes,
        wrapped_key: bytes,
        for_recipient: bytes,
    ) -> bytes:
        """See the port."""
        return await self._ask(
            lambda: self._link.grant(
                tenant=tenant,
                pool=pool,
                kms_key_arn=kms_key_arn,
                session_id=session_id,
                worker_key=worker_key,
                wrapped_key=wrapped_key,
                for_recipient=for_recipient,
            )
        )

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        if not self._health.healthy:
            raise EnclaveDown(f"the enclave is not available: {self._health.reason}")
        try:
            return await ask()
        except EnclaveDown:
            self._wake.set()  # whoever watches should look now, not at the next round
            raise

    # -- the one who watches --------------------------------------------------------------------------------

    async def _step(self) -> float:
        """Do what is due; how long to wait for the next, in seconds."""
        try:
            if self._stopped:
                return 0.0
            if not self._looked:
                self._up = await self._host.find()
                self._looked = True
                self._up_since = self._clock.now()
                if self._up:
                    self._had_one = True
                    log.info("enclave.found")
            if self._up:
                await self._check()
            elif self._clock.now() >= self._start_at:
                await self._start()
        except EnclaveDown as error:
            self._looked = True
            self._fell(str(error))
        except RuntimeUnreachable as error:
            # Nothing is known of it, so nothing is concluded; it may well be running.
            self._health = _down(str(error))
        except Exception as error:  # noqa: BLE001  # it must not cost the node its plain sessions
            self._looked = True
            self._fell(f"a bug of the one who watches over it: {error!r}")
        return CHECK_SECONDS if self._up else max(self._start_at - self._clock.now(), FIRST_BACKOFF_SECONDS)

    async def _check(self) -> None:
        """Ask one that runs how it is. Raises `EnclaveDown` when it has to be started again."""
        try:
            status = await self._link.status()
        except (EnclaveDown, EnclaveRefused) as error:
            if isinstance(error, EnclaveRefused) and error.code == Code.BUSY:
                return  # so it is alive
            self._misses += 1
            self._health = _down(str(error))
            if (why := await self._host.ended()) is not None:
                raise EnclaveDown(why) from error
            if self._misses >= MISSES:
                raise EnclaveDown(f"{error}, {MISSES} times in a row") from error
            return
        await self._settle(status)

    async def _start(self) -> None:
        """Start it anew, and see it ready. Raises `EnclaveDown` and `RuntimeUnreachable`."""
        again = f" again; the last time: {self._failure}" if self._failure else ""
        self._up, self._health = False, _down(f"it is being started{again}")
        self._link.close()
        await self._host.stop(STOP_GRACE_SECONDS)  # the runner's is to terminate its enclave
        if self._had_one:
            self.restarts += 1
        self._had_one = True
        until = self._clock.now() + BOOT_SECONDS
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
            if self._stopped or self._clock.now() >= until:
                raise EnclaveDown(f"it was started and does not answer: {why}")
            await self._clock.sleep_until(self._clock.now() + BOOT_PAUSE_SECONDS)
        self._up, self._up_since = True, self._clock.now()
        await self._settle(status)

    async def _settle(self, status: EnclaveStatus) -> None:
        """Take what answers for the enclave, and have it make its key. Raises `EnclaveDown`."""
        self._misses = 0
        if status.mode != self.mode:
            raise EnclaveDown(f"what answers is a {status.mode} enclave, and not a {self.mode} one")
        epoch = status.epoch
        if epoch is None:
            try:
                epoch = await self._link.init(self._records())
            except EnclaveRefused as error:
                raise EnclaveDown(f"it does not make its key: {error}") from error
        if epoch != self._health.epoch:
            log.info("enclave.ready", mode=self.mode, epoch=epoch.hex(), version=status.version)
        self._failure = ""
        self._health = EnclaveHealth(healthy=True, reason=None, epoch=epoch)

    def _fell(self, why: str) -> None:
        """It is down, and will be started again, the later the oftener that has happened."""
        now = self._clock.now()
        if self._up and now - self._up_since >= STEADY_SECONDS:
            self._backoff = 0.0
        self._backoff = min(2 * self._backoff or FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS)
        self._up, self._misses, self._start_at = False, 0, now + self._backoff
        self._failure, self._health = why, _down(why)
        log.error("enclave.down", reason=why, retry_in=self._backoff)


def enclave_of(
    settings: Settings, runtime_name: str, instance: str, run_dir: Path, docker_host: str | None
) -> EnclaveSupervisor | None:
    """The enclave that the settings want; None for ENCLAVE=off. `run_dir` is RUN_DIR.

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
        return EnclaveSupervisor(host, link, mode="nitro", clock=BootClock())
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
    return EnclaveSupervisor(host, EnclaveLink(folder / SOCKET_NAME), mode="simulated", clock=BootClock())


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


def _down(why: str) -> EnclaveHealth:
    return EnclaveHealth(healthy=False, reason=why, epoch=None)
