"""Plans: what a worker is started with, and what is found out only when it must be started."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Sealing, Session, TaskType, Workload
from gpu_server.core.slots import Slot, Tier
from gpu_server.drivers.models import FolderModelStore
from gpu_server.drivers.spool import Spool
from gpu_server.inputs import Inputs
from gpu_server.launch import Launcher, Plan
from gpu_server.ports import Contract, RunFolder, StartRefused
from gpu_server.presets import Preset
from tests.app.world import EXEC, IMAGE, slot_specs

PRESET = Preset(
    docker_image=IMAGE,
    model="none",
    command=["serve", "--fast"],
    process_command=["python", "serve.py"],
    env_vars={"A": "1", "MODEL_ID": "another", "GPU_COUNT": "8"},
    memory="2g",
    cpus=1.5,
    pids=99,
    tmp_exec=True,
)
SLOTS = [Slot(spec=spec, number=7 + n) for n, spec in enumerate(slot_specs(2, gpu=True))]
FOLDER = RunFolder(session_id="s_1", path=Path("/r"), share=Path("/r/share"), task=Path("/r/task"))


class Bench:
    """A launcher and what it asks."""

    def __init__(self, tmp_path: Path) -> None:
        self.presets = {"p": PRESET, "exec": EXEC, "weights": Preset(docker_image=IMAGE)}
        spool = Spool(tmp_path / "kept")
        spool.open()
        self.inputs = Inputs(spool)
        self.models = tmp_path / "models"
        self.launcher = Launcher(
            find_preset=self.find,
            models=FolderModelStore(self.models),
            inputs=self.inputs,
            uid_base=20_000,
        )

    def find(self, model_id: str, name: str) -> Preset:
        if name not in self.presets:
            raise Refusal(RefusalCode.PRESET_NOT_FOUND, f"there is no preset {name}")
        return self.presets[name]

    def plan(self, name: str = "p", model_id: str = "org/m", **changes: Any) -> Plan:
        return self.launcher.plan(self.session(name, model_id, **changes), SLOTS)

    def session(self, name: str = "p", model_id: str = "org/m", **changes: Any) -> Session:
        workload = self.presets[name].workload(model_id, name)
        return replace(session_of(workload), **changes)


def session_of(workload: Workload) -> Session:
    return Session(
        id="s_1",
        tenant="a",
        workload=workload,
        tier=Tier.LOW,
        task_type=TaskType.SESSION,
        created_at=0.0,
        asked_for=True,
        fence=42,
    )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def start_is_refused(plan: Plan) -> tuple[str, str]:
    """Code and message with which a start is refused."""
    with pytest.raises(StartRefused) as refused:
        plan.launch()
    return refused.value.code, refused.value.message


# -- the plan ---------------------------------------------------------------------------------------------


def test_a_plan_names_the_lease(bench: Bench) -> None:
    """A worker is known by its session and its fence, so that no other lease's is taken for it."""
    plan = bench.plan()
    assert (plan.session_id, plan.name) == ("s_1", "gpu-server-s_1-42")
    assert bench.plan(fence=43).name == "gpu-server-s_1-43"


@pytest.mark.parametrize(("name", "contract"), [("p", Contract.HTTP), ("exec", Contract.EXEC)])
def test_the_contract_is_that_of_the_session(bench: Bench, name: str, contract: Contract) -> None:
    """How a worker that runs already is spoken to does not depend on today's presets."""
    session = bench.session(name)
    bench.presets.clear()
    assert bench.launcher.plan(session, SLOTS).contract is contract


@pytest.mark.parametrize(("euid", "uid"), [(0, 20_007), (1000, 1000)])
def test_the_uid_is_that_of_the_first_slot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, euid: int, uid: int
) -> None:
    """As root each slot has a uid of its own; without root there is only ours."""
    monkeypatch.setattr("os.geteuid", lambda: euid)
    assert bench.plan().uid == uid


# -- the start --------------------------------------------------------------------------------------------


def test_what_a_worker_is_started_with(bench: Bench) -> None:
    """Everything of preset, session and lease is in the spec. The names of the contract win over the
    preset's."""
    plan = bench.plan()
    launch = plan.launch()
    spec = launch.spec(FOLDER, Path("/models/m"))
    assert (launch.image, spec.image) == (IMAGE, IMAGE)
    assert (spec.name, spec.session_id, spec.fence, spec.tenant) == (plan.name, "s_1", 42, "a")
    assert (spec.task_id, launch.task_input) == (None, None)
    assert (spec.command, spec.process_command) == (("serve", "--fast"), ("python", "serve.py"))
    assert spec.env == {
        "A": "1",
        "MODEL_ID": "org/m",
        "TASK_PRESET": "p",
        "MAX_CONCURRENT_TASKS": "1",
        "GPU_COUNT": "2",
        "GPU_MEMORY_UTILIZATION": "0.9",
    }
    assert spec.gpu_uuids == ("GPU-0000", "GPU-0001")
    assert (spec.uid, spec.contract) == (plan.uid, Contract.HTTP)
    assert (spec.model_path, spec.folder) == (Path("/models/m"), FOLDER)
    assert spec.limits == PRESET.limits


