"""One-off programs (the `exec` contract), and the model folder that a worker sees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.harness import Caller

Events = list[tuple[str, dict[str, Any]]]


async def run(caller: Caller, code: str) -> tuple[dict[str, Any], Events]:
    """Run a program; what `task_finish` says, and the events before it that are the program's own."""
    task = await caller.run("program", oneoff=True, code=code)
    ended = await caller.ended(task.session_id)
    assert ended["close_reason"] in ("oneoff_done", "start_failed")
    events = [(e.event, e.data) for e in task.events if e.event not in ("connection", "worker", "progress")]
    return task.events[-1].data, events[:-1]


@pytest.mark.parametrize("status", [0, 1, 3, 255])
async def test_the_exit_code_decides(caller: Caller, status: int) -> None:
    """Code 0 completes the task, any other fails it and is named, with the last line that was written."""
    code = f"import sys; print('last words', file=sys.stderr); sys.exit({status})"
    end, events = await run(caller, code)
    assert ("logs", {"stream": "stderr", "line": "last words"}) in events
    if status == 0:
        assert (end["status"], "error" in end) == ("completed", False)
    else:
        assert (end["status"], end["error"]["code"]) == ("failed", "worker_exited")
        assert end["error"]["message"] == f"the worker exited with code {status}: last words"


async def test_lines_that_are_events(caller: Caller) -> None:
    """A line on stdout that is an event is that event; every other line, and stderr, is a log line."""
    lines = [
        {"event": "text_delta", "delta": "a"},
        {"event": "text", "text": "ab"},
        {"event": "progress", "stage": "halfway", "done": 1, "total": 2},
        {"event": "artifact", "name": "x", "media_type": "text/plain", "data": "eA=="},
        {"event": "error", "code": "odd", "message": "but it goes on"},
    ]
    plain = [
        json.dumps({"event": "task_finish", "status": "completed"}),
        json.dumps({"event": "end", "status": "completed"}),
        json.dumps({"event": "text_delta"}),
        json.dumps({"event": "text_delta", "delta": 5}),
        json.dumps({"event": ["text"]}),
        json.dumps({"no": "event"}),
        json.dumps([1, 2]),
        "{not json",
        " " + json.dumps(lines[0]),
        "id: 7",
        "event: task_finish",
        "data: {}",
        "",
        "wörter",
    ]
    out = [*map(json.dumps, lines), *plain]
    code = f"print({chr(10).join(out)!r}); import sys; print({json.dumps(lines[0])!r}, file=sys.stderr)"
    task = await caller.run("program", oneoff=True, code=code)
    said = [
        (e.event, e.data)
        for e in task.events
        if e.event not in ("connection", "worker", "task_finish")
        and not (e.event == "progress" and e.data["stage"] in ("model", "image", "container", "loading"))
        and e.data.get("stream") != "stderr"
    ]
    expected = [(line["event"], {k: v for k, v in line.items() if k != "event"}) for line in lines]
    expected += [("logs", {"stream": "stdout", "line": line}) for line in plain]
    assert said == expected
    assert {"stream": "stderr", "line": json.dumps(lines[0])} in task.of("logs")
    assert task.events[-1].data["status"] == "completed"


async def test_output_that_is_garbage(caller: Caller) -> None:
    """Bytes that are no text become log lines that are; nothing of them breaks the stream."""
    code = r"import os; os.write(1, b'\x00\xff\xfe\r\n\n\n\x1b[2Jid: 1\nevent: x\n' + bytes(range(256)) * 40)"
    end, events = await run(caller, code)
    assert end["status"] == "completed"
    assert {name for name, _ in events} == {"logs"}


async def test_a_line_without_an_end(caller: Caller) -> None:
    """It is cut into pieces; nothing is lost, and the service does not hold it all."""
    code = "import os\nfor _ in range(48): os.write(1, b'x' * 65536)"
    end, events = await run(caller, code)
    assert end["status"] == "completed"
    assert sum(len(data["line"]) for _, data in events) == 48 * 65536
    assert max(len(data["line"]) for _, data in events) <= 65536


