"""The planner: published counts and formulas as oracles for its parts, by-hand figures, bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import process_time

import pytest

from mhc_dist.config import RunConfig, load_config
from mhc_dist.model.count import count_parameters
from mhc_dist.model.flops import (
    attention_flops_per_token,
    feed_forward_flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
    model_flops_per_token,
)
from mhc_dist.parallel.partition import partition, split_layers
from mhc_dist.parallel.recompute import best_block
from mhc_dist.pipeline.demonstration import Shown
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.perfetto import write_perfetto
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.boundaries import best_balance, best_shifts
from mhc_dist.plan.calibration import Calibration, compare
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.cluster import Constant, load_cluster
from mhc_dist.plan.costs import CostModel, plain_residual
from mhc_dist.plan.evaluate import build, evaluate
from mhc_dist.plan.layout import Layout, own_shapes, planned_shapes, same_layout, schedule_of
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.overhead import fastest_cut, overhead
from mhc_dist.plan.report import plan_json, plan_text
from mhc_dist.plan.run_costs import calibration_from_trace, run_costs
from mhc_dist.plan.search import (
    NUM_RECUT,
    NUM_SIMULATED,
    PLANNED_SCHEDULES,
    NothingFitsError,
    Search,
    possible_layouts,
    search,
)
from mhc_dist.plan.static_memory import held_by_rank
from mhc_dist.plan.without import Measure, without, without_text
from mhc_dist.plan.work import (
    attention_work,
    dense_work,
    experts_work,
    head_work,
    routing_work,
    shared_work,
)

CONFIGS = Path(__file__).parents[3] / "configs"


@cache
def config_of(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


@cache
def machine_of(name: str) -> Machine:
    return Machine(load_cluster(name))


def with_memory(machine: Machine, num_bytes: float) -> Machine:
    """The same, with so many bytes for a rank to use."""
    device = machine.cluster.device
    usable = device.usable_memory.model_copy(update={"value": num_bytes / device.memory_bytes.value})
    device = device.model_copy(update={"usable_memory": usable})
    return replace(machine, cluster=machine.cluster.model_copy(update={"device": device}))


LAYOUT = Layout("dualpipev", 4, 8, 128, 10)


@pytest.mark.parametrize("path", sorted((CONFIGS / "clusters").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_constant_has_a_source(path: Path) -> None:
    """Oracle: the rule that no number stands without where it comes from."""
    cluster = load_cluster(str(path))
    assert cluster.name == path.stem
    assert all(len(constant.source) >= 10 for _, constant in cluster.constants())


def test_operations_agree_with_the_models_own_count() -> None:
    """Oracle: `model.flops`, written independently for the partition and for MFU. It counts what is needed:
    attention proper works at the width of queries and keys, 192, where values are 128 wide.
    """
    config = config_of("paper_27b")
    attention = attention_work(config)
    needed = attention.scores * (192 + 128) / (2 * 192)
    assert attention.linear + needed == pytest.approx(attention_flops_per_token(config))
    assert dense_work(config.model).linear == feed_forward_flops_per_token(config, 0)
    experts = experts_work(config).linear + shared_work(config).linear + routing_work(config).exact
    assert experts == feed_forward_flops_per_token(config, 5)
    assert head_work(config).linear == head_flops_per_token(config)


@pytest.mark.parametrize("name", ["dualpipev", "1f1b"])
@pytest.mark.parametrize("config_name", ["paper_3b", "paper_27b"])
def test_phases_cover_the_whole_model(config_name: str, name: str) -> None:
    """Oracle: whole-model counts. All phases of all chunks do the model's operations, once each; scores do
    384 where 320 are needed.
    """
    config = config_of(config_name)
    machine = machine_of("h800")
    device = machine.cluster.device

    def constant(value: float) -> Constant:
        return device.memory_bytes.model_copy(update={"value": value})

    # Only matrices cost anything here, and all of them alike.
    fast = device.model_copy(
        update={
            "memory_bytes_per_second": constant(1e30),
            "attention_efficiency": constant(device.matmul_efficiency.value * 384 / 320),
            "matmul_flops": device.matmul_flops.model_copy(update={"fp32": device.matmul_flops.bf16}),
        }
    )
    model = CostModel(config, Machine(machine.cluster.model_copy(update={"device": fast})))
    schedule = make_schedule(name, 4, 16)
    shapes = planned_shapes(config, schedule.chunk_rank, LAYOUT)
    layout = Layout(name, 4, 1, 1, 16)
    costs = model.table(layout, shapes, schedule.chunk_rank, Charge(kernels=False))
    rate = 9.894e14 * device.matmul_efficiency.value
    forward = sum(phase.forward for phase in costs.phases.values()) * rate
    assert forward / model.num_tokens == pytest.approx(
        model_flops_per_token(plain_residual(config)) / 3, rel=1e-3
    )


def test_static_memory_holds_every_parameter_once() -> None:
    """Oracle: the parameter count. With one expert group of one, ranks together hold the model."""
    config = config_of("paper_27b")
    schedule = make_schedule("dualpipev", 4, 8)
    shapes = planned_shapes(config, schedule.chunk_rank, LAYOUT)
    held = held_by_rank(config, Layout("dualpipev", 4, 1, 1, 8), shapes, schedule.chunk_rank)
    assert sum(h.shared + h.experts for h in held) == pytest.approx(count_parameters(config).total)


def test_block_length_follows_the_formula() -> None:
    """Oracle: brute force over n ceil(L / b) + (n + 2) b, and its continuous optimum sqrt(nL / (n + 2))."""
    for sublayers in (4, 15, 30, 60):
        rows = {b: 4 * -(-sublayers // b) + 6 * b for b in range(1, sublayers + 1)}
        assert rows[best_block(sublayers, 4)] == min(rows.values())
    assert abs(best_block(60, 4) - (4 * 60 / 6) ** 0.5) < 1.5


@pytest.mark.parametrize(
    ("schedules", "num_simulated", "num_recut"),
    [
        (("dualpipev",), 4, 1),
        pytest.param(PLANNED_SCHEDULES, NUM_SIMULATED, NUM_RECUT, marks=pytest.mark.long),
    ],
    ids=["dualpipev", "all"],
)
def test_plan_of_the_27b_model_on_64_h800_nodes(
    schedules: tuple[str, ...], num_simulated: int, num_recut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the published overhead, 6.7% at n = 4 in one and the same layout, within a fifth; parts add up
    to the whole, which is at least that and compares with the plain residual at its own best.
    """
    config, machine = config_of("paper_27b"), machine_of("h800")
    monkeypatch.setattr("mhc_dist.plan.search.NUM_SIMULATED", num_simulated)
    monkeypatch.setattr("mhc_dist.plan.search.NUM_RECUT", num_recut)
    monkeypatch.setattr("mhc_dist.plan.overhead.search", partial(search, schedules=schedules))
    found = search(config, machine, 512, schedules)
    best = found.best[0]
    cost = overhead(config, machine, 512, best)
    assert best.peak_bytes <= machine.memory_budget
    assert cost.ratio_in_same_layout == pytest.approx(0.067, rel=0.2)
    assert cost.ratio >= cost.ratio_in_same_layout
    assert cost.plain.step_seconds <= cost.plain_in_same_layout.step_seconds
    assert best.layout.boundaries is not None
    assert load_config(CONFIGS / "paper_27b.yaml", best.layout.settings(config)).sequences_per_step == 1280
    assert sum(cost.breakdown.values()) == pytest.approx(cost.ratio)
    assert cost.breakdown["kernels"] > 0
    assert cost.breakdown["p2p"] > 0
    assert all(e.step_seconds >= best.step_seconds for e in found.best)
    content = plan_json(config, found, cost)
    assert {
        "step_seconds", "overhead_ratio", "overhead_breakdown", "bubble_ratio", "exposed_all_to_all_ratio",
        "peak_memory_bytes", "schedule", "pipeline", "expert", "data", "recompute_block",
    } <= content.keys()  # fmt: skip
    text = plan_text(config, machine, 512, found, cost, 3)
    assert all(name in text for name, _ in machine.cluster.constants())
    assert "assumptions:" in text


