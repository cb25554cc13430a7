"""Real vLLM in a real container without a network, on the CPU, with a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from docker import APIClient

from tests.e2e.harness import Caller, Following, Services
from tests.e2e.openai_features import FEATURES, Feature, Target
from tests.e2e.sealed_world import CREDENTIALS, SealedWorld, key_service
from tests.e2e.vllm_world import ENGINE_ARGS, LOAD_SECONDS, TASKS, VllmService, run_in_image

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2 * LOAD_SECONDS)]

PROMPTS = ["Hello there", "The quick brown fox", "東京と", '{"a": [1, 2', "x"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
GREEDY = {"temperature": 0, "max_tokens": 60}
DIRECT = """
import json, os, sys
from vllm import LLM, SamplingParams
prompts, chat, greedy, args = json.loads(os.environ["ASKED"])
llm = LLM(model="/models", **args)
params = SamplingParams(**greedy)
found = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
found += llm.chat([chat], params, use_tqdm=False)
print("FOUND", json.dumps([[f.outputs[0].text, list(f.outputs[0].token_ids)] for f in found]))
"""


@pytest.fixture(scope="module")
def services(engine_with_images: APIClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Services of this module only: what is loaded here is big."""
    root = tmp_path_factory.mktemp("vllm")
    for folder in (root, *root.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)  # a worker's uid must get to its folder
    found = Services("docker", root, engine_with_images)
    yield found
    found.close()


@pytest.fixture(scope="module")
def kms_url() -> Iterator[str]:
    """A KMS for the sealed session."""
    with pytest.MonkeyPatch.context() as environment, key_service() as url:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        yield url


@pytest.fixture(scope="module")
def vllm(services: Services, engine_with_images: APIClient, kms_url: str) -> VllmService:
    """The service with the tiny model, which serves sealed requests too."""
    sealed = {"ENCLAVE": "simulated", "KMS_ENDPOINT_URL": kms_url, **CREDENTIALS}
    return VllmService(services, engine_with_images, **sealed)


@pytest.fixture
async def caller(vllm: VllmService) -> AsyncIterator[Caller]:
    """The tenant whose session all tests use."""
    async with vllm.service.caller("vllm") as found:
        yield found


@pytest.fixture
async def session(vllm: VllmService, caller: Caller) -> str:
    """The shared session, ready and idle."""
    found = await vllm.warm(caller)
    await vllm.idle()
    return found


async def run(caller: Caller, session: str, **metadata: Any) -> Following:
    """Submit to the shared session and follow to the end."""
    return await caller.run("cpu", model="tiny", session=session, **metadata)


def whole(task: Following) -> str:
    """The whole text of a task, which must be what was streamed."""
    (text,) = task.of("text")
    assert task.text == text["text"]
    return str(text["text"])


def failure(task: Following) -> tuple[str, str]:
    """Code and message with which a task failed, told in an `error` event and again at its end."""
    end = task.events[-1].data
    assert end["status"] == "failed", end
    assert task.of("error") == [end["error"]]
    return end["error"]["code"], end["error"]["message"]