async def test_a_program_that_takes_too_long(caller: Caller) -> None:
    """It ends as `timeout`, with what it had said until then, and its container goes."""
    task = await caller.run(
        "program", oneoff=True, seconds=4, code="print('begun'); import signal; signal.pause()"
    )
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("timeout", "task_timeout")
    assert task.of("logs")[0]["line"] == "begun"
    await caller.ended(task.session_id)


async def test_a_program_that_is_cancelled_or_killed(caller: Caller) -> None:
    """Cancelling the task, or killing its session, ends the program."""
    code = "print('begun'); import signal; signal.pause()"
    cancelled = caller.submit("program", oneoff=True, code=code)
    await cancelled.until("logs", line="begun")
    await caller.cancel(cancelled.task_id)
    assert (await cancelled.finish())["error"]["code"] == "task_cancelled"
    killed = caller.submit("program", oneoff=True, code=code)
    await killed.until("logs", line="begun")
    await caller.kill(killed.session_id)
    assert (await killed.finish())["error"]["code"] == "session_killed"
    for task in (cancelled, killed):
        await caller.ended(task.session_id)


async def test_what_a_program_is_given(caller: Caller) -> None:
    """Its input, its own id, and nothing of the service's environment."""
    code = (
        "import os, json; given = json.load(open(os.environ['TASK_INPUT']))['metadata'];"
        "print(json.dumps({'event': 'text', 'text': json.dumps([given['word'], dict(os.environ)])}))"
    )
    task = await caller.run("program", oneoff=True, code=code, word="süß \U0001f36f")
    word, environment = json.loads(task.of("text")[0]["text"])
    assert word == "süß \U0001f36f"
    assert environment["TASK_ID"] == task.task_id
    assert environment["GPU_SESSION_ID"] == task.session_id
    assert (environment["MODEL_ID"], environment["TASK_PRESET"]) == ("echo", "program")
    assert caller.service.key not in environment.values()
    assert not {"INTERNAL_API_KEY", "STATE_DIR", "MODEL_PATH"} & set(environment)


# -- models -------------------------------------------------------------------------------------------------

LOOK = """
import json, os
folder = os.environ["MODEL_PATH"]
def outcome(name):
    try:
        open(os.path.join(folder, name), "w").close()
    except OSError as error:
        return type(error).__name__
    return "ok"
report = {
    "folder": folder,
    "files": sorted(os.listdir(folder)),
    "content": open(os.path.join(folder, "weights.txt")).read(),
    "write": outcome("new") if folder == "/models" else None,
    "overwrite": outcome("weights.txt") if folder == "/models" else None,
    "beside": os.listdir("/") if folder == "/models" else None,
}
print(json.dumps({"event": "text", "text": json.dumps(report)}))
"""


async def test_a_worker_sees_its_model(caller: Caller) -> None:
    """The model's files are at MODEL_PATH, which in a container is /models, and cannot be changed there."""
    task = await caller.run("read", model="org/tiny", oneoff=True, code=LOOK)
    assert task.events[-1].data["status"] == "completed", task.summary
    report = json.loads(task.of("text")[0]["text"])
    assert (report["files"], report["content"]) == (["weights.txt"], "1 2 3")
    if caller.service.runtime == "docker":
        assert report["folder"] == "/models"
        assert {report["write"], report["overwrite"]} == {"OSError"}  # EROFS
    else:
        assert report["folder"] == str(caller.service.models / "org/tiny")


async def test_a_session_of_a_worker_with_a_model(caller: Caller) -> None:
    """A long-lived worker starts with its model mounted too."""
    task = await caller.run("serve", model="org/tiny", prompt="with a model")
    assert task.text == "with a model"


@pytest.mark.parametrize(("preset", "oneoff"), [("read", True), ("serve", False)])
async def test_a_model_that_is_not_there(caller: Caller, preset: str, oneoff: bool) -> None:
    """The task fails with `model_missing` and names the model, and its slot is free again."""
    task = await caller.run(preset, model="org/absent", oneoff=oneoff, code="")
    end = task.events[-1].data
    assert (end["status"], end["error"]["code"]) == ("failed", "model_missing")
    assert "org/absent" in end["error"]["message"]
    assert (await caller.ended(task.session_id))["close_reason"] == "start_failed"
