"""Every table of the page by the name that `page.yaml` calls it."""

from __future__ import annotations

from collections.abc import Callable

from mhc_dist.results.collection import Collection
from mhc_dist.results.tables_kernels import processor, resources, traffic
from mhc_dist.results.tables_overhead import overhead_measured
from mhc_dist.results.tables_overlap import overlap_variants
from mhc_dist.results.tables_peers import peers
from mhc_dist.results.tables_plans import PLAN_TABLES
from mhc_dist.results.tables_predictions import memory, simulator
from mhc_dist.results.tables_scaling import scaling_costs, scaling_limits, scaling_steps
from mhc_dist.results.tables_study import sinkhorn, stability

TABLES: dict[str, Callable[[Collection], str]] = {
    **PLAN_TABLES,
    "overhead_measured": overhead_measured,
    "overlap_variants": overlap_variants,
    "peers": peers,
    "memory": memory,
    "simulator": simulator,
    "traffic": traffic,
    "resources": resources,
    "processor": processor,
    "stability": stability,
    "sinkhorn": sinkhorn,
    "scaling_steps": scaling_steps,
    "scaling_costs": scaling_costs,
    "scaling_limits": scaling_limits,
}