def test_boundaries_balanced_by_rank_shorten_an_uneven_v() -> None:
    """Oracle: by hand. 30 layers and a head worth two, in 16 chunks: rank 0 has a fifth too much."""
    config, machine = config_of("paper_27b"), machine_of("h800")
    layout = Layout("dualpipev", 8, 8, 64, 20)
    chunk_rank = make_schedule("dualpipev", 8, 20).chunk_rank
    head = float(head_flops_per_token(config))
    layers = [float(layer_flops_per_token(config, k)) for k in range(config.model.num_layers)]
    even = tuple(split_layers(layers, len(chunk_rank), last_extra=head))
    by_chunk = evaluate(config, machine, replace(layout, boundaries=even))
    by_rank = evaluate(config, machine, layout)
    assert by_rank.step_seconds < 0.98 * by_chunk.step_seconds
    searched = best_shifts(config, machine, best_balance(config, machine, by_rank), 4)
    assert searched.step_seconds <= by_rank.step_seconds
    assert searched.layout.boundaries is not None
    settings = searched.layout.settings(config)
    run = load_config(CONFIGS / "paper_27b.yaml", settings)
    assert partition(run, chunk_rank) == list(searched.layout.boundaries)


def test_planned_programs_are_safe() -> None:
    """Oracle: the validator, on what the planner simulates."""
    config, machine = config_of("paper_27b"), machine_of("h800")
    for layout in (LAYOUT, replace(LAYOUT, recompute_block=4), replace(LAYOUT, schedule="zbv")):
        validate(build(config, machine, layout).program)


