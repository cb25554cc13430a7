"""`python -m carwash [--uuid GPU-...]`: scrub the one GPU that this process sees, and say so.

It writes one JSON object to its standard output, `{"result", "reason", "figures"}`, and ends with 0. Results:
`passed`; `failed`, something is wrong with the memory; `unavailable`, the scrub could not be carried out;
`not_applicable`, there is certainly no GPU on this machine. README.md says what the figures are.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Sequence

from carwash.cuda_memory import open_gpu
from carwash.scrub import (
    MIN_SHARE,
    SMALLEST_CHUNK,
    Absent,
    Device,
    DeviceError,
    Failed,
    Figures,
    Unavailable,
    scrub,
)

Open = Callable[[str | None], Device]


def answer(
    open_device: Open, uuid: str | None, *, min_share: int = MIN_SHARE, smallest: int = SMALLEST_CHUNK
) -> dict[str, object]:
    """What the program says."""
    figures: Figures = {}
    try:
        began = time.perf_counter_ns()
        device = open_device(uuid)
        try:
            figures.update(uuid=device.uuid, device=_ascii(device.name))
            figures["open_us"] = -(-(time.perf_counter_ns() - began) // 1000)
            scrub(device, figures, min_share=min_share, smallest=smallest)
        finally:
            device.close()
    except Absent as error:
        return _says("not_applicable", error, {})
    except Unavailable as error:
        return _says("unavailable", error, figures)
    except (Failed, DeviceError) as error:
        return _says("failed", error, figures)
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is no pass, and is said as the others are
        return _says("unavailable", RuntimeError(f"{type(error).__name__}: {error}"), figures)
    return {"result": "passed", "reason": "", "figures": figures}


def main(arguments: Sequence[str] | None = None, *, open_device: Open = open_gpu) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="carwash", description="Scrub one GPU's memory, and verify it.")
    parser.add_argument("--uuid", help="the GPU that it must be")
    parser.add_argument(
        "--min-share",
        type=int,
        default=MIN_SHARE,
        help="thousandths of the memory that have to be had (%(default)s)",
    )
    parser.add_argument("--seconds", type=int, default=0, help="end after so many; 0: never")
    chosen = parser.parse_args(arguments)
    if chosen.seconds:
        signal.alarm(chosen.seconds)  # its default is the end: nobody has to be there to end it
    # Whatever a library prints goes to the standard error: what is said here is one object.
    with os.fdopen(os.dup(1), "w", encoding="ascii") as out:
        os.dup2(2, 1)
        json.dump(answer(open_device, chosen.uuid, min_share=chosen.min_share), out)
        out.write("\n")
    return 0


def _says(result: str, error: Exception, figures: Figures) -> dict[str, object]:
    return {"result": result, "reason": _ascii(str(error)), "figures": figures}


def _ascii(text: str) -> str:
    """One line of printable ASCII, not too long."""
    return "".join(sign if " " <= sign <= "~" else " " for sign in text)[:200]


if __name__ == "__main__":
    raise SystemExit(main())
