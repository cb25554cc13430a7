"""Request bodies: bounded in size and depth, however they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gpu_server.api.bodies import check_depth
from gpu_server.api.sessions import StartBody
from gpu_server.api.tasks import SubmitBody
from gpu_server.core.errors import Refusal, RefusalCode
from tests.app.api_world import TASK, Answer, Api, api_world

JSON = {"Content-Type": "application/json"}


async def post(api: Api, data: Any, headers: dict[str, str] | None = None) -> Answer:
    """Submit these bytes."""
    return await api.ask("POST", "/api/tasks/submit", data=data, headers={**JSON, **(headers or {})})


def padded(length: int) -> bytes:
    """A valid submission of this length."""
    empty = len(json.dumps({**TASK, "metadata": {"x": ""}}))
    return json.dumps({**TASK, "metadata": {"x": "y" * (length - empty)}}).encode()


async def in_chunks(data: bytes) -> AsyncIterator[bytes]:
    """The same without an announced size."""
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


async def test_size(tmp_path: Path) -> None:
    """A body of MAX_BODY_BYTES is taken, one of a byte more is not, announced or not."""
    async with api_world(tmp_path, settings={"max_body_bytes": 5000}) as api:
        for chunked in (False, True):
            for length in (5000, 5001):
                data = padded(length)
                assert len(data) == length
                answer = await post(api, in_chunks(data) if chunked else data)
                if length == 5000:
                    assert answer.status == 200
                else:
                    answer.problem(413, "body_too_large")
        assert len(api.world.engine.node.tasks) == 2


async def test_endless_body(tmp_path: Path) -> None:
    """A body that never ends is refused when it has passed the limit, not when it ends."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1 << 26:
            sent += 1 << 16
            yield b" " * (1 << 16)

    async with api_world(tmp_path, settings={"max_body_bytes": 5000}) as api:
        (await post(api, endless())).problem(413, "body_too_large")
        assert sent < 1 << 26


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"task_type": "session", "model_id": "\xff"}',
        b'{"task_type": "session", "model_id": "\\ud800"}',
        b'{"task_type": "session", "timeout_seconds": NaN}',
        b"[" * 100_000,
        b'{"metadata": ' + b'{"a":' * 5000,
    ],
    ids=lambda data: repr(data[:24]),
)
async def test_no_json(tmp_path: Path, data: bytes) -> None:
    """Whatever is no JSON object is refused as such, not crashed on."""
    async with api_world(tmp_path) as api:
        (await post(api, data)).problem(422, "invalid_request")


async def test_depth(tmp_path: Path) -> None:
    """Metadata of METADATA_MAX_DEPTH levels are taken, one level more is not."""
    async with api_world(tmp_path, settings={"metadata_max_depth": 4}) as api:
        for depth, taken in ((4, True), (5, False)):
            metadata = nested(depth)
            answer = await api.submit(task_type="oneoff", metadata=metadata)
            if taken:
                assert answer.status == 200
            else:
                answer.problem(422, "metadata_too_deep")


def nested(depth: int) -> Any:
    """Objects and lists, `depth` levels of them."""
    value: Any = {} if depth % 2 else []
    for level in range(depth - 1, 0, -1):
        value = {"a": value} if level % 2 else [value]
    return value


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


@given(
    st.recursive(
        st.none() | st.integers(),
        lambda children: (
            st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children, max_size=3)
        ),
        max_leaves=12,
    ),
    st.integers(1, 6),
)
def test_any_depth(value: Any, limit: int) -> None:
    """The check agrees with counting the levels one by one."""
    body = json.dumps({"metadata": value}).encode()
    if depth_of(value) <= limit:
        check_depth(body, limit)
    else:
        with pytest.raises(Refusal) as refused:
            check_depth(body, limit)
        assert refused.value.code is RefusalCode.METADATA_TOO_DEEP


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "' + b'\\"' * 2_000_000,
        b'"' * 4_000_001,
        b'{"a": [' + b"{}," * 2_000_000 + b"{}]}",
        b"[" * 4_000_000,
        b'{"a": "' + b"[" * 4_000_000 + b'"}',
    ],
    ids=["a string without end", "quotes", "many objects", "brackets without end", "brackets in a string"],
)
def test_depth_is_found_in_one_pass_a_level(body: bytes) -> None:
    """However large or malformed a body is, it is not scanned again and again."""
    check_depth(body, 32)


@pytest.mark.parametrize("kind", [SubmitBody, StartBody])
def test_many_unknown_fields_cost_little(kind: type[SubmitBody] | type[StartBody]) -> None:
    """Of fields that are not known the first is told, however many there are."""
    body = {"model_id": "m", "task_preset": "p", "task_type": "session"}
    known = {name: value for name, value in body.items() if name in kind.model_fields}
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({**known, **{f"x{number}": 0 for number in range(10_000)}})
    assert [(error["type"], error["loc"]) for error in raised.value.errors()] == [
        ("extra_forbidden", ("x0",))
    ]
