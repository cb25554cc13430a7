"""The FastAPI application, and the server that runs it."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from gpu_server import __version__
from gpu_server.api import health, problems, sessions, slots, tasks
from gpu_server.core import events as ev
from gpu_server.http_protocol import BoundedHeadProtocol
from gpu_server.service import Service, open_service
from gpu_server.settings import Settings

GRACEFUL_CLOSE_SECONDS = 10
MAX_DESCRIPTORS = 1 << 16

# The service ends its streams itself, with `task_finish`; sse-starlette would cut them at SIGTERM.
AppStatus.enable_automatic_graceful_drain = False


def create_app(service: Service) -> FastAPI:
    """The application that serves from `service`."""
    app = FastAPI(title="gpu-server", version=__version__)
    app.state.service = service
    problems.install(app)
    for module in (tasks, sessions, slots, health):
        app.include_router(module.router)
    return app


class Server(uvicorn.Server):
    """uvicorn, stopped by the service: at the first signal every session ends, and with them every stream."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are `serve`'s: uvicorn would raise them again before the containers are removed."""
        yield

    def stop(self, service: Service) -> None:
        """End all work and stop taking more; asked again, stop waiting for clients that do not read."""
        self.force_exit = self.should_exit
        self.should_exit = True
        service.engine.report(ev.ShutdownOrdered())


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then remove every container; the exit status.

    Raises what `open_service` raises.
    """
    loop = asyncio.get_running_loop()
    _raise_descriptor_limit()
    async with open_service(settings, on_broken=_stop_this_process) as service:
        server = Server(
            uvicorn.Config(
                create_app(service),
                host=settings.http_host,
                port=settings.http_port,
                lifespan="off",
                log_config=None,
                log_level=settings.log_level,
                access_log=settings.log_level == "debug",
                timeout_graceful_shutdown=GRACEFUL_CLOSE_SECONDS,
                server_header=False,
                http=BoundedHeadProtocol,
                limit_concurrency=settings.http_max_connections,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop, service)
        await server.serve()
    return 1 if service.engine.broken or not server.started else 0


def _raise_descriptor_limit() -> None:
    """A session takes a few descriptors and a client one; the usual soft limit of 1,024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _stop_this_process() -> None:
    """After a bug in a decision nothing can be trusted: stop, and let the next start wash everything."""
    signal.raise_signal(signal.SIGTERM)