def test_recompute_trades_time_for_memory() -> None:
    """Oracle: the formula's saving: with whole-chunk blocks almost all (n + 2) rows per sublayer go."""
    config, machine = config_of("paper_27b"), machine_of("h800")
    kept = evaluate(config, machine, LAYOUT)
    everything = evaluate(config, machine, replace(LAYOUT, recompute_everything=True))
    dropped = evaluate(config, machine, replace(LAYOUT, recompute_block=4))
    assert dropped.peak_bytes < kept.peak_bytes
    assert dropped.step_seconds >= kept.step_seconds
    assert everything.peak_bytes < dropped.peak_bytes
    assert everything.step_seconds > 1.1 * dropped.step_seconds
    assert dropped.summary.recompute_seconds > 0
    # A rank holds about P + 1/2 microbatches of two chunks of about four layers, two sublayers each.
    row = 4096 * 2560 * 2
    most = 4.5 * 2 * 8 * 6 * row
    assert 0.4 * most < kept.peak_bytes - dropped.peak_bytes < most


def test_overhead_is_zero_without_hyper_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a model compared with itself."""
    config = plain_residual(config_of("paper_27b"))
    machine = machine_of("h800")
    chosen = evaluate(config, machine, LAYOUT)
    alone = Search((chosen,), 1, 1)
    monkeypatch.setattr("mhc_dist.plan.overhead.search", lambda *arguments, **options: alone)
    cost = overhead(config, machine, 512, chosen)
    assert cost.ratio == cost.ratio_in_same_layout == pytest.approx(0.0, abs=1e-12)
    assert set(cost.breakdown.values()) == {0.0}


def test_what_does_not_fit_is_no_plain_residual_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by construction. Memory lies between what the run needs, which recomputes, and what the plain
    residual needs, which keeps everything: that one has to recompute, too, and no part is blamed for it.
    """
    config, machine = config_of("paper_27b"), machine_of("h800")
    plain = plain_residual(config)
    layout = Layout("1f1b", 2, 8, 8, 2, recompute_everything=True)
    chosen, keeping = evaluate(config, machine, layout), evaluate(plain, machine, same_layout(layout))
    assert chosen.peak_bytes < keeping.peak_bytes
    small = with_memory(machine, (chosen.peak_bytes + keeping.peak_bytes) / 2)
    alone = Search((evaluate(plain, small, layout),), 1, 1)
    monkeypatch.setattr("mhc_dist.plan.overhead.search", lambda *arguments, **options: alone)
    cost = overhead(config, small, 16, evaluate(config, small, layout))
    assert cost.plain_in_same_layout.peak_bytes <= small.memory_budget
    assert cost.plain_in_same_layout.layout.recompute_everything
    assert 0.03 < cost.ratio_in_same_layout < 0.12
    assert cost.breakdown["recompute"] == 0.0
    assert cost.breakdown["kernels"] > 0.0
    assert sum(cost.breakdown.values()) == pytest.approx(cost.ratio)


