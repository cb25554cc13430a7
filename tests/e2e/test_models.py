"""The model store in the running service: what is not there is fetched, once; what is damaged is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.drivers.models_world import (
    FILE_KEY,
    FILES,
    PlayedFileService,
    file_service,
    laid,
    tar_of,
    with_manifest,
)
from tests.e2e.harness import Service


def settings(files: PlayedFileService) -> dict[str, object]:
    return {
        "AUTO_FETCH_MODELS": "true",
        "FILE_SERVICE_URL": files.url,
        "FILE_SERVICE_INTERNAL_KEY": FILE_KEY,
        "CPU_SLOTS": 10,
    }


async def test_ten_sessions_want_one_model(serve: Callable[..., Service]) -> None:
    """Ten tasks start ten sessions on a model that is not there: it is downloaded once, all hear how far it
    is, in bytes, and all are served."""
    tar = tar_of(with_manifest(FILES))
    async with file_service(models={"org/absent": tar}, hold_at=1 << 17) as files:
        service = serve(**settings(files))
        async with service.caller() as caller, asyncio.timeout(120):
            tasks = [await caller.started("serve", model="org/absent", prompt=f"n{n}") for n in range(10)]
            await files.holding.wait()
            for task in tasks:
                await task.until("progress", stage="model", total=len(tar))
            files.go_on.set()
            for number, task in enumerate(tasks):
                await task.finish()
                assert task.text == f"n{number}"
        assert files.asked == ["org/absent"]
    assert laid(service.models / "org/absent") == with_manifest(FILES)
    assert FILE_KEY not in service.log_text()


async def test_a_model_with_a_wrong_hash(serve: Callable[..., Service]) -> None:
    """The task fails with the file's name, nothing of the model is left, and what is there is served."""
    damaged = {**with_manifest(FILES), "config.json": b"x" * len(FILES["config.json"])}
    async with file_service(models={"org/absent": tar_of(damaged)}) as files:
        service = serve(**settings(files))
        async with service.caller() as caller, asyncio.timeout(120):
            task = await caller.run("serve", model="org/absent", prompt="hello")
            end = task.events[-1].data
            assert (end["status"], end["error"]["code"]) == ("failed", "model_fetch_failed")
            assert "config.json: has SHA-256" in end["error"]["message"]
            assert (await caller.run("serve", model="org/tiny", prompt="hello")).text == "hello"
        assert list(laid(service.models)) == ["org/tiny/weights.txt"]
