"""Opening a sealed session: the enclave attests itself, the key service releases a data key to it, and it
grants that key to the session's worker (docs/sealed.md).

Nothing that passes through here is secret to this service's host: the document and the worker's key are
public, and the data key is encrypted, for the key service, then for the enclave, then for the worker.
"""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from gpu_server.core.admission import RETRY_AFTER_SECONDS, admit_opening
from gpu_server.core.errors import Refusal, RefusalCode
from gpu_server.core.sessions import Grant, Session
from gpu_server.engine import Engine
from gpu_server.ports import (
    Enclave,
    EnclaveDown,
    EnclaveRefused,
    KeyService,
    KeyServiceDenied,
    KeyServiceDown,
)
from gpu_server.sealed.attestation import Attestation, verify
from gpu_server.sealed.errors import AttestationRefused, Malformed
from gpu_server.sealed.frames import Code
from gpu_server.sealed.grant import GRANT_BYTES, Binding

MAX_AT_ONCE = 16
"""Openings at one time; each more is refused, and comes again in a moment."""
MAX_OF_ONE_SESSION = 2
"""Of those. A tenant whose key service is slow to answer does not take the turns of all others."""
BUSY_RETRY_SECONDS = 1
STEP_SECONDS = 40.0
"""The longest that one step may take; enclave and key service have shorter limits of their own."""
GRANTED = "granted"