def test_without_one_measure_a_step_takes_longer_or_holds_more() -> None:
    """Oracle: each measure's purpose. Fusion saves time, recompute memory, and overlap hides exchanges: what
    takes its place is safe, and waits for every one of them.
    """
    config, machine = config_of("paper_27b"), machine_of("h800")
    layout = replace(LAYOUT, recompute_block=4)
    chosen = evaluate(config, machine, layout)
    found = {measure: without(config, machine, chosen, measure) for measure in Measure}
    assert found[Measure.FUSION].slower > 0.03
    assert found[Measure.OVERLAP].slower > 0.05
    assert found[Measure.RECOMPUTE].evaluation.peak_bytes > chosen.peak_bytes
    assert found[Measure.OVERLAP].evaluation.summary.all_to_all_hidden_ratio == pytest.approx(0.0, abs=1e-9)
    validate(build(config, machine, layout, overlap=False).program)
    text = without_text(list(found.values()), machine)
    assert all(f"  {measure.value}" in text for measure in Measure)


def test_steps_of_2048_devices_simulate_in_no_time() -> None:
    """Oracle: a minute of this process; the pipeline is as deep as the layers allow."""
    start = process_time()
    big = evaluate(config_of("paper_27b"), machine_of("h800"), Layout("1f1b", 16, 8, 128, 64))
    bigger = evaluate(config_of("paper_27b"), machine_of("h800"), Layout("1f1b", 16, 8, 256, 64))
    assert (big.layout.num_devices, bigger.layout.num_devices) == (2048, 4096)
    assert bigger.tokens_per_second > 1.8 * big.tokens_per_second
    assert process_time() - start < 60


def test_layouts_keep_the_batch_and_divide_the_experts() -> None:
    """Oracle: arithmetic on every layout."""
    config = config_of("paper_27b")
    layouts = list(possible_layouts(config, 512, ("1f1b", "dualpipev", "zbv")))
    assert layouts
    for layout in layouts:
        assert layout.data * layout.num_microbatches * layout.sequences == 1280
        assert layout.pipeline * layout.data == 512
        assert config.model.num_experts % layout.expert == 0
        assert layout.data % layout.expert == 0


