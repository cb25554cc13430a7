"""`POST /inference`: sealed requests over HTTP, from the client's bytes to the worker's, and back."""

from __future__ import annotations

from pathlib import Path

from tests.app.sealed_world import sealed_world


async def test_there_and_back(tmp_path: Path) -> None:
    """What a client has sealed is opened by its session's worker, and the answer by the client alone."""
    async with sealed_world(tmp_path) as sealed:
        client = await sealed.client()
        request = client.seal(prompt="a canary sings")
        answer = await client.send(request)
        assert answer.status == 200, answer.raw
        assert [event.data.get("delta") for event in request.read(answer.raw)][:3] == ["a", "canary", "sings"]
        assert sealed.workers.ran == [(request.request_id, {"prompt": "a canary sings"})]
