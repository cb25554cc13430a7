"""Models as folders below one root: `name`, or `org/name`, each with the manifest that says what it holds."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import structlog

from gpu_server.core.errors import FailureCode
from gpu_server.drivers import model_hydrate
from gpu_server.drivers.blocking import call_in_thread
from gpu_server.drivers.model_fetch import Fetcher, FetchFailed
from gpu_server.drivers.model_folder import FolderFault, FoundFile, compare, read_manifest, scan, verify
from gpu_server.drivers.model_memory import VerifiedModels
from gpu_server.drivers.model_s3 import S3Source
from gpu_server.drivers.model_sources import FileService, ModelAbsent, ModelSource
from gpu_server.drivers.model_staging import holds_files, sweep
from gpu_server.drivers.shared_work import SharedWork, Tell
from gpu_server.model_manifest import Manifest, ManifestError
from gpu_server.ports import StartRefused
from gpu_server.settings import Settings

T = TypeVar("T")
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME: Final = re.compile(_PART)
_MODEL_ID: Final = re.compile(rf"{_PART}(/{_PART})?")
LOOKUP_SECONDS: Final = 30.0
SCAN_SECONDS: Final = 120.0
STATE_SECONDS: Final = 120.0

log = structlog.get_logger()


class FolderModelStore:
    """`ModelStore` over a folder, which may come and go (a network mount).

    What is fetched, verified or read ahead is so once, however many want it, while the store is `open`.
    """

    def __init__(
        self,
        root: Path,
        *,
        sources: Sequence[ModelSource] = (),
        verified: VerifiedModels | None = None,
        require_manifest: bool = False,
        prefetch: bool = True,
        first_pause: float = 1.0,
    ) -> None:
        self._root, self._require_manifest, self._prefetch = root, require_manifest, prefetch
        self.verified = verified or VerifiedModels()
        """What is remembered of earlier verifications."""
        self._sources = tuple(sources)
        self._fetcher = Fetcher(
            root,
            sources,
            self._filled,
            self.verified,
            require_manifest=require_manifest,
            first_pause=first_pause,
        )
        # A download or a verification may take longer than a session may: the next one finds it done.
        self._preparing: SharedWork[Path] = SharedWork(lingers=True)
        self._hydrating: SharedWork[None] = SharedWork()
        self._being_read = 0
        self._asked: list[_Asked] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Own what is done for several. What nobody has gone on with for a week is removed first."""
        clean = partial(sweep, self._root, lambda model_id: self._filled(model_id) is not None)
        with suppress(TimeoutError):  # removing much may take long, and goes on
            await call_in_thread(clean, limit=LOOKUP_SECONDS, name="model-store")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._preparing.open())
            await stack.enter_async_context(self._hydrating.open())
            yield

    # -- looking --------------------------------------------------------------------------------------------

    def find(self, model_id: str) -> Path | None:
        """The real folder of a model, links resolved; None if it is missing, if its link leaves the root, or
        if it is an organisation of models, or a folder of a model."""
        folder = self._real(model_id)
        if folder is None:
            return None
        if "/" in model_id:
            is_model = not _holds_files((self._root / model_id).parent, otherwise=False)
        else:  # what cannot be looked into is there: what is wrong with it is told when it is read
            is_model = _holds_files(folder, otherwise=True)
        return folder if is_model else None

    def _real(self, model_id: str) -> Path | None:
        if not _MODEL_ID.fullmatch(model_id):
            raise ValueError(f"{model_id!r} is no model id")
        try:
            root = self._root.resolve(strict=True)
            folder = (root / model_id).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop of links
            return None
        if not folder.is_dir() or root not in folder.parents:
            return None
        hidden = any(part.startswith(".") for part in folder.relative_to(root).parts)
        return None if hidden else folder

    def names(self) -> tuple[str, ...]:
        """A folder that holds files is a model; one that holds only folders is an organisation of models."""
        found: list[str] = []
        for top in self._folders(self._root):
            real = self._real(top.name)
            if real is None:
                continue
            if _holds_files(real, otherwise=True):
                found.append(top.name)
                continue
            ids = (f"{top.name}/{folder.name}" for folder in self._folders(top))
            found.extend(model_id for model_id in ids if self.find(model_id) is not None)
        return tuple(sorted(found))

    # -- preparing ------------------------------------------------------------------------------------------

    async def prepare(self, model_id: str, tell: Tell) -> Path:
        """See `ModelStore`."""
        try:
            found = await self._look_for(model_id)
        except ValueError:  # an id that cannot be a folder's name, such as name:tag
            raise _missing(model_id) from None
        if found is None and not self._sources:
            raise _missing(model_id)
        if found is not None:
            manifest, files = await self._seen(model_id, found)
            if manifest is None or await self._is_known(found, manifest, files):
                return found
        return await self._preparing.do(model_id, partial(self._prepare, model_id), tell)

    async def fetch(self, model_id: str, tell: Tell) -> Path:
        """The model's folder, fetched and verified if it is not there. Raises `StartRefused`."""
        try:
            return await self._fetcher.fetch(model_id, tell)
        except ModelAbsent:
            raise _missing(model_id, ", and no source has it") from None
        except FetchFailed as failed:
            log.warning("model.not_fetched", model_id=model_id, reason=str(failed))
            message = f"model {model_id} could not be fetched: {failed}"
            raise StartRefused(FailureCode.MODEL_FETCH_FAILED, message) from failed
        except (OSError, ValueError, ManifestError) as error:
            # Nobody has thought of this one: its text may hold anything, a path of this machine for one.
            log.exception("model.not_fetched", model_id=model_id)
            message = f"model {model_id} could not be fetched ({type(error).__name__})"
            raise StartRefused(FailureCode.MODEL_FETCH_FAILED, message) from error

    async def faults(self, model_id: str, tell: Tell) -> tuple[str, ...]:
        """Everything that is wrong with a model, read anew whatever is remembered. Raises `StartRefused` when
        it is not there."""
        try:
            folder = await self._look_for(model_id)
        except ValueError:
            folder = None
        if folder is None:
            raise _missing(model_id)
        try:
            manifest, files = await self._list(folder)
            if manifest is None:
                return ("has no manifest.json; `gpu-server models manifest` writes one",)
            faults = await verify(folder, manifest, files, tell)
        except FolderFault as fault:
            return (str(fault),)
        if not faults:
            await self._remember(model_id, folder, manifest, files)
        return tuple(str(fault) for fault in faults)

    async def _prepare(self, model_id: str, tell: Tell) -> Path:
        folder = await self._look_for(model_id)
        if folder is None:
            folder = await self.fetch(model_id, tell)
        manifest, files = await self._seen(model_id, folder)
        if manifest is None or await self._is_known(folder, manifest, files):
            return folder
        try:
            # What can be told without reading a hundred gigabytes is told without.
            faults = compare(manifest, files) or await verify(folder, manifest, files, tell)
        except FolderFault as fault:
            faults = [fault]
        if faults:
            raise _damaged(model_id, faults)
        await self._remember(model_id, folder, manifest, files)
        log.info("model.verified", model_id=model_id, version=manifest.version, bytes=manifest.total)
        return folder

    async def _seen(self, model_id: str, folder: Path) -> tuple[Manifest | None, Sequence[FoundFile]]:
        try:
            manifest, files = await self._list(folder)
        except FolderFault as fault:
            raise _damaged(model_id, [fault]) from fault
        if manifest is None and self._require_manifest:
            message = f"model {model_id} has no manifest, and MODELS_REQUIRE_MANIFEST wants one"
            raise StartRefused(FailureCode.MODEL_DAMAGED, message)
        return manifest, files

    async def _is_known(self, folder: Path, manifest: Manifest, files: Sequence[FoundFile]) -> bool:
        if compare(manifest, files):
            return False
        knows = partial(self.verified.knows, folder, manifest, files)
        try:
            return await call_in_thread(knows, limit=STATE_SECONDS, name="model-store")
        except TimeoutError:
            log.warning("model.not_remembered", folder=folder.name, reason="STATE_DIR does not answer")
            return False

    async def _remember(
        self, model_id: str, folder: Path, manifest: Manifest, files: Sequence[FoundFile]
    ) -> None:
        remember = partial(self.verified.remember, folder, manifest, files)
        try:
            await call_in_thread(remember, limit=STATE_SECONDS, name="model-store")
        except TimeoutError:  # which only costs time later
            log.warning("model.not_remembered", model_id=model_id, reason="STATE_DIR does not answer")

    def _filled(self, model_id: str) -> Path | None:
        """A model that is there; an empty folder is none. May block. Raises ValueError as `find` does."""
        folder = self.find(model_id)
        try:
            return folder if folder is not None and any(folder.iterdir()) else None
        except OSError:  # it is there: what is wrong with it is told when it is looked at
            return folder

    # -- asking the file system ----------------------------------------------------------------------------

    async def _look_for(self, model_id: str) -> Path | None:
        look = partial(self._filled, model_id)
        return await self._ask(look, limit=LOOKUP_SECONDS, step="looking for a model")

    async def _list(self, folder: Path) -> tuple[Manifest | None, tuple[FoundFile, ...]]:
        look = partial(_manifest_and_files, folder)
        return await self._ask(look, limit=SCAN_SECONDS, step="listing a model's files")

    async def _ask(self, do: Callable[[], T], *, limit: float, step: str) -> T:
        """What the file system answers. Raises `StartRefused` when that takes too long, and at once while
        there is no answer to an earlier question: a mount that hangs takes no thread for every start."""
        now = asyncio.get_running_loop().time()
        self._asked = [asked for asked in self._asked if not asked.answered.is_set()]
        late = next((asked for asked in self._asked if asked.until <= now), None)
        if late is not None:
            raise _no_answer(late.limit, late.step)
        asked = _Asked(until=now + limit, limit=limit, step=step)
        self._asked.append(asked)

        def run() -> T:
            try:
                return do()
            finally:
                asked.answered.set()

        try:
            return await call_in_thread(run, limit=limit, name="model-store")
        except TimeoutError:
            raise _no_answer(limit, step) from None

    # -- reading ahead --------------------------------------------------------------------------------------

    async def hydrate(self, folder: Path) -> None:
        """See `ModelStore`."""
        if self._prefetch:
            await self._hydrating.do(str(folder), partial(self._hydrate, folder), _tell_nobody)

    async def _hydrate(self, folder: Path, tell: Tell) -> None:
        try:
            files = await self._ask(partial(scan, folder), limit=SCAN_SECONDS, step="listing a model's files")
            # What is promised to others that are being read is still told as available.
            room = await asyncio.to_thread(model_hydrate.memory_budget) - self._being_read
            budget = min(max(room, 0), sum(file.size for file in files))
            self._being_read += budget
            try:
                count = await model_hydrate.hydrate(folder, files, budget=budget)
            finally:
                self._being_read -= budget
            log.info("model.hydrated", folder=folder.name, bytes=count)
        except (OSError, FolderFault, StartRefused) as error:
            log.warning("model.not_hydrated", folder=folder.name, reason=str(error))

    def _folders(self, parent: Path) -> Iterator[Path]:
        try:
            children = list(parent.iterdir())
        except OSError:
            return
        for child in children:
            if _NAME.fullmatch(child.name) and child.is_dir():
                yield child