def test_memory_that_cannot_fit_names_the_shortage_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: simulated steps, which hold more than their estimates: by how much one device is too small, and
    that more of them are not.
    """
    config, machine = config_of("tiny"), machine_of("h800")
    monkeypatch.setattr(
        "mhc_dist.plan.search.parallel_map", lambda function, items: list(map(function, items))
    )
    layouts = possible_layouts(config, 1, ("1f1b",))
    small = with_memory(
        machine, 0.8 * min(evaluate(config, machine, layout).peak_bytes for layout in layouts)
    )
    message = r"GB too much\. The nearest that does fit: --gpus (\d+), 1f1b pipeline="
    with pytest.raises(NothingFitsError, match=message) as refused:
        search(config, small, 1, ("1f1b",))
    smallest = refused.value.smallest
    assert smallest.peak_bytes == evaluate(config, small, smallest.layout).peak_bytes > small.memory_budget
    assert f"needs {smallest.peak_bytes / 1e9:.1f} GB" in str(refused.value)
    found = re.search(message, str(refused.value))
    assert found is not None
    assert search(config, small, int(found[1]), ("1f1b",)).best[0].peak_bytes <= small.memory_budget


def test_plans_of_plain_hyper_connections_can_be_run() -> None:
    """Oracle: the checks of a run: `hc` has no streams that blocks could regenerate."""
    config = config_of("paper_27b", "residual.kind=hc")
    layouts = list(possible_layouts(config, 64, ("1f1b",)))
    assert {layout.recompute_text for layout in layouts} == {"-", "full"}
    for layout in layouts[:2]:
        load_config(CONFIGS / "paper_27b.yaml", ["residual.kind=hc", *layout.settings(config)])


def test_impossible_number_of_devices_names_another() -> None:
    """Oracle: by hand. 37 is prime, more than the layers, and does not divide 1280; 40 does."""
    with pytest.raises(ValueError, match=r"37 devices cannot share a batch of 1280 .*--gpus (32|40)"):
        search(config_of("paper_27b"), machine_of("h800"), 37)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name: x\n", "device: Field required"),
        ("a: b: c\n", "is not YAML"),
        ("- 1\n", "does not describe a cluster"),
    ],
)
def test_malformed_cluster_files(content: str, reason: str, tmp_path: Path) -> None:
    """Oracle: the reason written here by hand."""
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_cluster(str(path))


def test_bad_cluster_numbers_and_names() -> None:
    """Oracle: the reason written here by hand."""
    with pytest.raises(ValueError, match="Known clusters: b200, h100, h800, laptop"):
        load_cluster("h9000")


def test_negative_bandwidth_is_refused(tmp_path: Path) -> None:
    """Oracle: the reason written here by hand."""
    text = (CONFIGS / "clusters" / "h800.yaml").read_text().replace("value: 1.6e+11", "value: -1.0")
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"node_link\.bytes_per_second\.value: Input should be greater"):
        load_cluster(str(path))


def test_missing_trace_is_refused(tmp_path: Path) -> None:
    """Oracle: the reason written here by hand."""
    with pytest.raises(ValueError, match="no trace file"):
        calibration_from_trace(config_of("paper_27b"), machine_of("h800"), tmp_path / "none.json")


def test_calibration_carries_a_slower_machine_to_other_layouts(tmp_path: Path) -> None:
    """Oracle: by construction. The trace of a machine twice as slow doubles every prediction."""
    config = config_of("tiny")
    machine = machine_of("laptop")
    costs = run_costs(config, machine)
    slower = Calibration(dict.fromkeys(compare(costs, costs).factors, 2.0)).apply(costs)
    schedule = schedule_of(config)
    shapes = own_shapes(config)
    program = lower(schedule, shapes.chunks)
    write_perfetto(Shown(program, Simulation(program, slower), "second"), tmp_path / "trace.json")
    calibration = calibration_from_trace(config, machine, tmp_path / "trace.json")
    # Exchanges that hid behind compute give only a bound, and the optimizer was not part of the run.
    compute = {
        key: f for key, f in calibration.factors.items() if key[0] in ("attention", "experts", "finish")
    }
    assert compute
    assert all(factor == pytest.approx(2.0, rel=1e-3) for factor in compute.values())
    other = Layout("1f1b", 1, 1, 2, 8)
    before = evaluate(config, machine, other).step_seconds
    after = evaluate(config, replace(machine, calibration=calibration), other).step_seconds
    assert after == pytest.approx(2 * before, rel=0.01)


def test_the_plain_residual_is_cut_where_it_is_fastest() -> None:
    """Oracle: by construction. A cut that gives one chunk half of the model is given to it, not kept."""
    config = plain_residual(config_of("paper_27b"))
    machine = machine_of("h800")
    skewed = replace(LAYOUT, boundaries=(0, 15, 18, 20, 22, 24, 26, 28, 30))
    given = evaluate(config, machine, skewed)
    found = fastest_cut(config, machine, skewed)
    assert found.step_seconds < 0.9 * given.step_seconds
    assert found.layout.boundaries != skewed.boundaries
    assert fastest_cut(config, machine, found.layout).step_seconds == found.step_seconds
