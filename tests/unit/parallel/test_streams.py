"""Streams of a rank: every order that a GPU needs is there, shown on logs of real executions on a CPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_dist.pipeline.hazards import Allocate, Entry, Free, Launch, Record, Share, Wait, find_hazards
from mhc_dist.pipeline.recording import RecordedStreams, Recorder
from mhc_dist.pipeline.streams import CudaDevice, EventStreams, HostStreams, make_streams
from tests.unit.parallel.recorded_run import record, recorded_config, run_unrecorded

TRAINED = ("1f1b", "zb1p", "zbv", "dualpipev", "interleaved", "gpipe")
MODES = ("none", "mhc", "full")
GRID = [(s, cluster, mode) for s in TRAINED for cluster in (None, "laptop") for mode in MODES]


@pytest.mark.parametrize(("schedule", "cluster", "mode"), GRID)
def test_every_access_is_ordered(schedule: str, cluster: str | None, mode: str) -> None:
    """Oracle: the checker of `hazards`, on a step of each schedule, plain and placed, and recompute mode."""
    rank = (TRAINED.index(schedule) + MODES.index(mode) + (cluster is None)) % 2
    log, _ = record(recorded_config(schedule, mode, cluster), rank)
    check_log(log)


@pytest.mark.long
@pytest.mark.parametrize(("schedule", "cluster", "mode"), GRID)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["mhc", "identity", "hc", "residual"])
def test_every_access_is_ordered_over_steps(
    schedule: str, cluster: str | None, mode: str, rank: int, kind: str
) -> None:
    """Oracle: the checker, on two steps of each rank: the second one reads what the first one's end wrote."""
    if mode == "mhc" and kind not in ("mhc", "identity"):
        pytest.skip("recompute.mode=mhc is refused for kinds without seams")
    config = recorded_config(schedule, mode, cluster, kind=kind)
    log, _ = record(config, rank, num_steps=2)
    check_log(log)


def check_log(log: list[Entry], *, exchanges: bool = True) -> None:
    streams = {entry.stream for entry in log if isinstance(entry, Launch)}
    lanes = {"message 0>1", "message 1>0"} | ({"exchange F", "exchange B"} if exchanges else set())
    assert streams == {"compute", "urgent", "answers"} | lanes
    hazards = find_hazards(log)
    assert not hazards, "\n".join(map(str, hazards[:5]))


@pytest.mark.parametrize(("schedule", "cluster"), [("1f1b", None), ("dualpipev", "laptop")])
def test_every_access_is_ordered_without_exchanges(schedule: str, cluster: str | None) -> None:
    """Oracle: the checker, where a rank is its own expert group. Then no exchange makes the streams beside
    compute wait: only the end of each phase that they read from does, which elsewhere is implied.
    """
    log, _ = record(recorded_config(schedule, "mhc", cluster, group_size=1), 1)
    check_log(log, exchanges=False)


def test_recording_changes_nothing() -> None:
    """Oracle: the same step without streams, bit for bit."""
    config = recorded_config("zbv", "mhc", "laptop")
    _, got = record(config, 1)
    want = run_unrecorded(config, 1)
    assert got.keys() == want.keys()
    for name, parameter in want.items():
        assert torch.equal(got[name], parameter), name


def test_autograd_orders_streams_only_where_gradients_change_them() -> None:
    """Oracle: PyTorch's rule, by hand: two urgent operations in a row wait for compute once, before the
    first of their backwards, and compute waits for them once, after the last.
    """
    recorder = Recorder()
    x = torch.ones(3, requires_grad=True)
    with recorder:
        streams = RecordedStreams(recorder)
        (y,) = streams.urgently(lambda given: (given.mul(2.0).exp(),), x.mul(5.0))
        begun = len(recorder.log)
        y.mul(7.0).backward(torch.ones(3))
    ran = [
        (entry.stream, entry.site if isinstance(entry, Wait) else "launch")
        for entry in recorder.log[begun:]
        if isinstance(entry, Launch | Wait)
    ]
    order = [event for position, event in enumerate(ran) if position == 0 or ran[position - 1] != event]
    assert order == [
        ("compute", "launch"),
        ("urgent", "autograd"),
        ("urgent", "launch"),
        ("compute", "autograd"),
        ("compute", "launch"),
    ]


