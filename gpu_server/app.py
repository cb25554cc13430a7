"""The FastAPI application, and the server that runs it."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from gpu_server import __version__
from gpu_server.api import (
    certificates,
    health,
    inference,
    metrics,
    openai,
    openai_errors,
    problems,
    sessions,
    slots,
    tasks,
)
from gpu_server.core import events as ev
from gpu_server.http_protocol import BoundedHeadProtocol
from gpu_server.service import Service, open_service
from gpu_server.settings import Settings

GRACEFUL_CLOSE_SECONDS = 10
HANDOVER_CLOSE_SECONDS = 1  # meanwhile nobody is served
MAX_DESCRIPTORS = 1 << 16

# The service ends its streams itself, with `task_finish`; sse-starlette would cut them at SIGTERM.
AppStatus.enable_automatic_graceful_drain = False


def create_app(service: Service) -> FastAPI:
    """The application that serves from `service`."""
    app = FastAPI(title="gpu-server", version=__version__)
    app.state.service = service
    problems.install(app)
    openai_errors.install(app)
    for module in (tasks, sessions, inference, openai, slots, certificates, health, metrics):
        app.include_router(module.router)
    return app


class Server(uvicorn.Server):
    """uvicorn, stopped by the service: when every session has ended, or was handed over."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are `serve`'s: uvicorn would raise them again before the containers are removed."""
        yield

    stopping = False
    close_seconds: float = GRACEFUL_CLOSE_SECONDS

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let connections end in order; cut those that have not after `close_seconds`, since their clients
        read nothing. (uvicorn would cancel their requests, and log each as an error.)"""
        cut = asyncio.get_running_loop().call_later(self.close_seconds, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def stop(self, service: Service) -> None:
        """Take no more work, let what runs end within SHUTDOWN_GRACE_SECONDS, then end the rest. Asked again,
        end it now; and again, stop waiting for clients that do not read.

        After `hand_over` it ends nothing: a process manager may send SIGTERM right behind SIGUSR2.
        """
        if service.engine.handed_over:
            self.force_exit, self.stopping = self.stopping, True
            return
        if self.stopping or service.engine.broken is not None:
            self.force_exit = self.should_exit
            self._end(service)
            return
        self.stopping = True
        service.engine.spawn("drain", self._drain(service))

    async def _drain(self, service: Service) -> None:
        if not service.engine.handed_over:  # the other signal came in the same moment
            await service.engine.drain(service.settings.shutdown_grace_seconds)
        if not service.engine.handed_over:
            self._end(service)

    def _end(self, service: Service) -> None:
        self.should_exit = True
        service.engine.report(ev.ShutdownOrdered())

    def hand_over(self, service: Service) -> None:
        """Stop serving, and leave every container as it is: the next version takes them up."""
        service.engine.hand_over()
        self.close_seconds = HANDOVER_CLOSE_SECONDS
        self.should_exit = True


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then remove every container; or until SIGUSR2, and leave them to the
    next version. The exit status.

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
                timeout_graceful_shutdown=2 * GRACEFUL_CLOSE_SECONDS,  # `Server.shutdown` comes first
                server_header=False,
                http=BoundedHeadProtocol,
                limit_concurrency=settings.http_max_connections,
            )
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop, service)
        loop.add_signal_handler(signal.SIGUSR2, server.hand_over, service)
        await server.serve()
    return 1 if service.engine.broken or not server.started else 0


def _raise_descriptor_limit() -> None:
    """A session takes a few descriptors and a client one; the usual soft limit of 1,024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _stop_this_process() -> None:
    """After a bug in a decision nothing can be trusted: stop, and let the next start take up what the journal
    says, which knows nothing of that decision."""
    signal.raise_signal(signal.SIGTERM)
