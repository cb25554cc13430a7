"""What goes wrong on the sealed path. No message quotes keys, plaintext or the bytes at fault."""

from __future__ import annotations


class SealedError(Exception):
    """The family. Functions that parse bytes from elsewhere raise nothing else."""


class Malformed(SealedError):
    """Bytes, or a value, that the protocol does not allow."""


class CannotOpen(SealedError):
    """A key, a name or a byte is not the one that was sealed with: which of them is not said, and not known.

    One message for every cryptographic failure, because telling them apart is what an oracle is made of.
    """

    def __init__(self) -> None:
        super().__init__("cannot be opened with these keys and names")


class StreamBroken(SealedError):
    """A stream of chunks that was cut, or goes on behind its final chunk, or was given up after a failure.

    A chunk that is doubled or out of order does not decrypt, and so is `CannotOpen`.
    """


class AttestationRefused(SealedError):
    """An attestation document that is not accepted.

    `reason` is a short stable code: malformed, root, expired, chain, signature, debug, nonce, pcr or
    stale.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