def test_autograd_lets_go_before_compute_waits() -> None:
    """Oracle: PyTorch's engine, which runs here: an urgent node has let go of what it had saved when the next
    node begins, and it is there that compute waits. So the allocator has to know that it was used urgently.
    """
    recorder, x = Recorder(), torch.ones(3, requires_grad=True)
    with recorder:
        streams = RecordedStreams(recorder)
        five = x.mul(5.0)
        with streams.reading([streams.position()]):
            (y,) = streams.urgently(lambda given: (given.exp().mul(given),), five)
        del five
        begun = len(recorder.log)
        y.backward(torch.ones(3))
    assert not find_hazards(recorder.log)
    backward = recorder.log[begun:]
    waits = next(at for at, e in enumerate(backward) if isinstance(e, Wait) and e.stream == "compute")
    read = {memory for e in backward if isinstance(e, Launch) and e.stream == "urgent" for memory in e.reads}
    (freed,) = {e.memory for e in backward[:waits] if isinstance(e, Free)} & {
        e.memory for e in recorder.log[:begun] if isinstance(e, Allocate) and e.stream == "compute"
    }
    assert freed in read
    untold = [e for e in recorder.log if e != Share("urgent", freed)]
    assert [hazard.kind for hazard in find_hazards(untold)] == ["reuse"]


def test_autograd_adds_up_where_the_sum_goes() -> None:
    """Oracle: PyTorch's rule, by hand: what two urgent nodes send back to a third is summed on its stream."""
    recorder, x = Recorder(), torch.ones(3, requires_grad=True)
    with recorder:
        streams = RecordedStreams(recorder)

        def twice(given: Tensor) -> tuple[Tensor]:
            middle = given.exp()
            return (middle.sin().mul(middle.cos()),)

        five = x.mul(5.0)
        with streams.reading([streams.position()]):
            (y,) = streams.urgently(twice, five)
        begun = len(recorder.log)
        y.backward(torch.ones(3))
    sums = [e.stream for e in recorder.log[begun:] if isinstance(e, Launch) and "aten.add" in e.name]
    assert sums == ["urgent"]
    assert not find_hazards(recorder.log)


@pytest.fixture(scope="module")
def log() -> list[Entry]:
    return record(recorded_config("1f1b", "mhc", num_microbatches=1), 0)[0]


def source_of(log: list[Entry], wait: Wait) -> str:
    """The stream whose work is waited for."""
    (stream,) = {e.stream for e in log if isinstance(e, Record) and e.event == wait.event}
    return stream


def test_every_dropped_event_that_matters_is_missed(log: list[Entry]) -> None:
    """Oracle: what each kind of wait is for. Dropped one by one, these must be caught:

    a lane's for the data it sends and the memory it receives into; compute's for what has arrived and for the
    streams beside it; theirs for what they read. Not those that others imply: a send's landing, once a step,
    frees memory of which the allocator knows, and compute comes after what the streams beside it awaited.
    """
    assert not find_hazards(log)
    awaited_beside = {e.event for e in log if isinstance(e, Wait) and e.stream in ("urgent", "answers")}
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    section: list[int] = []
    for position, entry in enumerate(log):
        if isinstance(entry, Launch) and entry.stream == "urgent":
            section = []
        if not isinstance(entry, Wait) or entry.site == "autograd":
            continue
        source = source_of(log, entry)
        match entry.site, entry.stream:
            case "transfer", lane:
                groups.setdefault(("transfer", lane), []).append([position])
            case "land", _ if source != "message 0>1" and entry.event not in awaited_beside:
                groups.setdefault(("land", source), []).append([position])
            case "_beside", "compute":
                groups.setdefault(("after", source), []).append([position])
            case "_beside", "answers":
                groups.setdefault(("before", "answers"), []).append([position])
            case "_beside", "urgent":
                # Tokens of one section may imply each other: together they matter.
                if not section:
                    groups.setdefault(("before", "urgent"), []).append(section)
                section.append(position)
    assert {
        ("transfer", "exchange F"),
        ("transfer", "exchange B"),
        ("transfer", "message 0>1"),
        ("transfer", "message 1>0"),
        ("land", "exchange F"),
        ("land", "exchange B"),
        ("land", "message 1>0"),
        ("after", "urgent"),
        ("after", "answers"),
        ("before", "urgent"),
        ("before", "answers"),
    } == set(groups)
    for group, dropped in groups.items():
        for positions in dropped:
            mutated = [entry for position, entry in enumerate(log) if position not in positions]
            assert find_hazards(mutated), f"{group}: nothing noticed that entries {positions} are gone"


