"""Every dashboard, in the order in which a person looks at them."""

from mhc_dist.observe.dashboards.experts import EXPERTS
from mhc_dist.observe.dashboards.faults import FAULTS
from mhc_dist.observe.dashboards.overview import OVERVIEW
from mhc_dist.observe.dashboards.pipeline import PIPELINE
from mhc_dist.observe.dashboards.stability import STABILITY

SHEETS = (OVERVIEW, PIPELINE, STABILITY, EXPERTS, FAULTS)
