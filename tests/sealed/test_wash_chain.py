"""Chains of certificates: what is left out, moved, replayed or foreign is caught; a cut tail by a head."""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations, permutations
from typing import Any

import pytest

from gpu_server.sealed.wash import NO_CERTIFICATE, Chain, WashRefused, hash_of, verify_chain
from tests.sealed.documents import PCRS
from tests.sealed.washes import ALONE, MADE, NODE_KEY, OLDER, OTHER_NODE, chain, record_hash, washed

LINKS = chain(4)
HEAD = record_hash(LINKS[3])


def linked(raws: list[bytes], **options: Any) -> Chain:
    wanted: dict[str, Any] = {"node_key": NODE_KEY, "pcrs": PCRS, "allow_simulated": True}
    return verify_chain(raws, **{**wanted, **options})


def broken(raws: list[bytes], **options: Any) -> tuple[str, int]:
    """Why a chain is refused, and where."""
    with pytest.raises(WashRefused) as caught:
        linked(raws, **options)
    return caught.value.reason, caught.value.index


def test_a_chain() -> None:
    """It holds; whether its tail was checked is said."""
    for head in (None, HEAD):
        found = linked(LINKS, head=head)
        assert [one.raw for one in found.certificates] == LINKS
        assert (found.head_checked, found.from_first) == (head is not None, True)
    assert not linked(LINKS[1:]).from_first
    assert linked(LINKS[:1], node_key=None).certificates[0].record.prev == NO_CERTIFICATE


def test_every_order_and_every_gap() -> None:
    """Of all the ways to hand in one to four of them, those without a gap hold, oldest first; and of these,
    where the head is known, those that reach it. A cut tail is caught by nothing else."""
    raws = chain(4, **ALONE)
    head, held, reached = record_hash(raws[3]), set(), set()
    for count in range(1, 5):
        for places in permutations(range(4), count):
            given = [raws[place] for place in places]
            with suppress(WashRefused):
                linked(given)
                held.add(places)
            with suppress(WashRefused):
                linked(given, head=head)
                reached.add(places)
    whole = {tuple(range(first, last)) for first, last in combinations(range(5), 2)}
    assert held == whole
    assert reached == {places for places in whole if places[-1] == 3}


@pytest.mark.parametrize(
    ("places", "head", "found"),
    [
        ([0, 2, 3], None, ("order", 1)),
        ([0, 2, 1, 3], None, ("order", 1)),
        ([0, 1, 1, 2, 3], None, ("order", 2)),
        ([0, 1, 2, 3, 0], None, ("order", 4)),
        ([3, 2, 1, 0], None, ("order", 1)),
        ([0, 1, 2], HEAD, ("head", 2)),
        ([0, 1, 2, 3], OLDER, ("head", 3)),
    ],
)
def test_broken_chains(places: list[int], head: bytes | None, found: tuple[str, int]) -> None:
    """Left out, changed about, replayed, cut: the reason, and which of them it is."""
    assert broken([LINKS[place] for place in places], head=head) == found


def behind(**changes: Any) -> list[bytes]:
    return [*LINKS, washed(**{"prev": hash_of(LINKS[3]), "made_ms": MADE + 40, **changes})]


def test_what_does_not_belong_behind() -> None:
    """Another slot, device or node, an older time, another predecessor, a bad certificate: each is caught."""
    assert len(linked(behind()).certificates) == 5
    assert broken(behind(slot_id="1")) == ("slot", 4)
    assert broken(behind(slot_uuid="GPU-other")) == ("slot", 4)
    assert broken(behind(key=OTHER_NODE)) == ("node_key", 4)
    assert broken(behind(key=OTHER_NODE), node_key=None) == ("node_key", 4)
    assert broken(behind(made_ms=MADE + 29)) == ("order", 4)
    assert broken(behind(prev=record_hash(LINKS[3]))) == ("order", 4)
    assert broken(behind(scrub="skipped")) == ("steps", 4)
    assert broken([]) == ("malformed", 0)


def test_a_fork() -> None:
    """Of two certificates behind the same one only one can be followed: a head tells which."""
    one, other = behind()[-1], behind(fence=99)[-1]
    assert linked([*LINKS, one]).certificates[-1].record.fence == 7
    assert broken([*LINKS, one, other]) == ("order", 5)
    assert broken([*LINKS, one], head=record_hash(other)) == ("head", 4)


def test_up_to() -> None:
    """A document that lists the newest record of every slot checks the tail of one."""
    found = linked(LINKS)
    assert found.up_to((OLDER, HEAD)).head_checked
    with pytest.raises(WashRefused) as caught:
        found.up_to((OLDER, record_hash(LINKS[2])))
    assert (caught.value.reason, caught.value.index) == ("head", 3)
