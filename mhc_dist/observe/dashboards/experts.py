"""How evenly tokens spread over experts, and what an uneven spread costs."""

from mhc_dist.observe.dashboards.sheet import Chart, Number, Query, Row, Sheet, Unit

EXPERTS = Sheet(
    "mhc-experts",
    "mHC training: expert balance",
    "How evenly tokens spread over experts, and what an uneven spread costs.",
    (
        Row(
            "Now",
            (
                Number(
                    "Fullest expert over the mean",
                    Unit.NONE,
                    Query('run:mhc_moe_load_max_to_mean:max{run="$run"}', "max / mean"),
                    "Worst layer of the model; 1 is perfect balance.",
                    decimals=2,
                    warn_at=2.5,
                    fail_at=4.0,
                ),
                Number(
                    "Tokens dropped",
                    Unit.NONE,
                    Query('sum(mhc_moe_dropped_tokens_total{run="$run"})', "dropped"),
                    "Stays 0: exchanges take any split.",
                    decimals=0,
                    warn_at=1,
                    fail_at=1,
                ),
            ),
        ),
        Row(
            "Balance and its cost",
            (
                Chart(
                    "Load, by stage",
                    Unit.NONE,
                    (Query('mhc_moe_load_max_to_mean_ratio{run="$run"}', "stage {{stage}}"),),
                    "Tokens of the fullest expert over the mean, worst layer of the stage.",
                    limit=4.0,
                ),
                Chart(
                    "Exposed all-to-all, by stage",
                    Unit.SHARE,
                    (
                        Query(
                            'stage:mhc_phase:ratio1m{run="$run",phase="exposed_all_to_all"}',
                            "stage {{pp_stage}}",
                        ),
                    ),
                    "A full expert makes its rank late, and the whole expert group waits for it.",
                ),
                Chart(
                    "All-to-all payload",
                    Unit.BYTES_PER_SECOND,
                    (Query('run:mhc_comm_bytes:rate1m{run="$run",op="all_to_all"}', "all ranks"),),
                    "Rows that leave their rank; rows for local experts are not sent.",
                ),
                Chart(
                    "Busy time against the stage's median",
                    Unit.NONE,
                    (
                        Query(
                            'rank:mhc_busy:ratio_to_stage_median{run="$run"}',
                            "rank {{global_rank}} on {{node}}",
                        ),
                    ),
                    "A rank whose experts are full computes longer than the others of its stage.",
                    limit=1.25,
                ),
            ),
        ),
    ),
)
