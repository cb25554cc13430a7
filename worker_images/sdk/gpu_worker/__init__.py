"""Write a worker for gpu-server. See README.md; the wire is described in docs/worker-contract.md."""

from gpu_worker.emit import BlockingEmitter, Emitter
from gpu_worker.errors import Cancelled, TaskError
from gpu_worker.tasks import Task
from gpu_worker.worker import BlockingProgress, Progress, Worker

__all__ = [
    "BlockingEmitter",
    "BlockingProgress",
    "Cancelled",
    "Emitter",
    "Progress",
    "Task",
    "TaskError",
    "Worker",
]
