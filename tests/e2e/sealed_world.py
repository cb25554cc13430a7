"""What sealed requests need beside the service: a KMS, data keys, and the enclave's measurements."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gpu_server.client import AwsDataKeys, Client, DataKey, Expected, SealedSession, open_sealed
from gpu_server.kms_emulator import EmulatedKey, KmsEmulator
from tests.e2e.harness import ROOT, Service

ACCOUNT = "arn:aws:kms:eu-west-1:111122223333:key"
ARN = f"{ACCOUNT}/11111111-2222-4333-8444-555555555555"
OTHER_ARN = f"{ACCOUNT}/99999999-2222-4333-8444-555555555555"
WRONG_PCR_ARN = f"{ACCOUNT}/aaaaaaaa-2222-4333-8444-555555555555"
WRONG_TENANT_ARN = f"{ACCOUNT}/bbbbbbbb-2222-4333-8444-555555555555"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "of-nobody",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anything",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def measurements() -> dict[str, str]:
    """The PCRs of the enclave program as it lies in this checkout, in simulated mode."""
    shown = subprocess.run(
        [sys.executable, "-m", "enclave", "--measurements"],
        env={"PYTHONPATH": f"{ROOT / 'enclave_image'}:{ROOT}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(shown.stdout))


@contextmanager
def key_service() -> Iterator[str]:
    """A KMS on loopback, in a thread of its own; its address. `ARN` and `OTHER_ARN` serve this enclave."""
    pcr0 = measurements()["PCR0"]
    image = {"kms:RecipientAttestation:ImageSha384": pcr0}
    keys = {
        ARN: EmulatedKey(conditions=image),
        OTHER_ARN: EmulatedKey(conditions=image),
        WRONG_PCR_ARN: EmulatedKey(conditions={"kms:RecipientAttestation:PCR0": "ab" * 48}),
        WRONG_TENANT_ARN: EmulatedKey(conditions={**image, "kms:EncryptionContext:tenant": "somebody-else"}),
    }
    serving: list[str] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with KmsEmulator(keys, allow_simulated=True) as kms:
            serving.append(kms.url)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="kms")
    thread.start()
    try:
        assert ready.wait(30), "the KMS emulator did not start"
        yield serving[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


class SeenDataKeys:
    """The client's data keys, which a test may look for afterwards."""

    def __init__(self, endpoint_url: str) -> None:
        self._keys = AwsDataKeys(endpoint_url=endpoint_url)
        self.made: list[DataKey] = []

    async def generate(self, kms_key_arn: str, context: Mapping[str, str]) -> DataKey:
        self.made.append(await self._keys.generate(kms_key_arn, context))
        return self.made[-1]


class SealedWorld:
    """A service with a simulated enclave, and all that a tenant needs to use it sealed."""

    def __init__(self, service: Service, kms_url: str) -> None:
        self.service, self.keys = service, SeenDataKeys(kms_url)
        self.expect = Expected(pcr0=measurements()["PCR0"])

    async def open(
        self,
        client: Client,
        *,
        pool: str | None = "words",
        kms_key_arn: str = ARN,
        expect: Expected | None = None,
        session_id: str | None = None,
        allow_simulated: bool = True,
        within: float = 60,
    ) -> SealedSession:
        """A sealed session that is open."""
        return await open_sealed(
            client,
            pool=pool,
            kms_key_arn=kms_key_arn,
            expect=expect or self.expect,
            keys=self.keys,
            session_id=session_id,
            allow_simulated=allow_simulated,
            open_seconds=within,
        )

    def enclave_pids(self) -> list[int]:
        """The enclave's processes, by the folder they run in."""
        if self.service.engine is not None:
            found = self.service.containers(enclave=True)
            tops = [self.service.engine.top(c["Id"]) for c in found if c["State"] == "running"]
            return [int(row[1]) for top in tops for row in top["Processes"]]
        pids = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                folder = (entry / "cwd").readlink()
                if folder.is_relative_to(self.service.run_dir) and folder.suffix == ".enclave":
                    pids.append(int(entry.name))
        return pids

    def worker_pids(self, session_id: str) -> list[int]:
        """The processes of one session's worker, as this machine sees them."""
        if self.service.engine is None:
            return self.service.worker_pids()
        found = [c for c in self.service.containers() if session_id in c["Names"][0]]
        return [int(row[1]) for c in found for row in self.service.engine.top(c["Id"])["Processes"]]