async def test_the_same_text_as_vllm_called_directly(vllm: VllmService, caller: Caller, session: str) -> None:
    """Greedy decoding of prompts and of a chat, streamed by the service, against vLLM's own `LLM`."""
    tasks = [await run(caller, session, prompt=prompt, **GREEDY) for prompt in PROMPTS]
    tasks.append(await run(caller, session, messages=CHAT, **GREEDY))
    said = await asyncio.to_thread(
        run_in_image,
        vllm.engine,
        "/venv/bin/python",
        "-c",
        DIRECT,
        mounts={vllm.model: "/models:ro"},
        env={
            "ASKED": json.dumps([PROMPTS, CHAT, GREEDY, ENGINE_ARGS]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        },
    )
    (line,) = [line for line in said.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert [whole(task) for task in tasks] == [text for text, _ in found]
    assert [task.events[-1].data["usage"]["completion_tokens"] for task in tasks] == [
        len(tokens) for _, tokens in found
    ]
    assert len({text for text, _ in found}) == len(found), "a model that always says the same proves nothing"


async def test_the_second_task_loads_nothing(caller: Caller, session: str) -> None:
    """Two tasks in one session: the model is there, and each has its own usage."""
    for _ in range(2):
        task = await run(caller, session, prompt=[5, 6, 7], max_tokens=4, ignore_eos=True)
        assert task.of("connection")[0]["status"] == "session_ready"
        assert "loading" not in [data["status"] for data in task.of("worker")]
        assert task.events[-1].data["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
        }


async def test_a_sealed_session_says_the_same(
    vllm: VllmService, caller: Caller, session: str, kms_url: str
) -> None:
    """The same worker program in a sealed session: the same text, which the service does not see."""
    plain = await run(caller, session, prompt=PROMPTS[0], **GREEDY)
    world = SealedWorld(vllm.service, kms_url)
    async with await world.open(caller.client, pool="tiny", within=LOAD_SECONDS) as sealed:
        events = [event async for event in sealed.submit({"prompt": PROMPTS[0], **GREEDY})]
        assert [event.data["text"] for event in events if event.event == "text"] == [whole(plain)]
        assert events[-1].sealed
        assert events[-1].data["usage"] == plain.events[-1].data["usage"]


async def test_eight_tasks_are_one_batch(vllm: VllmService, caller: Caller, session: str) -> None:
    """Eight tasks of 200 tokens take the engine not much more steps than one."""
    before = await vllm.figures()
    tasks = await asyncio.gather(
        *(run(caller, session, prompt=f"Task {n}", max_tokens=200, ignore_eos=True, seed=n) for n in range(8))
    )
    after = await vllm.idle()
    assert [task.events[-1].data["usage"]["completion_tokens"] for task in tasks] == [200] * TASKS
    assert after["steps"] - before["steps"] < 2 * 200


async def test_cancel_frees_the_engine_slot(vllm: VllmService, caller: Caller, session: str) -> None:
    """A task that is cancelled while it streams leaves the engine at once; the others go on there."""
    tasks = [
        await caller.started("cpu", model="tiny", session=session, prompt=f"{n}", ignore_eos=True, seed=n)
        for n in range(TASKS)
    ]
    for task in tasks:
        await task.until("text_delta")
    await vllm.running(TASKS)
    await caller.cancel(tasks[3].task_id)
    assert (await tasks[3].finish())["status"] == "cancelled"
    await vllm.running(TASKS - 1)
    for task in tasks[:3] + tasks[4:]:
        await caller.cancel(task.task_id)
        assert (await task.finish())["status"] == "cancelled"
    assert (await vllm.idle())["kv_cache_usage"] == 0
    assert whole(await run(caller, session, prompt="again", max_tokens=3)) is not None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"prompt": "a", "temperature": 3}, "temperature must be a number from 0 to 2"),
        ({"prompt": "a", "best_of": 2}, "'best_of' is not a parameter"),
        ({"prompt": [999_999]}, "prompt: Token id 999999 is out of vocabulary"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        (
            {
                "prompt": "a",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
                },
            },
            "response_format: ",
        ),
        (
            {
                "prompt": "a",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "integer", "multipleOf": 3}},
                },
            },
            "response_format: ",
        ),
        ({"prompt": [999_999], "response_format": {"type": "json_object"}}, "prompt: Token id 999999"),
    ],
)
async def test_wrong_parameters(caller: Caller, session: str, metadata: dict[str, Any], says: str) -> None:
    """The task fails as `invalid_request`, the message names the parameter, and the session goes on."""
    code, message = failure(await run(caller, session, **metadata))
    assert code == "invalid_request"
    assert says in message


@pytest.mark.parametrize("prompt", ["many words " * 3000, [7] * 2048, [7] * 5000])
async def test_a_prompt_beyond_the_context(caller: Caller, session: str, prompt: Any) -> None:
    """It is refused, with the numbers."""
    code, message = failure(await run(caller, session, prompt=prompt))
    assert code == "context_length_exceeded"
    assert "2048" in message


async def test_a_chat_beyond_any_context(caller: Caller, session: str) -> None:
    """Its characters are counted before the template sees it."""
    code, message = failure(await run(caller, session, messages=[{"role": "user", "content": "a" * 200_000}]))
    assert code == "context_length_exceeded"
    assert "200000 characters" in message


async def test_the_end_of_the_context_ends_the_text(caller: Caller, session: str) -> None:
    """More tokens than the context has are cut off there, which the finish reason says."""
    task = await run(caller, session, prompt=[7] * 2000, max_tokens=5000, ignore_eos=True)
    assert task.of("text")[0]["finish_reason"] == "length"
    assert task.events[-1].data["usage"]["total_tokens"] == 2048


async def test_stop_texts(caller: Caller, session: str) -> None:
    """Text ends before the first of them, and no part of it is streamed."""
    full = whole(await run(caller, session, prompt="Hello there", **GREEDY))
    stop = full[11:14]
    task = await run(caller, session, prompt="Hello there", stop=["never said", stop], **GREEDY)
    assert whole(task) == full[: full.index(stop)]
    assert (task.of("text")[0]["finish_reason"], task.of("text")[0]["stop_reason"]) == ("stop", stop)


