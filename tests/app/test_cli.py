"""The command line, against a service that runs in a thread."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gpu_server import __version__, cli
from gpu_server.settings import Settings
from tests.app.api_world import KEY, Api
from tests.app.played_worker import Call, PlayedWorker, echo, end, frame
from tests.app.processes import ROOT, environment, free_port
from tests.app.served import served_world
from tests.app.world import slot_specs


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting and no key of this machine; lines as wide as on a narrow terminal."""
    for name in (*(name.upper() for name in Settings.model_fields), "GPU_SERVER_API_KEY", "GPU_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


async def moody(worker: PlayedWorker, call: Call) -> None:
    """Fails a task whose prompt says so."""
    if b"please fail" in call.body:
        await call.stream(end(1, "failed", error={"code": "as_asked", "message": "it was [red]asked[/] to"}))
        await call.done()
    elif b"logs" in call.body:
        await call.stream(frame(1, "logs", stream="stdout", line="a [bold]line[/]"), end(2))
        await call.done()
    else:
        await echo(worker, call)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service, whose loop is in a thread of its own."""

    def prepare(api: Api) -> None:
        api.world.on_task = moody

    folder = tmp_path_factory.mktemp("service")
    with served_world(folder, prepare=prepare, slots=slot_specs(4)) as served:
        yield served.url


def run(*arguments: str, key: str | None = KEY, **more: str) -> Result:
    env = {"GPU_SERVER_API_KEY": key} if key else {}
    return CliRunner().invoke(cli.app, arguments, env={**env, **more.pop("env", {})}, **more)


def submit(url: str, *arguments: str, **more: str) -> Result:
    return run("submit", "m", "p", *arguments, "--oneoff", "--url", url, **more)


def test_version() -> None:
    """`version` prints the version."""
    result = run("version")
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


def test_submit(url: str) -> None:
    """Text flows as it came, whatever it looks like; other events are a line each; the status is 0."""
    text = "hello [bold]:smile:[/bold] " + "word " * 40 + "\nnew line"
    result = submit(url, "--prompt", text)
    assert result.exit_code == 0
    assert text + "\n" in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["connection", "status=allocated"]
    assert "\n".join(lines).rstrip().splitlines()[-1].startswith("task_finish")
    assert "status=completed" in lines[-1]


def test_submit_as_json(url: str) -> None:
    """With --json every event is one line of JSON."""
    result = submit(url, "--json", '{"prompt": "x"}')
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert events[0]["event"] == "connection"
    assert events[-1] == {"id": events[-1]["id"], "event": "task_finish", "data": events[-1]["data"]}
    assert [event["data"]["delta"] for event in events if event["event"] == "text_delta"] == ["x"]


def test_a_detached_task(url: str) -> None:
    """--detach prints the task's id at once; it is followed, shown and cancelled by that."""
    submitted = submit(url, "--detach", "--prompt", "later")
    assert submitted.exit_code == 0
    task_id = submitted.stdout.strip()
    assert task_id.startswith("t_")
    followed = run("tasks", "follow", task_id, "--json", "--url", url)
    assert followed.exit_code == 0
    last = json.loads(followed.stdout.splitlines()[-1])
    assert last["data"]["status"] == "completed"
    nothing = run("tasks", "follow", task_id, "--after", str(last["id"]), "--url", url)
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    for command in ("show", "cancel"):  # it has ended: cancelling changes nothing
        assert json.loads(run("tasks", command, task_id, "--url", url).stdout)["state"] == "completed"
    assert run("tasks", "follow", "t_unknown", "--url", url).exit_code == 1


def test_submitting_again_with_the_same_key(url: str) -> None:
    """The same key joins the same task; with another input it is refused."""
    first, again, other = (
        submit(url, "--detach", "--idempotency-key", "cli-1", "--prompt", prompt)
        for prompt in ("x", "x", "y")
    )
    assert first.stdout == again.stdout
    assert other.exit_code == 1
    assert "idempotency_mismatch" in other.stderr


def test_metadata_from_standard_input(url: str) -> None:
    """`-` reads the metadata from standard input."""
    result = submit(url, "--json", "-", input='{"prompt": "from a pipe"}')
    assert "from a pipe" in result.stdout


def test_a_failed_task(url: str) -> None:
    """A task that did not complete is told, and the status is 1."""
    result = submit(url, "--prompt", "please fail")
    assert result.exit_code == 1
    assert "as_asked" in result.stdout
    assert "it was [red]asked[/] to" in result.stdout


def test_markup_of_a_worker(url: str) -> None:
    """What a worker writes is shown as it is."""
    assert "a [bold]line[/]" in submit(url, "--prompt", "logs").stdout


@pytest.mark.parametrize("metadata", ["{", "[]", "1", '"text"'])
def test_metadata_that_is_none(metadata: str) -> None:
    """Metadata that are no JSON object are a mistake in the command."""
    result = run("submit", "m", "p", metadata)
    assert result.exit_code == 2
    assert "JSON" in result.stderr


def test_refused(url: str) -> None:
    """A refusal is one line with its code; the status is 1."""
    result = run("submit", "unknown", "p", "--url", url)
    assert result.exit_code == 1
    assert result.stderr == "model_not_found (404): no preset for model 'unknown'\n"
    assert result.stdout == ""


def test_options_reach_the_service(url: str) -> None:
    """Session, difficulty, time and tenant are those of the command."""
    result = submit(url, "--session", "s_1")
    assert "leave out session_id" in result.stderr
    assert "task_difficulty" in submit(url, "--difficulty", "medium").stderr
    assert "timeout_out_of_range" in submit(url, "--timeout", "99999").stderr
    assert "X-Tenant-ID" in submit(url, "--tenant", "a b").stderr


def test_no_key(url: str) -> None:
    """Without a key the command says where to put it; the status is 2."""
    result = run("sessions", "list", "--url", url, key=None)
    assert result.exit_code == 2
    assert "GPU_SERVER_API_KEY" in result.stderr


def test_a_wrong_key(url: str) -> None:
    """A wrong key is a refusal and is not shown."""
    result = run("sessions", "list", "--url", url, "--api-key", "wrong-key")
    assert result.exit_code == 1
    assert result.stderr.startswith("unauthorized (401)")
    assert "wrong-key" not in result.stderr


@pytest.mark.parametrize("name", ["GPU_SERVER_API_KEY", "INTERNAL_API_KEY"])
def test_the_key_in_the_environment(url: str, name: str) -> None:
    """The key may come from either variable, the address from another."""
    result = CliRunner().invoke(
        cli.app, ["sessions", "list", "--json"], env={name: KEY, "GPU_SERVER_URL": url}
    )
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("submit", "m", "p"), ("sessions", "list"), ("sessions", "show", "s_1")]
)
def test_no_service(arguments: tuple[str, ...]) -> None:
    """A service that cannot be reached is one line; the status is 1."""
    address = f"http://127.0.0.1:{free_port()}"
    result = run(*arguments, "--url", address)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"The service at {address} cannot be reached: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["nonsense", "ftp://127.0.0.1", "http://", "127.0.0.1:8001"])
