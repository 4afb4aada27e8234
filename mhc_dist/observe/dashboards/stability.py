"""Whether the residual streams keep their size, forward and backward."""

from mhc_dist.observe.dashboards.sheet import Chart, Number, Query, Row, Sheet, Unit

STABILITY = Sheet(
    "mhc-stability",
    "mHC training: stability",
    "Whether residual mixes stay doubly stochastic, so that signals and gradients keep their size.",
    (
        Row(
            "Now",
            (
                Number(
                    "Gain forward, at most",
                    Unit.NONE,
                    Query('run:mhc_amax_gain:bound{run="$run",direction="forward"}', "forward"),
                    "Product of the stages' composite gains: a bound for the whole model. mHC stays near 1.",
                    decimals=3,
                    warn_at=1.6,
                    fail_at=2.0,
                ),
                Number(
                    "Gain backward, at most",
                    Unit.NONE,
                    Query('run:mhc_amax_gain:bound{run="$run",direction="backward"}', "backward"),
                    "The same for gradients: largest column sum of the product of mixes.",
                    decimals=3,
                    warn_at=1.6,
                    fail_at=2.0,
                ),
                Number(
                    "Worst row sum",
                    Unit.SCIENTIFIC,
                    Query('run:mhc_sinkhorn_residual:max{run="$run",axis="rows"}', "rows"),
                    "Largest distance of a row sum from 1. The axis normalised last is exact.",
                    warn_at=0.02,
                    fail_at=0.05,
                ),
                Number(
                    "Worst column sum",
                    Unit.SCIENTIFIC,
                    Query('run:mhc_sinkhorn_residual:max{run="$run",axis="columns"}', "columns"),
                    "Largest distance of a column sum from 1.",
                    warn_at=0.02,
                    fail_at=0.05,
                ),
            ),
        ),
        Row(
            "Amax gain (paper, section 5.4)",
            (
                Chart(
                    "Forward, by stage",
                    Unit.NONE,
                    (Query('mhc_amax_gain{run="$run",direction="forward"}', "stage {{stage}}"),),
                    "Largest row sum of the product of a stage's residual mixes. Unconstrained"
                    " hyper-connections reach thousands.",
                    limit=2.0,
                    log=True,
                ),
                Chart(
                    "Backward, by stage",
                    Unit.NONE,
                    (Query('mhc_amax_gain{run="$run",direction="backward"}', "stage {{stage}}"),),
                    "Largest column sum of the product of a stage's residual mixes.",
                    limit=2.0,
                    log=True,
                ),
            ),
        ),
        Row(
            "Sinkhorn and gradients",
            (
                Chart(
                    "Sinkhorn residual",
                    Unit.SCIENTIFIC,
                    (Query('mhc_sinkhorn_residual{run="$run"}', "stage {{stage}}, {{axis}}"),),
                    "How far residual mixes are from doubly stochastic, worst layer of each stage.",
                    limit=0.05,
                    log=True,
                ),
                Chart(
                    "Gradient norm",
                    Unit.NONE,
                    (Query('max(mhc_grad_norm{run="$run"})', "before clipping"),),
                    "Spikes here come before spikes of the loss.",
                    log=True,
                ),
            ),
        ),
    ),
)
