"""The series of a rank, as a scraper sees them."""

import math

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mhc_dist.observe.fault_series import NonfiniteReason
from mhc_dist.observe.metrics import CommOp, CommUse, RankLabels, RankStep, RunStep, TrainMetrics, Work
from mhc_dist.pipeline.trace import StepPhase

LABELS = RankLabels(global_rank=3, node="node1", pp_stage=1, dp_rank=1, ep_rank=1)


def scrape(metrics: TrainMetrics) -> dict[str, float]:
    """Series by name and labels, parsed from the text that Prometheus would fetch."""
    series = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            series[f"{sample.name}{{{labels}}}"] = sample.value
    return series


def make_step(step: int) -> RunStep:
    return RunStep(step=step, loss=5.0 - step, num_tokens=1000, grad_norm=2.0, learning_rate=1e-3)


def test_steps_add_up() -> None:
    """Oracle: sums by hand of two steps."""
    metrics = TrainMetrics(LABELS, reports_run=True, clock=lambda: 77.0)
    for step, seconds in ((1, 0.3), (2, 0.7)):
        metrics.record_run_step(make_step(step))
        metrics.record_rank_step(
            RankStep(
                seconds=seconds,
                phase_seconds={StepPhase.FORWARD: 0.1, StepPhase.BUBBLE: seconds - 0.1},
                comm={CommOp.P2P: CommUse(seconds=0.2, exposed_seconds=0.05, num_bytes=4096)},
                memory_allocated_bytes=10 * step,
                memory_peak_bytes=100 * step,
            )
        )
    metrics.record_validation(3.5)
    series = scrape(metrics)
    expected = {
        "mhc_step{}": 2,
        "mhc_loss{}": 3.0,
        "mhc_validation_loss{}": 3.5,
        "mhc_tokens_total{}": 2000,
        "mhc_steps_total{}": 2,
        "mhc_grad_norm{}": 2.0,
        "mhc_learning_rate{}": 1e-3,
        "mhc_step_duration_seconds_count{}": 2,
        "mhc_step_duration_seconds_sum{}": 1.0,
        "mhc_step_duration_seconds_bucket{le=0.5}": 1,
        "mhc_step_duration_seconds_bucket{le=1.0}": 2,
        "mhc_last_step_timestamp_seconds{}": 77.0,
        "mhc_step_phase_seconds_total{phase=forward}": 0.2,
        "mhc_step_phase_seconds_total{phase=bubble}": 0.8,
        "mhc_step_phase_seconds_total{phase=optimizer}": 0,
        "mhc_comm_seconds_total{op=p2p}": 0.4,
        "mhc_comm_exposed_seconds_total{op=p2p}": 0.1,
        "mhc_comm_bytes_total{op=p2p}": 8192,
        "mhc_comm_bytes_total{op=all_to_all}": 0,
        "mhc_memory_allocated_bytes{}": 20,
        "mhc_memory_peak_bytes{}": 200,
        "mhc_rank_info{dp_rank=1,ep_rank=1,global_rank=3,node=node1,pp_stage=1}": 1,
    }
    for name, value in expected.items():
        assert series[name] == pytest.approx(value), name


def test_only_one_rank_exports_the_run() -> None:
    """Oracle: the list of metrics that would be counted twice; the other rank has none of them."""
    metrics = TrainMetrics(LABELS, reports_run=False)
    metrics.record_run_step(make_step(1))
    metrics.record_validation(3.0)
    metrics.record_rank_step(RankStep(seconds=1.0))
    names = {name.partition("{")[0] for name in scrape(metrics)}
    run_names = {"mhc_step", "mhc_loss", "mhc_tokens_total", "mhc_steps_total", "mhc_validation_loss"}
    assert not names & run_names
    assert "mhc_step_duration_seconds_count" in names
    assert "mhc_last_step_timestamp_seconds" in names


def test_there_are_few_series_and_all_are_there_from_the_start() -> None:
    """Oracle: the budget of 200 series a rank; recording adds none, and no creation timestamps."""
    metrics = TrainMetrics(LABELS, reports_run=True)
    before = set(scrape(metrics))
    metrics.record_run_step(make_step(1))
    phases = dict.fromkeys(StepPhase, 0.1)
    metrics.record_rank_step(RankStep(1.0, phases, dict.fromkeys(CommOp, CommUse()), 1, 1))
    assert set(scrape(metrics)) == before
    assert len(before) < 100
    assert not [name for name in before if "_created" in name]
    assert math.isnan(scrape(TrainMetrics(LABELS, reports_run=True))["mhc_loss{}"])


