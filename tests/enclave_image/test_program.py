"""The enclave's operations, with a real (software) security module and real cryptography."""

from __future__ import annotations

from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from enclave.program import VERSION, Program
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_server.sealed.attestation import verify
from gpu_server.sealed.canonical import decode
from gpu_server.sealed.cms import make_recipient
from gpu_server.sealed.frames import Code, Op, Request
from gpu_server.sealed.grant import Binding, WorkerKey, open_grant
from gpu_server.sealed.nsm import Nsm
from gpu_server.sealed.software_nsm import SoftwareNsm

ARN = "arn:aws:kms:eu-west-1:123456789012:key/00000000-0000-0000-0000-000000000000"
DATA_KEY = sha256(b"a data key").digest()
PCRS = {0: b"\1" * 48, 1: b"\2" * 48, 2: b"\3" * 48}
NONCE = b"n" * 32


class Enclave:
    """A program, and what it mixed into the kernel's pool."""

    def __init__(self, nsm: Nsm | None = None) -> None:
        self.mixed: list[bytes] = []
        self.program = Program(nsm or Nsm(SoftwareNsm(PCRS).process), mode="simulated", mix=self.mixed.append)

    def ask(self, op: Op, *args: object) -> tuple[Code, list[object]]:
        code, result = self.program.handle(Request(op, 1, list(args)))  # type: ignore[arg-type]
        return code, list(result)

    def spki(self) -> bytes:
        code, (document,) = self.ask(Op.HELLO, NONCE)
        assert code is Code.OK
        key = verify(document, nonce=NONCE, pcrs=PCRS, allow_simulated=True).public_key  # type: ignore[arg-type]
        assert key is not None
        return key


@pytest.fixture
def enclave() -> Enclave:
    made = Enclave()
    assert made.ask(Op.INIT)[0] is Code.OK
    return made


def grant_args(worker_key: bytes, for_recipient: bytes, **changed: object) -> list[object]:
    names = {"tenant": "acme", "pool": "chat", "arn": ARN, "session": "s_1"}
    names |= {"worker": worker_key, "wrapped": b"w"}  # type: ignore[dict-item]
    return [*{**names, **changed}.values(), for_recipient]


def test_status_before_and_after_init() -> None:
    """It is new until INIT, then ready, and always says its version, its mode and its epoch."""
    enclave = Enclave()
    assert enclave.ask(Op.STATUS) == (Code.OK, ["new", b"", VERSION, "simulated"])
    _, (epoch,) = enclave.ask(Op.INIT)
    assert enclave.ask(Op.STATUS) == (Code.OK, ["ready", epoch, VERSION, "simulated"])


def test_nothing_before_init() -> None:
    """Before INIT there is no key, so no document and no grant."""
    enclave = Enclave()
    assert enclave.ask(Op.HELLO, NONCE) == (Code.POLICY, [])
    assert enclave.ask(Op.GRANT, *grant_args(bytes(32), b"x")) == (Code.POLICY, [])


def test_init_is_once() -> None:
    """A second INIT changes nothing: neither the key nor the records in documents."""
    enclave = Enclave()
    _, (epoch,) = enclave.ask(Op.INIT, b"r" * 32)
    assert enclave.ask(Op.INIT, b"q" * 32) == (Code.POLICY, [])
    assert enclave.ask(Op.STATUS)[1][1] == epoch
    _, (document,) = enclave.ask(Op.HELLO, NONCE)
    attested = verify(document, nonce=NONCE, pcrs=PCRS, allow_simulated=True)  # type: ignore[arg-type]
    assert attested.slots == (b"r" * 32,)


def test_randomness_is_mixed_in_before_the_key() -> None:
    """256 bytes of the security module's randomness go into the kernel's pool before the key is made."""
    order: list[str] = []
    program = Program(
        Nsm(SoftwareNsm(PCRS).process),
        mode="simulated",
        mix=lambda random: order.append(f"{len(random)} {program.handle(Request(Op.STATUS, 1, []))[1][0]}"),
    )
    program.handle(Request(Op.INIT, 1, []))
    assert order == ["256 new"]


def test_document(enclave: Enclave) -> None:
    """A document has the caller's nonce, the RSA-2048 key of this life, and names protocol and records."""
    _, (document,) = enclave.ask(Op.HELLO, NONCE)
    attested = verify(document, nonce=NONCE, pcrs=PCRS, allow_simulated=True)  # type: ignore[arg-type]
    assert attested.simulated
    assert attested.public_key is not None
    assert attested.user_data is not None
    key = load_der_public_key(attested.public_key)
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048
    assert decode(attested.user_data) == [VERSION, []]
    assert attested.epoch == enclave.ask(Op.STATUS)[1][1] == sha256(attested.public_key).digest()[:16]


def test_two_lives_have_two_keys() -> None:
    """The key is made anew in each life, and never kept."""
    assert Enclave().ask(Op.INIT)[1] != Enclave().ask(Op.INIT)[1]