async def test_seeds(caller: Caller, session: str) -> None:
    """The same seed gives the same text, another one another."""
    texts = [
        whole(await run(caller, session, prompt="x", temperature=1.5, max_tokens=30, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_logprobs(caller: Caller, session: str) -> None:
    """Each token with its own and the most probable ones; greedy decoding takes the first of them."""
    task = await run(caller, session, prompt="x", logprobs=3, temperature=0, max_tokens=10, ignore_eos=True)
    tokens = [token for data in task.of("text_delta") for token in data["logprobs"]]
    assert len(tokens) == 10
    for token in tokens:
        best = token["top_logprobs"]
        assert [(token["token"], token["logprob"])] == [(best[0]["token"], best[0]["logprob"])]
        assert len(best) == 3
        assert sorted((other["logprob"] for other in best), reverse=True) == [o["logprob"] for o in best]
        assert bytes(token["bytes"]).decode() == token["token"]
    alone = await run(caller, session, prompt="x", logprobs=0, max_tokens=1)
    assert alone.of("text_delta")[0]["logprobs"][0]["top_logprobs"] == []


async def test_a_character_of_several_tokens_comes_whole(caller: Caller, session: str) -> None:
    """No delta holds half a character that a later one puts right."""
    bias = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"enum": ["żółw🙂"]}},
        }
    }
    task = await run(caller, session, prompt="x", temperature=0, max_tokens=100, **bias)
    assert json.loads(whole(task)) == "żółw🙂"
    assert task.events[-1].data["usage"]["completion_tokens"] > len(task.of("text_delta")), "none was split"


async def test_structured_output(caller: Caller, session: str) -> None:
    """A model that speaks nonsense speaks it in the form of the schema."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    task = await run(caller, session, prompt="x", seed=3, max_tokens=400, response_format=wanted)
    assert task.of("text")[0]["finish_reason"] == "stop"
    assert json.loads(whole(task)).keys() == {"colour", "count"}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
async def test_the_official_client(vllm: VllmService, caller: Caller, session: str, feature: Feature) -> None:
    """Each feature of the OpenAI interface, in the session that is there."""
    service = vllm.service
    await feature(Target(url=service.url, key=service.key, tenant=caller.tenant, model="tiny", chooses=True))


async def test_an_engine_argument_that_is_none(caller: Caller) -> None:
    """A preset's mistake is told as such, by name, and not after minutes."""
    session = (await caller.open("wrong", model="tiny"))["session_id"]
    error = (await caller.in_state(session, "failed", within=LOAD_SECONDS))["error"]
    assert error["code"] == "start_failed"
    assert "ENGINE_ARGS: vLLM has no engine argument no_such_argument" in error["message"]


WRONG_ARGS = """
import sys
sys.path.insert(0, "/app")
import text_engine
from gpu_worker import Worker
for wrong in ('{"max_num_seqs": null}', '{"max_num_seqs": "64"}', '{"compilation_config": {"level": "x"}}',
              '{"structured_outputs_config": {"backend": "none"}}'):
    try:
        text_engine._start(text_engine.engine_args({"ENGINE_ARGS": wrong}), Worker())
    except text_engine.SettingError as error:
        print("SAID", str(error).splitlines()[0])
"""


async def test_engine_arguments_of_a_wrong_type(vllm: VllmService) -> None:
    """They are told as such too, with the name of the variable."""
    env = {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    said = await asyncio.to_thread(
        run_in_image, vllm.engine, "/venv/bin/python", "-c", WRONG_ARGS, mounts={}, env=env
    )
    told = [line for line in said.splitlines() if line.startswith("SAID ")]
    assert told[:2] == ["SAID ENGINE_ARGS: max_num_seqs must be a whole number"] * 2
    assert len(told) == 4
    assert all(line.startswith("SAID ENGINE_ARGS: ") for line in told)


async def test_the_engine_is_killed(vllm: VllmService, caller: Caller, session: str) -> None:
    """Its tasks end cleanly and say why, and the session ends with the same reason: last, for it ends it.
    A task that failed before is not the reason."""
    failure(await run(caller, session, prompt=[999_999]))
    tasks = [
        await caller.started("cpu", model="tiny", session=session, prompt=f"{n}", ignore_eos=True, seed=n)
        for n in range(4)
    ]
    for task in tasks:
        await task.until("text_delta")
    await asyncio.to_thread(vllm.kill_engine)
    for task in tasks:
        await task.finish()
        code, message = failure(task)
        assert code == "engine_dead"
        assert message == "vLLM's engine process was ended by SIGKILL (often: the memory limit)"
    ended = await caller.ended(session)
    assert (ended["state"], ended["close_reason"]) == ("failed", "worker_exited")
    assert "exited with code 1" in ended["error"]["message"]
    assert message in ended["error"]["message"]
    await vllm.service.settle()