_CODES: Mapping[str, RefusalCode] = {
    Code.BUSY: RefusalCode.ENCLAVE_BUSY,
    Code.KMS_DENIED: RefusalCode.KMS_DENIED,
    Code.KMS_DOWN: RefusalCode.KMS_DOWN,
    Code.POLICY: RefusalCode.ENCLAVE_REFUSED,
    Code.REPLAY: RefusalCode.REPLAY,
    Code.DECRYPT: RefusalCode.DECRYPT_FAILED,
    Code.ATTEST: RefusalCode.ATTESTATION_FAILED,
}
_RETRY: Mapping[RefusalCode, int] = {
    RefusalCode.ENCLAVE_BUSY: BUSY_RETRY_SECONDS,
    RefusalCode.KMS_DOWN: RETRY_AFTER_SECONDS,
    RefusalCode.ENCLAVE_UNAVAILABLE: RETRY_AFTER_SECONDS,
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What the client verifies before it seals anything. `slots` are the newest wash records that the
    document names, of which there are none yet; the level of assurance is what the client finds in the
    document itself, never what `mode` says."""

    document: bytes
    worker_key: str
    epoch: bytes
    slots: tuple[bytes, ...]
    mode: str


class Opening:
    """Opens sealed sessions, a bounded number at once. `outcomes` counts them: `granted`, or why not."""

    def __init__(self, engine: Engine, enclave: Enclave | None, keys: KeyService | None) -> None:
        self.outcomes: Counter[str] = Counter()
        self._engine, self._enclave, self._keys = engine, enclave, keys
        self._under_way: Counter[str] = Counter()

    def require_enclave(self) -> Enclave:
        """The enclave of this node, up or not. Raises `Refusal` where there is none."""
        if self._enclave is None:
            message = "this node has no enclave (ENCLAVE=off), so nothing can be sealed to its workers"
            raise Refusal(RefusalCode.ENCLAVE_UNAVAILABLE, message)
        return self._enclave

    async def open(self, session_id: str, *, tenant: str, nonce: bytes, wrapped_key: bytes) -> Opened:
        """Attest, release, grant, and keep the grant for the session's tasks. May be done again: each data
        key has a grant of its own. Raises `Refusal`, and then the session is as it was.

        It is carried to its end also when the client has gone: it may ask again.
        """
        try:
            opened = await self._open(session_id, tenant, nonce, wrapped_key)
        except Refusal as refusal:
            self.outcomes[refusal.code] += 1
            raise
        self.outcomes[GRANTED] += 1
        return opened

    async def _open(self, session_id: str, tenant: str, nonce: bytes, wrapped_key: bytes) -> Opened:
        session = admit_opening(self._engine.node, session_id, tenant)
        enclave, keys = self.require_enclave(), self._keys
        sealing, worker_key = session.sealing, session.worker_key
        assert keys is not None
        assert sealing is not None
        assert worker_key is not None
        async with self._one_more(session):
            async with _told_as_refusals(session):
                document = await enclave.attest(nonce)
            attestation = await self._look_into(document, nonce, enclave, session)
            async with _told_as_refusals(session, late=RefusalCode.KMS_DOWN):
                for_recipient = await keys.release(
                    kms_key_arn=sealing.kms_key_arn,
                    wrapped_key=wrapped_key,
                    context={"tenant": tenant, "pool": sealing.pool},
                    document=document,
                )
            async with _told_as_refusals(session):
                binding = Binding(
                    tenant=tenant,
                    pool=sealing.pool,
                    kms_key_arn=sealing.kms_key_arn,
                    session_id=session_id,
                    epoch=attestation.epoch,
                    worker_key=base64.b64decode(worker_key),
                    wrapped_key=wrapped_key,
                )
                grant = await enclave.grant(binding, for_recipient)
            if len(grant) != GRANT_BYTES:
                raise _refusal(session, RefusalCode.INTERNAL, "the enclave's grant is none")
        # The session may have ended meanwhile: the core looks again.
        self._engine.open_session(
            session_id,
            tenant=tenant,
            psk_id=binding.psk_id.hex(),
            grant=Grant(epoch=_text(attestation.epoch), wrapped_key=_text(wrapped_key), grant=_text(grant)),
        )
        return Opened(
            document=document,
            worker_key=worker_key,
            epoch=attestation.epoch,
            slots=attestation.slots,
            mode=enclave.mode,
        )

    @asynccontextmanager
    async def _one_more(self, session: Session) -> AsyncIterator[None]:
        if self._under_way.total() >= MAX_AT_ONCE:
            message = f"{MAX_AT_ONCE} sessions are being opened, which is the most at once"
            raise _refusal(session, RefusalCode.ENCLAVE_BUSY, message)
        if self._under_way[session.id] >= MAX_OF_ONE_SESSION:
            message = f"session {session.id} is being opened {MAX_OF_ONE_SESSION} times already"
            raise _refusal(session, RefusalCode.ENCLAVE_BUSY, message)
        self._under_way[session.id] += 1
        try:
            yield
        finally:
            self._under_way -= Counter((session.id,))  # which drops it at none

    async def _look_into(
        self, document: bytes, nonce: bytes, enclave: Enclave, session: Session
    ) -> Attestation:
        """What the document says. It is the client and the key service that must be convinced by it; it is
        verified here too, so that what cannot convince them is told as what it is. (A few milliseconds of
        signatures, in a thread.)"""
        try:
            found = await asyncio.to_thread(
                verify,
                document,
                nonce=nonce,
                pcrs={},
                allow_simulated=enclave.mode == "simulated",
                at_document_time=True,  # the nonce says that it is new, whatever this machine's clock says
            )
            _ = found.epoch, found.slots
        except (AttestationRefused, Malformed) as refused:
            log.error("enclave.document_refused", session_id=session.id, reason=str(refused))
            message = f"the enclave's attestation document is not valid: {refused}"
            raise _refusal(session, RefusalCode.ATTESTATION_FAILED, message) from refused
        return found


@asynccontextmanager
async def _told_as_refusals(
    session: Session, *, late: RefusalCode = RefusalCode.ENCLAVE_UNAVAILABLE
) -> AsyncIterator[None]:
    """One step with the enclave or the key service: what goes wrong there, as a refusal."""
    try:
        async with asyncio.timeout(STEP_SECONDS):
            yield
    except EnclaveDown as down:
        raise _refusal(session, RefusalCode.ENCLAVE_UNAVAILABLE, f"the enclave is away: {down}") from down
    except EnclaveRefused as refused:
        code = _CODES.get(refused.code, RefusalCode.INTERNAL)
        raise _refusal(session, code, f"the enclave refused ({refused.code}): {refused}") from refused
    except Malformed as malformed:
        raise _refusal(session, RefusalCode.INTERNAL, str(malformed)) from malformed
    except KeyServiceDenied as denied:
        raise _refusal(session, RefusalCode.KMS_DENIED, str(denied)) from denied
    except KeyServiceDown as down:
        raise _refusal(session, RefusalCode.KMS_DOWN, str(down)) from down
    except TimeoutError as error:
        raise _refusal(session, late, f"no answer within {STEP_SECONDS:g} s") from error


def _refusal(session: Session, code: RefusalCode, message: str) -> Refusal:
    return Refusal(code, message, retry_after=_RETRY.get(code), session_id=session.id)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
