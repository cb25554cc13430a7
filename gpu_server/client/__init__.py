"""Clients of the HTTP interface: `Client`, and `open_sealed` of it for requests that only a worker can read.

They need nothing of the service: aiohttp and orjson, and for the sealed path what `gpu_server.sealed` needs.
"""

from gpu_server.client.events import TaskEvent, Unreadable, read_events
from gpu_server.client.kms import AwsDataKeys, DataKey, DataKeyFailed, DataKeys
from gpu_server.client.measurements import Expected
from gpu_server.client.sealed import OpenRefused, SealedSession, SessionEnded, open_sealed
from gpu_server.client.sealed_stream import SealedStreamBroken
from gpu_server.client.service import Client, Refused
from gpu_server.client.sync import SyncClient, SyncSealedSession
from gpu_server.client.waiting import OpenTimeout
from gpu_server.client.washes import WashNotProven
from gpu_server.sealed.errors import AttestationRefused, Malformed, SealedError

__all__ = [
    "AttestationRefused",
    "AwsDataKeys",
    "Client",
    "DataKey",
    "DataKeyFailed",
    "DataKeys",
    "Expected",
    "Malformed",
    "OpenRefused",
    "OpenTimeout",
    "Refused",
    "SealedError",
    "SealedSession",
    "SealedStreamBroken",
    "SessionEnded",
    "SyncClient",
    "SyncSealedSession",
    "TaskEvent",
    "Unreadable",
    "WashNotProven",
    "open_sealed",
    "read_events",
]