@pytest.mark.parametrize(("schedule", "cluster"), [("1f1b", None), ("dualpipev", "laptop")])
def test_the_host_waits_for_counts_and_nothing_else(schedule: str, cluster: str | None) -> None:
    """Oracle: the log. What the host asks for is alone on its stream, which waits for exchanges of counts:
    for nothing that was queued since they left, such as a backward of post/res on the urgent stream.
    """
    log, _ = record(recorded_config(schedule, "mhc", cluster), 1)
    answers = [entry for entry in log if isinstance(entry, Launch | Wait) and entry.stream == "answers"]
    awaited = [source_of(log, entry) for entry in answers if isinstance(entry, Wait)]
    assert set(awaited) == {"exchange F"}
    plans = [entry for entry in answers if isinstance(entry, Launch) and "sort" in entry.name]
    assert len(plans) == len(awaited), "one plan after each wait"
    assert any(isinstance(entry, Launch) and entry.stream == "urgent" for entry in log)


def test_urgent_work_waits_for_its_exchange_and_not_for_compute_since() -> None:
    """Oracle: the log: every urgent section waits for an exchange, and for no event that compute recorded
    after that exchange was over for it: it overtakes what is queued there.
    """
    log, _ = record(recorded_config("dualpipev", "mhc", "laptop"), 1)
    recorded = {entry.event: at for at, entry in enumerate(log) if isinstance(entry, Record)}
    sections: list[list[Wait]] = []
    ran = True
    for entry in log:
        if isinstance(entry, Launch) and entry.stream == "urgent":
            ran = True
        elif isinstance(entry, Wait) and entry.stream == "urgent" and entry.site == "_beside":
            if ran:
                sections.append([])
                ran = False
            sections[-1].append(entry)
    assert sections
    for section in sections:
        assert "exchange F" in {source_of(log, wait) for wait in section}
        events = [wait.event for wait in section]
        landed = next(
            at
            for at, entry in enumerate(log)
            if isinstance(entry, Wait) and entry.stream == "compute" and entry.event in events
        )
        assert max(recorded[event] for event in events) < landed


def test_compute_waits_for_no_receiver() -> None:
    """Oracle: the log: of three messages sent, compute waits for the last one, after all its own work."""
    log, _ = record(recorded_config("1f1b", num_microbatches=3), 0)
    sent = [e.event for e in log if isinstance(e, Record) and e.stream == "message 0>1"]
    assert len(sent) == 3
    waits = [
        i for i, e in enumerate(log) if isinstance(e, Wait) and e.event in sent and e.stream == "compute"
    ]
    (end,) = waits
    after = {e.name for e in log[end:] if isinstance(e, Launch)}
    assert after == {"aten.clone.default"}, "nothing but the copies that `record` returns"


def test_only_what_is_sent_waits_for_its_lane() -> None:
    """Oracle: the log of several messages: the allocator is told of lanes for those that compute never waits
    for, once each. A buffer of any other transfer it would keep until the lane's next one is over.
    """
    log, _ = record(recorded_config("zbv", "mhc", "laptop"), 0)
    told = [entry.stream for entry in log if isinstance(entry, Share)]
    awaited = {entry.event for entry in log if isinstance(entry, Wait) and entry.stream == "compute"}
    ends = [e for e in log if isinstance(e, Record) and e.stream == "message 0>1"]
    assert Counter(name for name in told if name not in ("compute", "urgent", "answers")) == {
        "message 0>1": sum(end.event not in awaited for end in ends)
    }
    assert len(ends) > 2


class _Event(SimpleNamespace):
    __hash__ = object.__hash__  # as torch.cuda.Event has it


