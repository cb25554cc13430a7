"""vLLM's engine, in processes of its own, as this worker uses it: load, generate, abort, and its death.

Made for vLLM 0.32; what it takes from vLLM's inside is in this file.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import fields
from multiprocessing.process import BaseProcess
from signal import Signals
from time import monotonic
from typing import Any

from console import Console, Tap, is_echo
from gpu_worker import Emitter, Progress, TaskError, Worker
from text_request import Request
from text_steps import events, told
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger

HEARTBEAT_SECONDS = 1.0
EXIT_NEWS_SECONDS = 2.0
GRAMMAR_SECONDS = 10.0
GRAMMAR_THREADS = 2
_TOO_LONG = ("input_tokens", "input_text")


class SettingError(Exception):
    """The environment asks for what cannot be; the message names the variable."""


def engine_args(environment: Mapping[str, str]) -> dict[str, Any]:
    """The engine's arguments: what follows from the session, and over that the preset's `ENGINE_ARGS`."""
    tasks = int(environment.get("MAX_CONCURRENT_TASKS", "1"))
    args: dict[str, Any] = {
        "model": environment.get("MODEL_PATH", "/models"),
        "served_model_name": environment.get("MODEL_ID", "model"),
        "tensor_parallel_size": max(1, int(environment.get("GPU_COUNT", "0"))),
        "gpu_memory_utilization": float(environment.get("GPU_MEMORY_UTILIZATION", "0.9")),
        "max_num_seqs": tasks,
        "disable_log_stats": True,  # to the log; the figures go to /health
        # Not "auto", which lets the first schema choose, and follows parts of later ones that it cannot.
        "structured_outputs_config": {"backend": "xgrammar"},
    }
    try:
        wanted = json.loads(environment.get("ENGINE_ARGS") or "{}")
    except ValueError as error:
        raise SettingError(f"ENGINE_ARGS is not JSON: {error}") from None
    if not isinstance(wanted, dict):
        raise SettingError("ENGINE_ARGS must be a JSON object: names of engine arguments and their values")
    known = {field.name for field in fields(AsyncEngineArgs)}
    if unknown := sorted(wanted.keys() - known):
        raise SettingError(f"ENGINE_ARGS: vLLM has no engine argument {', '.join(unknown)}")
    args.update(wanted)
    most = args["max_num_seqs"]
    if type(most) is not int:
        raise SettingError("ENGINE_ARGS: max_num_seqs must be a whole number")
    if most < tasks:
        raise SettingError(f"ENGINE_ARGS: max_num_seqs is {most}, the preset's max_concurrent_tasks {tasks}")
    return args


async def load(environment: Mapping[str, str], progress: Progress, worker: Worker) -> Engine:
    """Start the engine and generate a first token, telling how far it is at least every second."""
    args = engine_args(environment)
    console = Console()
    tap = Tap(console.hear)
    began = monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(asyncio.to_thread(_start, args, worker), name="start the engine")
            while not starting.done():
                # Where the engine does not say how much there is to do, `done` is seconds.
                await progress(*(console.stage or ("engine", round(monotonic() - began), None)))
                await asyncio.wait([starting], timeout=HEARTBEAT_SECONDS)
    except BaseExceptionGroup as several:
        tap.close()
        (error,) = several.exceptions
        if console.fault is not None and is_echo(str(error)):
            raise RuntimeError(console.fault) from error
        raise error from None
    await progress("first token", 0, None)
    engine = Engine(starting.result(), console, tap, worker.fail)
    await engine.warm_up()
    console.ready()
    # All that vLLM has made so far stays; to look through it again and again held up tokens for up to 1 s.
    gc.collect()
    gc.freeze()
    return engine


def _start(args: dict[str, Any], worker: Worker) -> AsyncLLM:
    """In a thread: it blocks until the engine's processes have loaded the model."""
    loggers: list[Any] = [_figures(worker.tell)]
    structured = args["structured_outputs_config"]
    try:
        if isinstance(structured, dict):  # of several such arguments, vLLM takes this one as an object only
            args = {**args, "structured_outputs_config": StructuredOutputsConfig(**structured)}
        asked = AsyncEngineArgs(**args)
    except (TypeError, ValueError) as error:
        raise SettingError(f"ENGINE_ARGS: {error}") from error
    return AsyncLLM.from_engine_args(asked, stat_loggers=loggers)