def test_a_wrong_address(address: str) -> None:
    """An address that is none is told, not crashed on."""
    result = run("sessions", "list", "--url", address)
    assert result.exit_code == 1
    assert address in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_sessions(url: str) -> None:
    """Sessions are listed, shown, kept alive and killed; killing an unknown one is a refusal."""
    events = [
        json.loads(line)
        for line in run("submit", "m", "p", "--json", "--url", url, "--tenant", "t1").stdout.splitlines()
    ]
    session_id = events[0]["data"]["session_id"]
    mine = ("--url", url, "--tenant", "t1")
    listed = run("sessions", "list", *mine, env={"COLUMNS": "200"}).stdout
    assert session_id in listed
    assert "ready" in listed
    (row,) = run("sessions", "list", "--json", *mine).stdout.splitlines()
    assert json.loads(row)["session_id"] == session_id
    shown = json.loads(run("sessions", "show", session_id, *mine).stdout)
    assert (shown["state"], len(shown["washed_before"]), shown["washed_after"]) == ("ready", 1, [])
    assert json.loads(run("sessions", "keepalive", session_id, *mine).stdout)["state"] == "ready"
    killed = json.loads(run("sessions", "kill", session_id, *mine).stdout)
    assert killed["close_reason"] == "killed"
    assert "killed" in run("sessions", "list", *mine, env={"COLUMNS": "200"}).stdout
    result = run("sessions", "kill", session_id, "--url", url, "--tenant", "t2")
    assert (result.exit_code, "session_not_found" in result.stderr) == (1, True)


