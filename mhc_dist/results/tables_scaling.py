"""Growing to 4096 GPUs: simulated steps, what making their programs costs, and what grows beyond."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.limits import limits_table
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


def scaling_steps(collection: Collection) -> str:
    """Simulated steps of both ways to grow."""
    figures = collection.need("scaling").figures
    rows = [
        [
            point["series"],
            shown(point["devices"], "int"),
            f"{point['pipeline']} x {point['data']}",
            str(point["num_layers"]),
            shown(point["step_seconds"], ".4g"),
            shown(point["efficiency"], "%"),
            shown(point["bubble_ratio"], "%"),
            shown(point["exposed_all_to_all_ratio"] + point["exposed_p2p_ratio"], "%"),
            shown(point["reduce_seconds"] / point["step_seconds"], "%"),
            shown(point["overhead_ratio_same_layout"], "+%"),
            shown(point["peak_memory_bytes"], "GB") + ("" if point["fits"] else ", too much"),
        ]
        for point in figures["points"]
    ]
    headings = [
        "",
        "GPUs",
        "pipeline x data",
        "layers",
        "step s",
        "efficiency",
        "bubble",
        "exposed",
        "reduction",
        "overhead",
        "memory",
    ]
    return with_source(collection, table(headings, rows), "scaling")


def scaling_costs(collection: Collection) -> str:
    """What making those programs costs, in a fresh process each."""
    figures = collection.need("scaling").figures
    rows = [
        [
            shown(cost["devices"], "int"),
            f"{cost['pipeline']} x {cost['num_microbatches']}",
            shown(cost["actions"], "int"),
            *(
                shown(cost["seconds"][part], ".3g")
                for part in ("lower", "validate", "simulate", "place", "place_with_collector")
            ),
            shown(cost["lowered_bytes"], "MB"),
            shown(cost["peak_bytes"], "MB"),
        ]
        for cost in figures["costs"]
    ]
    headings = [
        "GPUs",
        "pipeline x microbatches",
        "actions",
        "lower s",
        "validate s",
        "simulate s",
        "place s",
        "with collector",
        "memory, lowered",
        "placed",
    ]
    return with_source(collection, table(headings, rows), "scaling")


def scaling_limits(collection: Collection) -> str:
    """What grows on the way to ten times as many ranks."""
    return with_source(collection, limits_table(collection.need("scaling").figures), "scaling")