def _figures(tell: Callable[..., None]) -> type[PrometheusStatLogger]:
    """Hears of every step of the engine. It stands where vLLM's own counters would, which nobody reads."""

    class Figures(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            self._steps = self._most = 0
            tell(running=0, waiting=0, steps=0, most_running=0)

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if scheduler_stats is None:
                return
            running = scheduler_stats.num_running_reqs
            self._steps += 1
            self._most = max(self._most, running)
            tell(
                running=running,
                waiting=scheduler_stats.num_waiting_reqs,
                steps=self._steps,
                most_running=self._most,
                kv_cache_usage=round(scheduler_stats.kv_cache_usage, 4),
            )

        def log(self) -> None:
            pass

        def log_engine_initialized(self) -> None:
            pass

        def record_sleep_state(self, *_: Any, **__: Any) -> None:
            pass

        def record_admission_rejection(self, *_: Any, **__: Any) -> None:
            pass

    return Figures


class Engine:
    """A loaded engine. `fail` is called with the reason when it has died."""

    def __init__(self, llm: AsyncLLM, console: Console, tap: Tap, fail: Callable[[str], None]) -> None:
        self._llm, self._console, self._tap, self._fail = llm, console, tap, fail
        self._processes = _processes(llm)
        self._defaults = llm.model_config.get_diff_sampling_param()
        self._death: asyncio.Future[str] | None = None
        # vLLM would make a grammar on the event loop, where all streams would wait for it. So it is not told
        # how to, and a thread does it before. A thread cannot be ended, so there are no more than a few.
        self._grammars = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammar")
        self._grammar_config = llm.input_processor.structured_outputs_config
        llm.input_processor.structured_outputs_config = None

    async def warm_up(self) -> None:
        """One token: what follows does not pay for what is only made at first use."""
        token = {"prompt_token_ids": [0]}
        prompt = await self._render(parse_model_prompt(self._llm.model_config, token))
        params = SamplingParams(max_tokens=1, temperature=0, output_kind=RequestOutputKind.DELTA)
        async for _ in self._llm.generate(prompt, params, "warm-up"):
            pass
        # Its end is the engine's end, whether a task runs then or none.
        assert self._llm.output_handler is not None
        self._llm.output_handler.add_done_callback(
            lambda handler: None if handler.cancelled() else self._has_died()
        )

    async def run(self, request: Request, task_id: str, emit: Emitter) -> dict[str, int]:
        """Generate, and tell each step; gives the usage. Raises `TaskError`; a cancel aborts the request."""
        try:
            return await self._run(request, task_id, emit)
        except EngineDeadError:
            raise TaskError("engine_dead", await self._reason()) from None

    async def _run(self, request: Request, task_id: str, emit: Emitter) -> dict[str, int]:
        prompt = await self._prompt(request)
        prompt_tokens = len(prompt["prompt_token_ids"])
        context = self._llm.model_config.max_model_len
        if prompt_tokens >= context:
            raise TaskError(
                "context_length_exceeded",
                f"the prompt has {prompt_tokens} tokens; the context of {context} leaves none to generate",
            )
        params = await self._params(request)
        pieces: list[str] = []
        completion_tokens = 0
        alternatives = request.logprobs
        last: RequestOutput | None = None
        # Closed at once where this ends early: that aborts the request.
        async with aclosing(self._steps(prompt, params, task_id, request)) as steps:
            async for step in steps:
                last, output = step, step.outputs[0]
                completion_tokens += len(output.token_ids)
                text = output.text
                if text:
                    pieces.append(text)
                tokens = []
                if alternatives is not None and output.logprobs:
                    tokens = [
                        told(token, at, alternatives)
                        for token, at in zip(output.token_ids, output.logprobs, strict=False)
                    ]
                for piece, portion in events(text, tokens):
                    await emit.text_delta(piece, **({"logprobs": portion} if portion else {}))
        assert last is not None
        end = last.outputs[0]
        if end.finish_reason == "error" and request.structured is not None:
            raise TaskError("invalid_request", "response_format: the engine cannot follow this schema")
        if end.finish_reason not in ("stop", "length"):
            raise TaskError("task_failed", f"the engine ended the request as {end.finish_reason}")
        try:
            await emit.text("".join(pieces), finish_reason=end.finish_reason, stop_reason=end.stop_reason)
        except ValueError:
            message = "the text is complete in its deltas, and too long to be told again as a whole"
            raise TaskError("text_too_long", message) from None
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    async def _steps(
        self, prompt: Any, params: SamplingParams, task_id: str, request: Request
    ) -> AsyncGenerator[RequestOutput, None]:
        """What the engine generates. What it refuses before the first step is the request's fault."""
        begun = False
        try:
            async with aclosing(self._llm.generate(prompt, params, task_id)) as steps:
                async for step in steps:
                    begun = True
                    yield step
        except VLLMClientError as error:
            if begun:
                raise
            raise _refusal(error, request) from None
        except EngineGenerateError as error:
            if isinstance(error.__cause__, ValueError) and not begun:
                raise _refusal(error.__cause__, request) from None
            raise TaskError("task_failed", _message(error.__cause__ or error)) from error
        except EngineDeadError:
            raise
        except BaseException:
            # A cancel while vLLM hands the request over leaves it in the engine. To abort one that is gone
            # is nothing.
            with suppress(Exception):
                await asyncio.shield(self._llm.abort(task_id))
            raise

    async def _params(self, request: Request) -> SamplingParams:
        """The parameters, checked against the model, and the grammar that they ask for against its makers."""
        wanted = {"max_tokens": None, **self._defaults, **request.sampling}
        try:
            if request.structured is None:
                return SamplingParams(output_kind=RequestOutputKind.DELTA, **wanted)
            wanted["structured_outputs"] = StructuredOutputsParams(**request.structured)
            params = SamplingParams(output_kind=RequestOutputKind.DELTA, **wanted)
            model, speculation = self._llm.model_config, self._llm.vllm_config.speculative_config
            tokenizer = self._llm.renderer.tokenizer
            making = asyncio.get_running_loop().run_in_executor(
                self._grammars, params.verify, model, speculation, self._grammar_config, tokenizer
            )
            async with asyncio.timeout(GRAMMAR_SECONDS):
                await making
        except TimeoutError:
            message = f"response_format: no grammar was made of it within {GRAMMAR_SECONDS:g} s"
            raise TaskError("invalid_request", message) from None
        except (VLLMClientError, ValueError) as error:
            # The schema is what is checked last; other parameters are named.
            raise _refusal(error, request, "response_format" if request.structured else None) from None
        return params

    async def _prompt(self, request: Request) -> Any:
        """The prompt as the engine takes it; a template or a tokenizer may take long, so threads do it."""
        try:
            if request.messages is not None:
                self._check_length(request.characters)
                chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
                _, (prompt,) = await self._llm.renderer.render_chat_async([request.messages], chat)
                return prompt
            content: Any = request.prompt
            if isinstance(content, list):
                self._llm.renderer.validate_token_ids(content, parameter="prompt")
                content = {"prompt_token_ids": content}
            return await self._render(parse_model_prompt(self._llm.model_config, content))
        except TimeoutError as error:
            raise TaskError("prompt_timeout", f"messages: {_message(error)}") from None
        except (VLLMClientError, ValueError) as error:
            raise _refusal(error, request, "prompt" if request.messages is None else "messages") from None

    def _check_length(self, characters: int) -> None:
        """A template takes its time and memory for any length; vLLM looks at the length after it."""
        context = self._llm.model_config.max_model_len
        tokenizer = self._llm.renderer.tokenizer
        if tokenizer is not None and characters > context * tokenizer.max_chars_per_token:
            raise TaskError(
                "context_length_exceeded",
                f"the messages have {characters} characters; no context of {context} tokens holds as many",
            )

    async def _render(self, parsed: Any) -> Any:
        (prompt,) = await self._llm.renderer.render_cmpl_async([parsed])
        return prompt

    # -- death ----------------------------------------------------------------------------------------------

    def _has_died(self) -> None:
        """On the event loop, when vLLM has noticed. Finding the reason may take a moment, in a thread."""
        if self._death is None:
            loop = asyncio.get_running_loop()
            self._death = loop.run_in_executor(None, self._find_reason)
            self._death.add_done_callback(lambda found: self._fail(found.result()))

    async def _reason(self) -> str:
        self._has_died()
        assert self._death is not None
        return await asyncio.shield(self._death)

    def _find_reason(self) -> str:
        for process in self._processes:
            process.join(EXIT_NEWS_SECONDS)
        self._tap.close()
        ended = [_how(process) for process in self._processes if process.exitcode is not None]
        how = f"vLLM's engine process {', '.join(ended)}" if ended else "vLLM's engine has failed"
        signalled = any((process.exitcode or 0) < 0 for process in self._processes)  # that is the reason
        return how if signalled or self._console.fault is None else f"{how}: {self._console.fault}"


def _processes(llm: AsyncLLM) -> list[BaseProcess]:
    manager = llm.engine_core.resources.engine_manager
    return list(manager.processes) if manager is not None else []


def _how(process: BaseProcess) -> str:
    status = process.exitcode
    assert status is not None
    if status >= 0:
        return f"exited with status {status}"
    killed = " (often: the memory limit)" if -status == Signals.SIGKILL else ""
    return f"was ended by {Signals(-status).name}{killed}"


def _refusal(error: BaseException, request: Request, about: str | None = None) -> TaskError:
    """What vLLM says of a request that it does not take. The parameter is named where it does not do so:
    `about`, if it is no other."""
    message, parameter = _message(error), getattr(error, "parameter", None) or about
    if parameter in _TOO_LONG:
        return TaskError("context_length_exceeded", message)
    if parameter is not None and not any(name in message for name in (parameter, *request.sampling)):
        message = f"{parameter}: {message}"
    return TaskError("invalid_request", message)


def _message(error: BaseException) -> str:
    """Without what vLLM appends for its own server."""
    return str(error.args[0]) if error.args else type(error).__name__
