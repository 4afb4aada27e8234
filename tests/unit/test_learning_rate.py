import pytest

from mhc_dist.config_sections import OptimConfig
from mhc_dist.optim.learning_rate import learning_rate

PAPER = OptimConfig(peak_learning_rate=1.0, warmup_steps=4, decay_at=((0.8, 0.316), (0.9, 0.1)))


def test_the_paper_schedule_written_out() -> None:
    # Oracle: twenty steps by hand: four of warm-up, factor 0.316 from step 16, 0.1 from step 18.
    expected = [0.25, 0.5, 0.75, *[1.0] * 13, 0.316, 0.316, 0.1, 0.1]
    assert [learning_rate(PAPER, 20, step) for step in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize("num_steps", [1, 7, 10, 29, 100, 1000])
@pytest.mark.parametrize("fraction", [0.07, 0.29, 0.57, 0.7, 0.9])
def test_a_decay_starts_at_the_rounded_step(fraction: float, num_steps: int) -> None:
    # Oracle: round(fraction x steps); floating point gives 0.29 x 100 = 28.999999999999996.
    optim = OptimConfig(peak_learning_rate=2.0, warmup_steps=0, decay_at=((fraction, 0.5),))
    start = round(fraction * num_steps)
    rates = [learning_rate(optim, num_steps, step) for step in range(num_steps)]
    assert rates == [2.0] * start + [1.0] * (num_steps - start)


def test_warm_up_and_decay_both_apply_where_they_overlap() -> None:
    # Oracle: the product of the two factors.
    optim = OptimConfig(peak_learning_rate=1.0, warmup_steps=10, decay_at=((0.5, 0.1),))
    assert learning_rate(optim, 10, 5) == pytest.approx(0.6 * 0.1)


def test_no_warm_up_and_no_decay_is_constant() -> None:
    # Oracle: the peak.
    optim = OptimConfig(peak_learning_rate=3.0e-4, warmup_steps=0, decay_at=())
    assert {learning_rate(optim, 5, step) for step in range(5)} == {3.0e-4}