def test_presets_check(tmp_path: Path) -> None:
    """The shipped file passes; a file with mistakes is 1 and a line for each."""
    result = run("presets", "check", str(ROOT / "config/model_presets.yaml"))
    assert (result.exit_code, "no mistakes" in result.stdout) == (0, True)
    file = tmp_path / ("a-long-name-" * 10 + ".yaml")
    file.write_text("models:\n  m:\n    p: {docker_image: x, gpus: 0, gpu: 1}\n")
    result = run("presets", "check", str(file))
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}:3: models.m.p.gpu") for line in lines)


def test_presets_list(tmp_path: Path) -> None:
    """Every preset is a line, with what one needs to ask for it; a file with mistakes is told as ever."""
    result = run("presets", "list", str(ROOT / "config/model_presets.yaml"), env={"COLUMNS": "200"})
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["model_id", "task_preset", "contract", "gpus", "openai", "sealed", "pools", "image"]
    assert ["echo", "once", "exec", "1", "off", "gpu-server/echo:dev"] in rows
    assert ["echo", "stream", "http", "1", "allowed", "gpu-server/echo:dev"] in rows
    assert ["echo", "batch", "http", "1", "yes", "allowed", "default", "gpu-server/echo:dev"] in rows
    (tmp_path / "presets.yaml").write_text("models: 1\n")
    result = run("presets", "list", str(tmp_path / "presets.yaml"))
    assert (result.exit_code, "models" in result.stderr) == (1, True)


def test_presets_check_of_the_settings(tmp_path: Path) -> None:
    """Without a file it is that of MODEL_PRESETS_FILE; an image that is not allowed is a mistake too."""
    file = tmp_path / "presets.yaml"
    file.write_text("models:\n  m:\n    p: {docker_image: elsewhere/image}\n")
    result = run("presets", "check", env={"MODEL_PRESETS_FILE": str(file)})
    assert result.exit_code == 1
    assert "m.p: image elsewhere/image is not in ALLOWED_DOCKER_IMAGES" in result.stderr
    env = {"MODEL_PRESETS_FILE": str(file), "ALLOWED_DOCKER_IMAGES": "elsewhere/*"}
    assert run("presets", "check", env=env).exit_code == 0


@pytest.mark.parametrize("command", [("serve",), ("presets", "check")])
def test_wrong_settings(command: tuple[str, ...]) -> None:
    """Settings that cannot be used are a line each, by name and without the value; the status is 2."""
    result = run(*command, env={"HTTP_PORT": "http", "INTERNAL_API_KEY": "tooshort"})
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["HTTP_PORT", "INTERNAL_API_KEY"]
    assert "tooshort" not in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL_PRESETS_FILE": "/nonexistent.yaml"}, "/nonexistent.yaml: cannot be read"),
        (
            {"RUNTIME": "docker", "DOCKER_HOST": "unix:///nonexistent.sock"},
            "the Docker engine does not answer",
        ),
        ({"STATE_DIR": "/dev/null/x"}, "STATE_DIR /dev/null/x cannot be used"),
    ],
)
def test_a_start_that_is_refused(tmp_path: Path, change: dict[str, str], message: str) -> None:
    """A service that must not start says why in words; the status is 2."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu_server.cli", "serve"],
        env=environment(tmp_path, **change),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "The service did not start:" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
