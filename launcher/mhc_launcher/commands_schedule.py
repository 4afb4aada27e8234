"""`mhc-dist schedule` and `mhc-dist plan`: look at schedules and choose a layout, without any accelerator."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from mhc_dist.pipeline.demonstration import Shown


def schedule_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="1f1b, dualpipev, ...; an unknown name lists all.")
    ],
    ranks: Annotated[int, typer.Option(help="Pipeline ranks.")] = 4,
    microbatches: Annotated[int, typer.Option(help="Microbatches per step.")] = 8,
    unit_costs: Annotated[
        bool, typer.Option("--unit-costs", help="Add makespan, idle time and memory in units of one forward.")
    ] = False,
    recompute_cost: Annotated[
        float, typer.Option(help="Recompute before each backward, in forwards; pairs hide it.")
    ] = 0.0,
    serial_recompute: Annotated[
        bool, typer.Option("--serial-recompute", help="Pairs do not hide recompute either.")
    ] = False,
    actions: Annotated[
        bool, typer.Option("--actions", help="Print every rank's actions instead of the coarse order.")
    ] = False,
    wire_cost: Annotated[
        float, typer.Option(help="Pictures: one all-to-all, in forwards of a rank's whole share.")
    ] = 0.15,
    png: Annotated[Path | None, typer.Option(help="Draw the placed program.")] = None,
    html: Annotated[Path | None, typer.Option(help="The same as a page to zoom and hover.")] = None,
    trace: Annotated[Path | None, typer.Option(help="The same for ui.perfetto.dev.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Print a schedule: chunk, F, B or a half of B (I, W), microbatch; pairs in brackets."""
    from mhc_dist.pipeline.schedules.registry import make_schedule
    from mhc_dist.pipeline.unit_costs import UnitCosts, run_unit_costs

    _check_folders(png=png, html=html, trace=trace)
    if recompute_cost < 0 or wire_cost < 0:
        raise ValueError(f"costs cannot be negative: recompute {recompute_cost}, wire {wire_cost}.")
    schedule = make_schedule(name, ranks, microbatches)
    recompute = Fraction(recompute_cost).limit_denominator(10**6)
    if actions or png or html or trace:
        from mhc_dist.pipeline.demonstration import demonstrate
        from mhc_dist.pipeline.validate import validate

        shown = demonstrate(schedule, wire=wire_cost, recompute=recompute_cost)
        validate(shown.program)
        if actions:
            typer.echo(shown.program.text(), nl=False)
        _draw(shown, png, html, trace)
    if not actions:
        typer.echo(schedule.text(), nl=False)
    result = run_unit_costs(
        schedule, UnitCosts(recompute=recompute, hide_recompute_in_pairs=not serial_recompute)
    )
    idle = [float(x) for x in result.idle_per_rank]
    live = [float(x) for x in result.peak_live_microbatches]
    if unit_costs:
        typer.echo(f"makespan {float(result.makespan):g} in units of one forward of a rank's share")
        typer.echo(f"idle per rank {' '.join(f'{x:g}' for x in idle)}")
        typer.echo(f"microbatches held at most {' '.join(f'{x:g}' for x in live)}")
    if as_json:
        content = {
            "schedule": name,
            "ranks": ranks,
            "microbatches": microbatches,
            "makespan": float(result.makespan),
            "idle_per_rank": idle,
            "peak_live_microbatches": live,
        }
        typer.echo(json.dumps(content))


def _check_folders(**outputs: Path | None) -> None:
    """Before any work: what was asked for can be written."""
    for option, path in outputs.items():
        if path is not None and not path.parent.is_dir():
            raise ValueError(
                f"--{option} {path}: there is no folder {path.parent}. Create it, or name another."
            )


def _draw(shown: Shown, png: Path | None, html: Path | None, trace: Path | None) -> None:
    """Write the pictures that were asked for."""
    if png:
        from mhc_dist.pipeline.picture import draw_png

        draw_png(shown, png)
        typer.echo(f"drawn to {png}")
    if html:
        from mhc_dist.pipeline.page import write_html

        write_html(shown, html)
        typer.echo(f"written to {html}")
    if trace:
        from mhc_dist.pipeline.perfetto import write_perfetto

        write_perfetto(shown, trace)
        typer.echo(f"written to {trace}; open it at ui.perfetto.dev")


def plan_command(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML file.")],
    cluster: Annotated[str, typer.Option(help="A cluster file, or the name of one in configs/clusters.")],
    gpus: Annotated[int | None, typer.Option(help="Devices to use; by default the whole cluster.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the run. May be repeated."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Trace of a run of CONFIG on this cluster: corrects the costs."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Layouts to print.")] = 10,
    without_measures: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="MEASURE",
            help="Also simulate the best layout without fusion, recompute or overlap. May be repeated.",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the best layout's step.")] = None,
    html: Annotated[Path | None, typer.Option(help="The same as a page to zoom and hover.")] = None,
    trace: Annotated[Path | None, typer.Option(help="The same for ui.perfetto.dev.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Search for the fastest layout of a run on a cluster, and say what mHC costs in it."""
    from mhc_dist.config import load_config
    from mhc_dist.plan.cluster import load_cluster
    from mhc_dist.plan.evaluate import build
    from mhc_dist.plan.machine import Machine
    from mhc_dist.plan.overhead import overhead
    from mhc_dist.plan.report import plan_json, plan_text
    from mhc_dist.plan.run_costs import calibration_from_trace
    from mhc_dist.plan.search import search
    from mhc_dist.plan.without import Measure, without, without_text

    known = [measure.value for measure in Measure]
    for name in without_measures or ():
        if name not in known:
            raise ValueError(f"--without {name}: choose from {', '.join(known)}.")
    _check_folders(png=png, html=html, trace=trace)
    config = load_config(path, overrides or ())
    machine = Machine(load_cluster(cluster))
    num_devices = machine.cluster.num_devices if gpus is None else gpus
    if num_devices < 1:
        raise ValueError(f"--gpus {num_devices}: at least one is needed.")
    if calibrate is not None:
        machine = replace(machine, calibration=calibration_from_trace(config, machine, calibrate))
    found = search(config, machine, num_devices)
    cost = overhead(config, machine, num_devices, found.best[0])
    typer.echo(plan_text(config, machine, num_devices, found, cost, rows))
    reduced = [without(config, machine, found.best[0], Measure(name)) for name in without_measures or ()]
    if reduced:
        typer.echo(f"\n{without_text(reduced, machine)}")
    if png or html or trace:
        planned = build(config, machine, found.best[0].layout)
        _draw(Shown(planned.program, planned.simulation, "second"), png, html, trace)
    if as_json:
        content = plan_json(config, found, cost)
        content["without"] = {
            r.measure.value: {"step_seconds": r.evaluation.step_seconds, "slower": r.slower, "fits": r.fits}
            for r in reduced
        }
        typer.echo(json.dumps(content))