def store_of(settings: Settings, *, fetching: bool | None = None) -> FolderModelStore:
    """The store that the settings describe; with `fetching`, whatever AUTO_FETCH_MODELS says."""
    wanted = settings.auto_fetch_models if fetching is None else fetching
    return FolderModelStore(
        settings.models_dir,
        sources=sources_of(settings) if wanted else (),
        verified=VerifiedModels(settings.state_dir / "verified-models"),
        require_manifest=settings.models_require_manifest,
        prefetch=settings.model_prefetch == "auto",
    )


def sources_of(settings: Settings) -> tuple[ModelSource, ...]:
    """The sources, in the order in which they are asked: S3 first, since it can go on where it broke."""
    found: list[ModelSource] = []
    if settings.model_source_s3_uri is not None:
        found.append(S3Source(settings.model_source_s3_uri))
    if settings.file_service_url is not None and settings.file_service_internal_key is not None:
        found.append(FileService(settings.file_service_url, settings.file_service_internal_key))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A question that the file system has not answered yet; `until` is on the loop's clock. Others are told
    its `step`, which therefore names no model."""

    until: float
    limit: float
    step: str
    answered: threading.Event = field(default_factory=threading.Event)


def _no_answer(limit: float, step: str) -> StartRefused:
    message = f"the model store did not answer within {limit:g} s ({step})"
    return StartRefused(FailureCode.MODEL_MISSING, message)


def _manifest_and_files(folder: Path) -> tuple[Manifest | None, tuple[FoundFile, ...]]:
    return read_manifest(folder), scan(folder)


def _missing(model_id: str, why: str = "") -> StartRefused:
    return StartRefused(FailureCode.MODEL_MISSING, f"model {model_id} is not in the model store{why}")


def _damaged(model_id: str, faults: Sequence[FolderFault]) -> StartRefused:
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return StartRefused(FailureCode.MODEL_DAMAGED, f"model {model_id} is damaged: {faults[0]}{more}")


def _holds_files(folder: Path, *, otherwise: bool) -> bool:
    try:
        return holds_files(folder)
    except OSError:
        return otherwise


def _tell_nobody(done: int, total: int | None) -> None:
    pass