class _Cuda:
    """Stands for torch.cuda: writes down what it is asked for, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._num_events = 0

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return self._stream("compute")

    def Stream(self, device: torch.device, priority: int) -> SimpleNamespace:  # noqa: N802
        name = "urgent" if priority < 0 else "lane"
        self.calls.append(f"new {name} stream, priority {priority}")
        return self._stream(name)

    def Event(self, enable_timing: bool = False) -> SimpleNamespace:  # noqa: N802
        self._num_events += 1
        return self._event(f"timed{self._num_events}")

    @contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        self.calls.append(f"enter {stream.name}")
        yield
        self.calls.append(f"leave {stream.name}")

    def _stream(self, name: str) -> SimpleNamespace:
        def record(event: Any = None) -> Any:
            if event is None:
                self._num_events += 1
                event = self._event(f"event{self._num_events}")
            self.calls.append(f"{name} records {event.name}")
            return event

        def wait(event: Any) -> None:
            self.calls.append(f"{name} waits for {event.name}")

        return SimpleNamespace(name=name, record_event=record, wait_event=wait)

    def _event(self, name: str) -> SimpleNamespace:
        return _Event(
            name=name,
            synchronize=lambda: self.calls.append(f"host waits for {name}"),
            elapsed_time=lambda end: 1000.0 * (int(end.name[5:]) - int(name[5:])),
        )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    cuda = _Cuda()
    names: dict[int, str] = {}

    def record_stream(tensor: Tensor, stream: SimpleNamespace) -> None:
        name = names.setdefault(tensor.data_ptr(), f"tensor{len(names)}")
        cuda.calls.append(f"{name} is used on {stream.name}")

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    return cuda


def test_a_transfer_on_cuda(cuda: _Cuda) -> None:
    """Oracle: the calls that CUDA needs, written here by hand. The host waits for nothing."""
    streams = EventStreams(CudaDevice(torch.device("cuda", 0), cuda))
    work = SimpleNamespace(wait=lambda: cuda.calls.append("communicator awaited by the current stream"))

    def start() -> Any:
        cuda.calls.append("start")
        return work

    flight = streams.transfer("exchange F", start, [torch.zeros(1)])
    assert flight.land().name == "event2"
    assert cuda.calls == [
        "new urgent stream, priority -1",
        "new urgent stream, priority -1",
        "new lane stream, priority 0",
        "compute records event1",
        "lane waits for event1",
        "enter lane",
        "start",
        "communicator awaited by the current stream",
        "leave lane",
        "lane records event2",
        "compute waits for event2",
    ]


@pytest.mark.parametrize(("end", "call"), [("land", "waits for event"), ("release", "is used on lane")])
def test_a_transfer_holds_its_buffers(end: str, call: str, cuda: _Cuda) -> None:
    """Oracle: a weak reference to a tensor that nobody else holds, before and after; the last call is what
    makes it safe to let go.
    """
    streams = EventStreams(CudaDevice(torch.device("cuda", 0), cuda))
    flights, alive = [], []
    for _ in range(2):
        buffer = torch.zeros(1)
        flights.append(streams.transfer("exchange F", lambda: SimpleNamespace(wait=lambda: None), [buffer]))
        alive.append(weakref.ref(buffer))
        del buffer
    assert all(tensor() is not None for tensor in alive)
    getattr(flights[0], end)()
    assert call in cuda.calls[-1]
    assert alive[0]() is None
    assert alive[1]() is not None


def test_urgent_work_on_cuda(cuda: _Cuda) -> None:
    """Oracle: the calls that CUDA needs: it waits for what its phase reads, once each, and nothing else."""
    streams = EventStreams(CudaDevice(torch.device("cuda", 0), cuda))
    token, given = streams.position(), torch.zeros(1)
    with streams.reading([token, token]):
        result = streams.urgently(lambda x: (x + 1,), given)
    assert result[0].item() == 1
    assert cuda.calls[2:] == [
        "compute records event1",
        "urgent waits for event1",
        "tensor0 is used on compute",
        "tensor0 is used on urgent",
        "enter urgent",
        "leave urgent",
        "urgent records event2",
        "compute waits for event2",
        "tensor1 is used on compute",
        "tensor1 is used on urgent",
    ]
    streams.urgently(lambda: ())
    assert cuda.calls[12:] == [
        "enter urgent",
        "leave urgent",
        "urgent records event3",
        "compute waits for event3",
    ]


def test_times_on_cuda(cuda: _Cuda) -> None:
    """Oracle: marks a second apart on the device; the host waits once, for the last of them."""
    streams = EventStreams(CudaDevice(torch.device("cuda", 0), cuda))
    marks = [streams.mark() for _ in range(3)]
    times = streams.seconds(marks)
    assert [time - times[0] for time in times] == pytest.approx([0.0, 1.0, 2.0])
    assert [call for call in cuda.calls if "host" in call] == ["host waits for timed3"]


def test_a_cpu_needs_no_streams() -> None:
    """Oracle: the type; and a result that is what the function made."""
    streams = make_streams(torch.device("cpu"))
    assert isinstance(streams, HostStreams)
    assert streams.urgently(lambda a, b: a + b, 1, 2) == 3
