"""Clients of the HTTP interface: `Client`, and `open_sealed` of it for requests that only a worker can read.

They need nothing of the service: aiohttp and orjson, and for the sealed path what `gpu_server.sealed` needs.
"""

from gpu_server.client.service import Client, Refused, TaskEvent, read_events

__all__ = ["Client", "Refused", "TaskEvent", "read_events"]
