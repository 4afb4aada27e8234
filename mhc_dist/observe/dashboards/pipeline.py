"""What overlaps, what is exposed, and which rank holds up the others."""

from mhc_dist.observe.dashboards.sheet import Chart, Query, Row, Sheet, Unit


def _phase_by_stage(phase: str) -> Query:
    return Query(f'stage:mhc_phase:ratio1m{{run="$run",phase="{phase}"}}', "stage {{pp_stage}}")


PIPELINE = Sheet(
    "mhc-pipeline",
    "mHC training: pipeline and overlap",
    "What is hidden behind computation, what is exposed, and which rank holds up the others.",
    (
        Row(
            "Overlap",
            (
                Chart(
                    "Communication hidden behind computation",
                    Unit.SHARE,
                    (Query('run:mhc_comm_hidden:ratio1m{run="$run"}', "{{op}}"),),
                    "1: everything was in flight while the ranks computed. 0: they waited for all of it.",
                ),
                Chart(
                    "Payload sent",
                    Unit.BYTES_PER_SECOND,
                    (Query('run:mhc_comm_bytes:rate1m{run="$run"}', "{{op}}"),),
                    "By all ranks together.",
                ),
            ),
        ),
        Row(
            "Waiting, by stage",
            (
                Chart(
                    "Exposed all-to-all",
                    Unit.SHARE,
                    (_phase_by_stage("exposed_all_to_all"),),
                    "Share of wall time spent waiting for expert rows.",
                ),
                Chart(
                    "Exposed pipeline messages",
                    Unit.SHARE,
                    (_phase_by_stage("exposed_p2p"),),
                    "Share of wall time waiting for streams or gradients that were already on the wire.",
                ),
                Chart(
                    "Bubble",
                    Unit.SHARE,
                    (_phase_by_stage("bubble"),),
                    "Share of wall time in which a neighbour had not yet computed what this stage waits for.",
                ),
                Chart(
                    "Recompute",
                    Unit.SHARE,
                    (_phase_by_stage("recompute"),),
                    "Share of wall time spent regenerating streams; most of it inside all-to-all windows.",
                ),
            ),
        ),
        Row(
            "Computing, by stage and rank",
            (
                Chart(
                    "Forward",
                    Unit.SHARE,
                    (_phase_by_stage("forward"),),
                    "Stages that differ much are cut badly: `mhc-dist plan` balances them.",
                    width=8,
                ),
                Chart(
                    "Backward",
                    Unit.SHARE,
                    (_phase_by_stage("backward"),),
                    "Gradients of inputs, and of weights where they are not put off.",
                    width=8,
                ),
                Chart(
                    "Weight gradients put off",
                    Unit.SHARE,
                    (_phase_by_stage("weight_grad"),),
                    "Fill bubbles and windows.",
                    width=8,
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
                    "Ranks of a stage do the same work. A rank above 1.25 holds up all others.",
                    limit=1.25,
                ),
                Chart(
                    "Step time, by rank",
                    Unit.SECONDS,
                    (
                        Query(
                            'rank:mhc_step_seconds:mean1m{run="$run"}'
                            " * on (run, instance) group_left (global_rank) mhc_rank_info",
                            "rank {{global_rank}}",
                        ),
                    ),
                    "All ranks should lie on one line: they wait for each other.",
                ),
            ),
        ),
    ),
)
