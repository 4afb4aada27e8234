"""The checker of streams: what it calls a hazard, and that it finds all of them and no others."""

from __future__ import annotations

from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mhc_dist.pipeline.hazards import Allocate, Entry, Free, Launch, Record, Share, Wait, find_hazards

READY, DONE = 1, 2
SOUND: list[Entry] = [
    Allocate("compute", 7),
    Launch("compute", "make", writes=(7,)),
    Record("compute", READY),
    Wait("lane", READY),
    Launch("lane", "send", reads=(7,)),
    Record("lane", DONE),
    Wait("compute", DONE),
    Free(7),
]


def test_a_transfer_between_two_events_is_sound() -> None:
    """Oracle: made, sent, awaited, freed: nothing is missing."""
    assert find_hazards(SOUND) == []


@pytest.mark.parametrize(
    ("entry", "kind"),
    [(Wait("lane", READY), "read"), (Wait("compute", DONE), "reuse")],
)
def test_either_event_is_missed(entry: Entry, kind: str) -> None:
    """Oracle: the access that the dropped wait protected, with both ends named."""
    (hazard,) = find_hazards([other for other in SOUND if other != entry])
    assert hazard.kind == kind
    assert "send on lane" in str(hazard)


def test_memory_that_the_allocator_knows_of_may_be_freed_early() -> None:
    """Oracle: record_stream's promise."""
    early = [entry for entry in SOUND if entry != Wait("compute", DONE)]
    assert find_hazards([*early[:1], Share("lane", 7), *early[1:]]) == []


def test_the_allocator_waits_for_what_a_stream_was_given_by_the_time_of_the_free() -> None:
    """Oracle: record_stream's promise: memory of a stream that waits for nobody, sent by a lane; compute, of
    which the allocator knows, waits for the lane before or after it is freed.
    """
    told: list[Entry] = [
        Allocate("urgent", 7),
        Launch("urgent", "make", writes=(7,)),
        Record("urgent", READY),
        Share("compute", 7),
        Wait("lane", READY),
        Launch("lane", "send", reads=(7,)),
        Record("lane", DONE),
    ]
    assert find_hazards([*told, Wait("compute", DONE), Free(7)]) == []
    (hazard,) = find_hazards([*told, Free(7), Wait("compute", DONE)])
    assert hazard.kind == "reuse"


def test_memory_is_received_into_only_once_its_stream_is_done_with_it() -> None:
    """Oracle: bytes that compute has freed and got again are still read by its earlier work."""
    log = [Allocate("compute", 1), Launch("lane", "receive", writes=(1,))]
    (hazard,) = find_hazards(log)
    assert hazard.kind == "write"


def test_a_write_follows_all_reads() -> None:
    """Oracle: two readers on two streams, of which the writer waits for one."""
    log = [
        Launch("a", "make", writes=(1,)),
        Record("a", 1),
        Wait("b", 1),
        Wait("c", 1),
        Launch("b", "read", reads=(1,)),
        Launch("c", "read", reads=(1,)),
        Record("b", 2),
        Wait("a", 2),
        Launch("a", "change", writes=(1,)),
    ]
    (hazard,) = find_hazards(log)
    assert hazard.earlier == "read on c"


STREAMS = ("a", "b", "c")
ENTRIES = st.one_of(
    st.builds(
        Launch,
        st.sampled_from(STREAMS),
        st.just("work"),
        st.sampled_from([(), (1,), (2,), (1, 2)]),
        st.sampled_from([(), (1,), (2,)]),
    ),
    st.builds(Wait, st.sampled_from(STREAMS), st.sampled_from(STREAMS).map(STREAMS.index)),
)


def with_events(drawn: list[Launch | Wait]) -> list[Entry]:
    """Every wait is for an event recorded just before it on the stream of that number."""
    log: list[Entry] = []
    for number, entry in enumerate(drawn):
        if isinstance(entry, Wait):
            log.append(Record(STREAMS[entry.event], number))
            entry = Wait(entry.stream, number)
        log.append(entry)
    return log


def racing(log: list[Entry]) -> set[tuple[int, int]]:
    """Pairs of launches that touch the same memory, one writing, without a path between them."""
    after: dict[int, set[int]] = {}
    last: dict[str, int] = {}
    reached: dict[int, int | None] = {}
    waited: dict[str, set[int]] = {stream: set() for stream in STREAMS}
    for position, entry in enumerate(log):
        match entry:
            case Record(stream, event):
                reached[event] = position
            case Wait(stream, event):
                waited[stream].add(reached[event])  # type: ignore[arg-type]
        if isinstance(entry, Launch | Record):
            before = set(waited[entry.stream])
            if entry.stream in last:
                before.add(last[entry.stream])
            after[position] = before.union(*(after[earlier] for earlier in before))
            last[entry.stream] = position
    launches = [(position, entry) for position, entry in enumerate(log) if isinstance(entry, Launch)]
    found = set()
    for (i, first), (j, second) in combinations(launches, 2):
        touched = set(first.reads) | set(first.writes), set(second.reads) | set(second.writes)
        conflict = (set(first.writes) & touched[1]) | (set(second.writes) & touched[0])
        if conflict and i not in after[j]:
            found.add((i, j))
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRIES, max_size=14))
def test_finds_a_hazard_exactly_where_two_accesses_race(drawn: list[Launch | Wait]) -> None:
    """Oracle: a search for paths between every two accesses. The first race of a log is always found as such;
    later ones may go by the access that raced first, so what is compared is whether there are any, and where
    the first one ends.
    """
    log = with_events(drawn)
    races, hazards = racing(log), find_hazards(log)
    assert bool(hazards) == bool(races)
    if races:
        assert hazards[0].position == min(later for _, later in races)