def test_a_stand_in_is_no_gpu(bench: Bench) -> None:
    """Only GPUs are handed to a worker."""
    slots = [Slot(spec=spec, number=n) for n, spec in enumerate(slot_specs(2))]
    assert bench.launcher.plan(bench.session(), slots).launch().spec(FOLDER, None).gpu_uuids == ()


def test_an_image_has_its_own_command(bench: Bench) -> None:
    """A preset that names no command leaves it to the image."""
    spec = bench.plan("weights").launch().spec(FOLDER, None)
    assert (spec.command, spec.process_command) == (None, None)


@pytest.mark.parametrize("place", ["queue", "busy"])
def test_a_program_gets_its_task(bench: Bench, place: str) -> None:
    """A program is started with its one task and that task's input, also when it was on its way already."""
    waits = {"queue": deque(["t_1"])} if place == "queue" else {"busy": {"t_1": None}}
    bench.inputs.put("t_1", b"{}")
    launch = bench.plan("exec", **waits).launch()
    assert launch.task_input == b"{}"
    spec = launch.spec(FOLDER, None)
    assert (spec.task_id, spec.contract) == ("t_1", Contract.EXEC)


def test_a_program_whose_input_is_lost(bench: Bench) -> None:
    """It cannot be started any more, and says so."""
    code, message = start_is_refused(bench.plan("exec", queue=deque(["t_1"])))
    assert (code, message) == ("service_restarted", "the task's input was lost with the service")


def test_a_session_gets_no_input(bench: Bench) -> None:
    """The input of a session's first task goes to the worker with the task, not with its start."""
    bench.inputs.put("t_1", b"{}")
    launch = bench.plan(queue=deque(["t_1"])).launch()
    assert (launch.task_input, launch.spec(FOLDER, None).task_id) == (None, None)


@pytest.mark.parametrize("change", ["gone", "another contract"])
def test_presets_may_change_between_lives(bench: Bench, change: str) -> None:
    """A session whose preset is not there any more, or another one, cannot be started."""
    session = bench.session()
    if change == "gone":
        del bench.presets["p"]
    else:
        bench.presets["p"] = EXEC
    code, message = start_is_refused(bench.launcher.plan(session, SLOTS))
    assert code == "start_failed"
    assert message == (
        "there is no preset p" if change == "gone" else "the preset has another contract than before"
    )


# -- models -----------------------------------------------------------------------------------------------


async def test_the_models_folder(bench: Bench) -> None:
    """A preset with weights gets the folder of its model; one without gets none."""
    folder = bench.models / "org" / "m"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    assert await bench.plan("weights").launch().prepare_model(_tell) == folder
    assert await bench.plan().launch().prepare_model(_tell) is None


@pytest.mark.parametrize("model_id", ["org/m", "name:tag", "../m"])
async def test_a_model_that_is_not_there(bench: Bench, model_id: str) -> None:
    """Whatever its id looks like, that is told as what it is, when the worker is to start."""
    with pytest.raises(StartRefused) as refused:
        await bench.plan("weights", model_id).launch().prepare_model(_tell)
    assert refused.value.code == "model_missing"
    assert f"model {model_id} is not in the model store" in refused.value.message


def _tell(done: int, total: int | None) -> None:
    pass


SEALED = ("SEALED_KMS_KEY_ARN", "SEALED_TENANT", "SEALED_POOL")


def test_a_sealed_worker_knows_what_it_serves(bench: Bench) -> None:
    """The one tenant, key and pool whose grants it may take, from nobody but the service."""
    env = dict.fromkeys(SEALED, "evil")
    bench.presets["p"] = PRESET.model_copy(update={"env_vars": env})
    sealing = Sealing(kms_key_arn="arn", pool="chat")
    plan = bench.plan(sealing=sealing)
    spec = plan.launch().spec(FOLDER, None)
    assert (plan.sealed, spec.sealed) == (True, True)
    assert [spec.env[name] for name in SEALED] == ["arn", "a", "chat"]
    plan = bench.plan()
    spec = plan.launch().spec(FOLDER, None)
    assert (plan.sealed, spec.sealed) == (False, False)
    assert not set(SEALED) & set(spec.env)
