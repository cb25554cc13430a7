"""The vLLM worker: text generation (docs/text-generation.md) with the model at MODEL_PATH.

It is the same program on GPUs and, for tests, on a CPU. README.md beside this file describes its environment.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import TYPE_CHECKING, Any

import text_request
from gpu_worker import Emitter, Progress, Task, Worker

if TYPE_CHECKING:
    from text_engine import Engine

# For vLLM in a container without a network; a preset's env_vars win.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would copy a process that has threads
    "VLLM_LOGGING_STREAM": "ext://sys.__stdout__",  # the container's log, not the log events of a task
}

worker = Worker()


@worker.load
async def load(progress: Progress) -> Engine:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Not at the top: vLLM reads its environment when it is imported, which takes long, and the engine's own
    # processes import this module too.
    text_engine = await asyncio.to_thread(importlib.import_module, "text_engine")
    return await text_engine.load(os.environ, progress, worker)


@worker.task
async def run(task: Task, emit: Emitter) -> dict[str, Any]:
    engine: Engine = task.state
    return await engine.run(text_request.parse(task.metadata), task.id, emit)


if __name__ == "__main__":
    worker.run()
