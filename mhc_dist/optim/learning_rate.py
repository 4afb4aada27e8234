"""The learning rate of a step. Standard library only.

mHC paper, table 5: linear warm-up, then a constant rate, times 0.316 from 80 % and 0.1 from 90 % of training.
A pure function of the step, so that resuming needs nothing but the step's number.
"""

from __future__ import annotations

from mhc_dist.config_sections import OptimConfig


def learning_rate(optim: OptimConfig, num_steps: int, step: int) -> float:
    """Rate of `step` (0 = first) in a run of `num_steps`.

    The first of `warmup_steps` steps takes 1/warmup_steps of the peak, the last one the full peak. Decays
    are factors on the peak and start at step round(fraction * num_steps); where warm-up and decay overlap,
    both apply.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    factor = 1.0
    for fraction, decayed in optim.decay_at:
        if step >= round(fraction * num_steps):
            factor = decayed
    if step < optim.warmup_steps:
        factor *= (step + 1) / optim.warmup_steps
    return optim.peak_learning_rate * factor