def test_grant_opens_at_the_worker_alone(enclave: Enclave) -> None:
    """What the worker opens is the key that the client computes from the same data key and names."""
    worker, other = WorkerKey.generate(), WorkerKey.generate()
    cms = make_recipient(DATA_KEY, enclave.spki())
    code, (grant,) = enclave.ask(Op.GRANT, *grant_args(worker.public, cms))
    assert code is Code.OK
    epoch = enclave.ask(Op.STATUS)[1][1]
    binding = Binding(
        tenant="acme",
        pool="chat",
        kms_key_arn=ARN,
        session_id="s_1",
        epoch=epoch,  # type: ignore[arg-type]
        worker_key=worker.public,
        wrapped_key=b"w",
    )
    assert open_grant(binding, grant, worker) == binding.psk(DATA_KEY)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="cannot be opened"):
        open_grant(binding, grant, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [b"", b"k" * 16, b"k" * 31, b"k" * 33, b"k" * 47, b"k" * 48],
    ids=lambda data: f"{len(data)} bytes",
)
def test_only_a_data_key_is_taken(enclave: Enclave, data: bytes) -> None:
    """Anything but 32 bytes under a whole block of padding is refused, all in one way."""
    cms = make_recipient(data, enclave.spki())
    assert enclave.ask(Op.GRANT, *grant_args(WorkerKey.generate().public, cms)) == (Code.DECRYPT, [])


def test_no_padding_oracle(enclave: Enclave) -> None:
    """Every change of KMS's answer gives the same answer, whichever part of it was changed."""
    cms, worker = make_recipient(DATA_KEY, enclave.spki()), WorkerKey.generate().public
    answers = set()
    for at in range(0, len(cms), 3):
        changed = bytearray(cms)
        changed[at] ^= 1
        code, result = enclave.ask(Op.GRANT, *grant_args(worker, bytes(changed)))
        if code is not Code.OK:  # CBC authenticates nothing: a changed data key is a key that opens nothing
            answers.add((code, *result))
    assert answers == {(Code.DECRYPT,)}


def test_another_life_opens_nothing(enclave: Enclave) -> None:
    """What KMS encrypted to one life of the enclave is of no use to the next."""
    cms = make_recipient(DATA_KEY, enclave.spki())
    later = Enclave()
    later.ask(Op.INIT)
    assert later.ask(Op.GRANT, *grant_args(WorkerKey.generate().public, cms)) == (Code.DECRYPT, [])


@pytest.mark.parametrize(
    "changed",
    [
        {"tenant": ""},
        {"tenant": "a b"},
        {"pool": "x" * 129},
        {"arn": "arn:aws:kms:eu-west-1:123456789012:alias/x"},
        {"arn": ARN + "\n"},
        {"session": "s\0"},
        {"worker": bytes(31)},
        {"wrapped": b""},
        {"wrapped": bytes(6145)},
    ],
    ids=str,
)
def test_names_are_checked_before_the_key_is_used(enclave: Enclave, changed: dict[str, object]) -> None:
    """A name that the protocol does not have is refused, whatever KMS's answer holds."""
    args = grant_args(WorkerKey.generate().public, b"not even CMS", **changed)
    assert enclave.ask(Op.GRANT, *args) == (Code.MALFORMED, [])


def test_a_worker_key_of_small_order_is_refused(enclave: Enclave) -> None:
    """A worker key that would make the shared secret known is no key."""
    cms = make_recipient(DATA_KEY, enclave.spki())
    assert enclave.ask(Op.GRANT, *grant_args(bytes(32), cms)) == (Code.MALFORMED, [])


@pytest.mark.parametrize("nonce", [b"", b"n" * 31, b"n" * 33])
def test_a_nonce_has_32_bytes(enclave: Enclave, nonce: bytes) -> None:
    """Other nonces are refused."""
    assert enclave.ask(Op.HELLO, nonce) == (Code.MALFORMED, [])


def test_a_module_that_fails() -> None:
    """A security module that refuses gives ATTEST, and the enclave stays as it was."""

    def refuses(request: bytes) -> bytes:
        return b"\xa1eErroroInvalidArgument"

    enclave = Enclave(Nsm(refuses))
    assert enclave.ask(Op.INIT) == (Code.ATTEST, [])
    assert enclave.ask(Op.STATUS)[1][0] == "new"


def test_a_fault_of_its_own_tells_nothing() -> None:
    """An error that nobody thought of is one word."""

    def breaks(request: bytes) -> bytes:
        raise RuntimeError("with a secret in its text")

    assert Enclave(Nsm(breaks)).ask(Op.INIT) == (Code.INTERNAL, [])


@settings(max_examples=2000)
@given(
    op=st.sampled_from(list(Op)),
    args=st.lists(
        st.one_of(st.binary(max_size=64), st.text(max_size=16), st.integers(0, 2**64 - 1)), max_size=8
    ),
)
def test_any_request_has_an_answer(op: Op, args: list[object]) -> None:
    """Whatever is asked, the answer is a code; nothing is raised, and the key is still the same."""
    enclave = _ONE
    before = enclave.ask(Op.STATUS)
    code, result = enclave.ask(op, *args)
    assert isinstance(code, Code)
    assert code is Code.OK or result == []
    assert enclave.ask(Op.STATUS) == before


_ONE = Enclave()
_ONE.ask(Op.INIT)