def test_two_ranks_in_one_process_do_not_share_series() -> None:
    """Oracle: registries are private, so counting in one leaves the other at 0."""
    first, second = TrainMetrics(LABELS, True), TrainMetrics(LABELS, True)
    first.record_run_step(make_step(1))
    assert scrape(second)["mhc_steps_total{}"] == 0


def test_an_unknown_phase_is_refused() -> None:
    """Oracle: a misspelled phase raises instead of making a new series."""
    metrics = TrainMetrics(LABELS, True)
    with pytest.raises(ValueError, match="forwards"):
        metrics.record_rank_step(RankStep(1.0, {"forwards": 1.0}))  # type: ignore[dict-item]


def test_operations_follow_tokens_and_the_peak_is_known_only_with_a_cluster() -> None:
    """Oracle: tokens x operations per token, by hand."""
    with_peak = TrainMetrics(LABELS, reports_run=True, work=Work(flops_per_token=7, peak_flops=1e12))
    without = TrainMetrics(LABELS, reports_run=True, work=Work(flops_per_token=7))
    for metrics in (with_peak, without):
        metrics.record_run_step(make_step(1))
    assert scrape(with_peak)["mhc_model_flops_total{}"] == 7000
    assert scrape(with_peak)["mhc_device_peak_flops{}"] == 1e12
    assert scrape(without)["mhc_model_flops_total{}"] == 7000
    assert "mhc_device_peak_flops{}" not in scrape(without)


def test_only_the_first_data_rank_speaks_for_its_stage() -> None:
    """Oracle: the labels given; two ranks exporting one stage would be summed by a dashboard."""
    assert TrainMetrics(LABELS, reports_run=False).stage is None
    leader = TrainMetrics(
        RankLabels(global_rank=2, node="node1", pp_stage=1, dp_rank=0, ep_rank=0), reports_run=False
    )
    assert leader.stage is not None
    leader.stage.record_load(1.5)
    leader.stage.record_stability(
        forward_gain=1.1, backward_gain=1.2, row_residual=1e-6, column_residual=2e-6
    )
    series = scrape(leader)
    assert series["mhc_moe_load_max_to_mean_ratio{stage=1}"] == 1.5
    assert series["mhc_moe_dropped_tokens_total{stage=1}"] == 0
    assert series["mhc_amax_gain{direction=forward,stage=1}"] == 1.1
    assert series["mhc_amax_gain{direction=backward,stage=1}"] == 1.2
    assert series["mhc_sinkhorn_residual{axis=rows,stage=1}"] == 1e-6
    assert series["mhc_sinkhorn_residual{axis=columns,stage=1}"] == 2e-6


def test_faults_are_counted_from_zero() -> None:
    """Oracle: counts by hand; a series must exist before its first event, or a rate misses it."""
    metrics = TrainMetrics(LABELS, reports_run=True, clock=lambda: 50.0)
    assert metrics.faults is not None
    before = scrape(metrics)
    names = ("mhc_checkpoint_failures", "mhc_loss_spikes", "mhc_restarts", "mhc_rollbacks")
    assert all(before[f"{name}_total{{}}"] == 0 for name in names)
    assert all(
        before[f"mhc_nonfinite_steps_total{{reason={reason.value}}}"] == 0 for reason in NonfiniteReason
    )
    metrics.faults.checkpoint_failed()
    metrics.faults.checkpoint_committed(2.5)
    metrics.faults.nonfinite_step(NonfiniteReason.GRADIENT)
    metrics.faults.loss_spike()
    metrics.faults.restarted(3)
    metrics.faults.rolled_back()
    after = scrape(metrics)
    assert after["mhc_checkpoint_failures_total{}"] == 1
    assert after["mhc_checkpoint_last_success_timestamp_seconds{}"] == 50.0
    assert after["mhc_checkpoint_save_duration_seconds{}"] == 2.5
    assert after["mhc_nonfinite_steps_total{reason=gradient}"] == 1
    assert after["mhc_loss_spikes_total{}"] == 1
    assert after["mhc_restarts_total{}"] == 3
    assert after["mhc_rollbacks_total{}"] == 1
