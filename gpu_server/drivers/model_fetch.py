"""Fetching a model that is not there: from the first source that has it, checked, and put in place whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from gpu_server.drivers.model_folder import (
    FolderFault,
    FoundFile,
    hash_files,
    read_manifest,
    scan,
    verify,
    write_manifest,
)
from gpu_server.drivers.model_memory import VerifiedModels
from gpu_server.drivers.model_sources import FetchBroken, FetchRefused, ModelAbsent, ModelSource, check_names
from gpu_server.drivers.model_staging import (
    PUBLISH_SECONDS,
    Staging,
    StagingFault,
    fault_of,
    in_thread,
    staging_for,
)
from gpu_server.drivers.shared_work import Tell
from gpu_server.model_manifest import Manifest, ManifestError, dumps, make

TRIES: Final = 5
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 30.0

log = structlog.get_logger()


class FetchFailed(Exception):
    """The model could not be fetched. The message says why, and holds no secret."""


class Fetcher:
    """Brings models into the folder `root`. `find` gives a model that is there, or None; it may block."""

    def __init__(
        self,
        root: Path,
        sources: Sequence[ModelSource],
        find: Callable[[str], Path | None],
        verified: VerifiedModels,
        *,
        require_manifest: bool = False,
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._root, self._sources, self._find, self._verified = root, tuple(sources), find, verified
        self._require_manifest, self._first_pause = require_manifest, first_pause

    async def fetch(self, model_id: str, tell: Tell) -> Path:
        """The model's folder, once it is there: whoever else fetches it meanwhile, also in another process,
        is waited for. Raises `ModelAbsent` when no source has it, or `FetchFailed`."""
        try:
            async with staging_for(self._root, model_id) as staging:
                found = await in_thread(partial(self._find, model_id))
                if found is not None:
                    return found
                await in_thread(staging.require_place)
                for source in self._sources:
                    try:
                        return await self._from(source, model_id, staging, tell)
                    except ModelAbsent:
                        continue
                await in_thread(staging.remove)
                raise ModelAbsent(model_id)
        except StagingFault as fault:
            raise FetchFailed(str(fault)) from fault
        except FetchRefused as refused:
            raise FetchFailed(str(refused)) from refused

    async def _from(self, source: ModelSource, model_id: str, staging: Staging, tell: Tell) -> Path:
        await in_thread(partial(staging.begin, source.origin(model_id)))
        try:
            content = await self._bring(source, model_id, staging, tell)
            return await self._check_and_publish(content, model_id, staging, tell)
        except (StagingFault, FetchRefused) as fault:
            # What can never be finished must not take the room that something else needs.
            if not fault.keeps:
                await in_thread(staging.remove)
            raise

    async def _bring(self, source: ModelSource, model_id: str, staging: Staging, tell: Tell) -> Path:
        pause = self._first_pause
        for attempt in range(1, TRIES + 1):
            try:
                return await source.bring(model_id, staging, tell)
            except FetchBroken as broken:
                log.warning("model.fetch_broke", model_id=model_id, attempt=attempt, reason=str(broken))
                if attempt == TRIES:
                    raise FetchFailed(f"{broken}, in {TRIES} tries") from broken
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _check_and_publish(self, content: Path, model_id: str, staging: Staging, tell: Tell) -> Path:
        # Before it is looked at: whatever is changed later is to be verified again.
        await in_thread(partial(staging.open_to_workers, content))
        try:
            manifest, found = await self._checked(content, tell)
        except FolderFault as fault:
            raise FetchRefused(f"what was fetched is damaged: {fault}") from fault
        except ManifestError as error:
            raise FetchRefused(f"what was fetched can have no manifest: {error}") from error
        except OSError as error:
            raise fault_of(error) from error
        place = await in_thread(partial(staging.publish, content), limit=PUBLISH_SECONDS)
        real = await in_thread(place.resolve)
        await in_thread(partial(self._verified.remember, real, manifest, found))
        log.info("model.fetched", model_id=model_id, version=manifest.version, bytes=manifest.total)
        return real

    async def _checked(self, content: Path, tell: Tell) -> tuple[Manifest, Sequence[FoundFile]]:
        """What was fetched, against the manifest that came with it; one is written where none did."""
        found = await in_thread(partial(scan, content))
        visible = [file for file in found if not file.hidden]
        if not visible:
            raise FetchRefused("what was fetched has no file that a loader would look for")
        check_names([file.path for file in found])
        manifest = await in_thread(partial(read_manifest, content))
        if manifest is None and self._require_manifest:
            # One that we wrote would say that what came is what came.
            raise FetchRefused("it came without a manifest, and MODELS_REQUIRE_MANIFEST wants one")
        if manifest is None:
            manifest = make(await hash_files(content, visible, tell))
            await in_thread(partial(write_manifest, content, dumps(manifest)))
            return manifest, found
        faults = await verify(content, manifest, found, tell)
        if faults:
            raise faults[0]
        return manifest, found
