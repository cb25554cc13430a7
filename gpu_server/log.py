"""Structured logs: JSON, or coloured lines on a terminal. Never payloads, prompts or keys."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Set up structlog, and the standard library's loggers (uvicorn's) to the same stream and level."""
    on_terminal = sys.stderr.isatty()
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        # The default would show the local variables of each frame: keys and prompts among them.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if on_terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if on_terminal else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, level=number, format="%(levelname)s %(name)s %(message)s")
    # boto's tell of every request, with its signature.
    boto = ("boto3", "botocore", "s3transfer")
    for noisy in ("urllib3", "docker", "asyncio", "sse_starlette", "aiohttp", *boto):
        logging.getLogger(noisy).setLevel(max(number, logging.WARNING))
