"""What went wrong, and how much a crash would lose."""

from mhc_dist.observe.dashboards.sheet import Chart, Number, Query, Row, Sheet, Unit


def _total(name: str, title: str, description: str) -> Number:
    return Number(
        title,
        Unit.NONE,
        Query(f'sum({name}{{run="$run"}})', title.lower()),
        description,
        decimals=0,
        warn_at=1,
        fail_at=10,
    )


FAULTS = Sheet(
    "mhc-faults",
    "mHC training: checkpoints and faults",
    "What went wrong, what was done about it, and how much work a crash would lose.",
    (
        Row(
            "Checkpoints",
            (
                Number(
                    "Since the last commit",
                    Unit.SECONDS,
                    Query('run:mhc_checkpoint_age:seconds{run="$run"}', "age"),
                    "What a crash would lose. Counts from the start of the process before the first commit.",
                    warn_at=1800,
                    fail_at=3600,
                ),
                _total(
                    "mhc_checkpoint_failures_total", "Failed saves", "Training goes on after a failed save."
                ),
                Chart(
                    "Age of the last checkpoint",
                    Unit.SECONDS,
                    (Query('run:mhc_checkpoint_age:seconds{run="$run"}', "age"),),
                    "A saw: each tooth is the time between two commits.",
                    limit=3600,
                ),
                Chart(
                    "Duration of the last save",
                    Unit.SECONDS,
                    (Query('max(mhc_checkpoint_save_duration_seconds{run="$run"})', "start to commit"),),
                    "Asynchronous saves overlap training for most of it.",
                ),
            ),
        ),
        Row(
            "Faults since the start",
            (
                Number(
                    "Skipped steps",
                    Unit.NONE,
                    Query('sum(mhc_nonfinite_steps_total{run="$run"})', "skipped"),
                    "Loss or gradient was not finite; the update was left out.",
                    decimals=0,
                    warn_at=1,
                    fail_at=10,
                ),
                _total("mhc_loss_spikes_total", "Loss spikes", "Steps far above the recent losses."),
                _total(
                    "mhc_rollbacks_total", "Rollbacks", "Returns to the last checkpoint after skipped steps."
                ),
                _total("mhc_restarts_total", "Restarts", "Times the launcher started this run again."),
            ),
        ),
        Row(
            "Ranks",
            (
                Chart(
                    "Ranks that answer",
                    Unit.NONE,
                    (
                        Query('sum(up{job="mhc",run="$run"})', "up"),
                        Query('count(up{job="mhc",run="$run"})', "known"),
                    ),
                    "A rank that died, or whose exporter cannot be reached, is known but not up.",
                ),
                Chart(
                    "Since the last step, by rank",
                    Unit.SECONDS,
                    (
                        Query(
                            '(time() - mhc_last_step_timestamp_seconds{run="$run"})'
                            " * on (run, instance) group_left (global_rank) mhc_rank_info",
                            "rank {{global_rank}}",
                        ),
                    ),
                    "In a hang all ranks rise together; `mhc-dist top RUN` says what each waits for.",
                ),
                Chart(
                    "Memory of the process",
                    Unit.BYTES,
                    (
                        Query(
                            'mhc_memory_allocated_bytes{run="$run"}'
                            " * on (run, instance) group_left (global_rank) mhc_rank_info",
                            "rank {{global_rank}}",
                        ),
                        Query('run:mhc_memory_peak_bytes:max{run="$run"}', "largest peak of any rank"),
                    ),
                    "After each step, and the most any rank ever had.",
                    width=24,
                ),
            ),
        ),
    ),
)
