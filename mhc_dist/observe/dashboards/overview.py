"""Is the run healthy, does it learn, how fast is it."""

from mhc_dist.observe.dashboards.sheet import Chart, Number, Query, Row, Sheet, Unit

OVERVIEW = Sheet(
    "mhc-overview",
    "mHC training: overview",
    "Whether a run is healthy, whether it learns, how fast it is and where its time goes.",
    (
        Row(
            "Now",
            (
                Number(
                    "Step",
                    Unit.NONE,
                    Query('max(mhc_step{run="$run"})', "step"),
                    "Last finished step.",
                    decimals=0,
                ),
                Number(
                    "Loss",
                    Unit.NONE,
                    Query('max(mhc_loss{run="$run"})', "loss"),
                    "Training loss of the last step, nats per token.",
                    decimals=3,
                ),
                Number(
                    "Tokens per second",
                    Unit.COUNT,
                    Query('run:mhc_tokens:rate1m{run="$run"}', "tokens/s"),
                    "Tokens trained on by all data ranks together.",
                ),
                Number(
                    "Model FLOPs utilisation",
                    Unit.SHARE,
                    Query('run:mhc_mfu:ratio1m{run="$run"}', "MFU"),
                    "Operations of forward and backward, without recompute, over the peak of all devices.",
                    decimals=1,
                ),
                Number(
                    "Exposed communication",
                    Unit.SHARE,
                    Query('run:mhc_exposed_communication:ratio1m{run="$run"}', "exposed"),
                    "Share of wall time in which ranks only waited for all-to-all or pipeline messages.",
                    decimals=1,
                    warn_at=0.15,
                    fail_at=0.25,
                ),
                Number(
                    "Ranks",
                    Unit.NONE,
                    Query('run:mhc_ranks:count{run="$run"}', "ranks"),
                    "Ranks that answer.",
                    decimals=0,
                ),
                Number(
                    "Since the last step",
                    Unit.SECONDS,
                    Query('run:mhc_last_step_age:seconds{run="$run"}', "age"),
                    "Grows without end when the run hangs.",
                    warn_at=60,
                    fail_at=120,
                ),
                Number(
                    "Alerts firing",
                    Unit.NONE,
                    Query('count(ALERTS{run="$run",alertstate="firing"}) or vector(0)', "alerts"),
                    "Their runbooks are in the alerts themselves.",
                    decimals=0,
                    warn_at=1,
                    fail_at=1,
                ),
            ),
        ),
        Row(
            "Learning",
            (
                Chart(
                    "Loss",
                    Unit.NONE,
                    (
                        Query('max(mhc_loss{run="$run"})', "training"),
                        Query('max(mhc_validation_loss{run="$run"})', "validation"),
                    ),
                    "Nats per token.",
                ),
                Chart(
                    "Gradient norm",
                    Unit.NONE,
                    (Query('max(mhc_grad_norm{run="$run"})', "before clipping"),),
                    "Of all parameters of the model, before clipping.",
                    log=True,
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Chart(
                    "Where the time goes",
                    Unit.SHARE,
                    (Query('run:mhc_phase:ratio1m{run="$run"}', "{{phase}}"),),
                    "Mean over ranks. The phases exclude each other and add up to the wall time of steps.",
                    stacked=True,
                ),
                Chart(
                    "Step time",
                    Unit.SECONDS,
                    (
                        Query('run:mhc_step_seconds:mean1m{run="$run"}', "mean"),
                        Query('run:mhc_step_seconds:p99_5m{run="$run"}', "99th percentile, 5 minutes"),
                    ),
                    "Wall time of a step; the percentile is read from the buckets of the histogram.",
                ),
                Chart(
                    "Tokens per second",
                    Unit.COUNT,
                    (Query('run:mhc_tokens:rate1m{run="$run"}', "all data ranks"),),
                    "One-minute rate.",
                ),
                Chart(
                    "Learning rate",
                    Unit.SCIENTIFIC,
                    (Query('max(mhc_learning_rate{run="$run"})', "learning rate"),),
                    "Of the last step.",
                ),
            ),
        ),
    ),
)
