"""From a sheet to the JSON that Grafana reads, with its own builder library.

Needs `grafana-foundation-sdk`, which runs do not: the JSON is committed.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as dashboard_models

from mhc_dist.observe.dashboards.sheet import Chart, Number, Query, Row, Sheet, Unit
from mhc_dist.pipeline.trace import StepPhase

DATASOURCE = dashboard_models.DataSourceRef(type_val="prometheus", uid="${datasource}")
NUM_COLUMNS = 24
NUMBER_HEIGHT, CHART_HEIGHT = 4, 8

PHASE_COLOURS = {
    StepPhase.FORWARD: "#3274D9",
    StepPhase.BACKWARD: "#56A64B",
    StepPhase.WEIGHT_GRADIENT: "#96D98D",
    StepPhase.RECOMPUTE: "#B877D9",
    StepPhase.EXPOSED_ALL_TO_ALL: "#E02F44",
    StepPhase.EXPOSED_P2P: "#FF780A",
    StepPhase.BUBBLE: "#F2CC0C",
    StepPhase.OPTIMIZER: "#5794F2",
    StepPhase.DATA: "#8AB8FF",
    StepPhase.CHECKPOINT: "#C0D8FF",
    StepPhase.OTHER: "#808080",
}
"""One colour per phase on every panel: computation cool, waiting warm."""


def to_json(sheet: Sheet) -> str:
    """The dashboard as Grafana imports it; equal sheets give equal text."""
    builder = (
        dashboard.Dashboard(sheet.title)
        .uid(sheet.uid)
        .description(sheet.description)
        .tags(["mhc"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone(common_models.TimeZoneBrowser)
        .tooltip(dashboard_models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("mHC dashboards")
            .type(dashboard_models.DashboardLinkType.DASHBOARDS)
            .tags(["mhc"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(DATASOURCE)
            .query("label_values(mhc_rank_info, run)")
            .refresh(dashboard_models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard_models.VariableSort.ALPHABETICAL_ASC)
        )
    )
    y = 0
    for row in sheet.rows:
        builder = builder.with_row(dashboard.Row(row.title).grid_pos(_position(0, y, NUM_COLUMNS, 1)))
        y = _place(builder, row, y + 1)
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _place(builder: dashboard.Dashboard, row: Row, y: int) -> int:
    """Put a row's panels side by side, wrapping at the edge; returns the line below them."""
    numbers = [panel for panel in row.panels if isinstance(panel, Number)]
    if numbers:
        width = max(3, NUM_COLUMNS // len(numbers))
        for index, number in enumerate(numbers):
            builder.with_panel(_number(number).grid_pos(_position(index * width, y, width, NUMBER_HEIGHT)))
        y += NUMBER_HEIGHT
    x = 0
    charts = [panel for panel in row.panels if isinstance(panel, Chart)]
    for chart in charts:
        if x + chart.width > NUM_COLUMNS:
            x, y = 0, y + CHART_HEIGHT
        builder.with_panel(_chart(chart).grid_pos(_position(x, y, chart.width, CHART_HEIGHT)))
        x += chart.width
    return y + CHART_HEIGHT if charts else y


def _position(x: int, y: int, width: int, height: int) -> dashboard_models.GridPos:
    return dashboard_models.GridPos(x=x, y=y, w=width, h=height)


def _target(query: Query, index: int) -> prometheus.Dataquery:
    # Grafana drops all but one of several targets that share a ref id.
    reference = chr(ord("A") + index)
    return prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(reference)


def _number(number: Number) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(number.title)
        .description(number.description)
        .datasource(DATASOURCE)
        .unit(number.unit)
        .with_target(_target(number.query, 0).instant())
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(number))
    )
    return panel if number.decimals is None else panel.decimals(number.decimals)


def _thresholds(number: Number) -> dashboard.ThresholdsConfig:
    steps = [dashboard_models.Threshold(value=None, color="text" if number.fail_at is None else "green")]
    if number.warn_at is not None and number.warn_at != number.fail_at:
        steps.append(dashboard_models.Threshold(value=number.warn_at, color="orange"))
    if number.fail_at is not None:
        steps.append(dashboard_models.Threshold(value=number.fail_at, color="red"))
    return dashboard.ThresholdsConfig().mode(dashboard_models.ThresholdsMode.ABSOLUTE).steps(steps)


def _chart(chart: Chart) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.description)
        .datasource(DATASOURCE)
        .unit(chart.unit)
        .line_width(1)
        .show_points(common_models.VisibilityMode.NEVER)
        .fill_opacity(70 if chart.stacked else 0)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .color_scheme(dashboard.FieldColor().mode(dashboard_models.FieldColorModeId.PALETTE_CLASSIC))
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    for index, query in enumerate(chart.queries):
        panel = panel.with_target(_target(query, index))
    if chart.stacked:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if chart.unit is Unit.SHARE:
        panel = panel.min(0).axis_soft_max(1.0 if chart.stacked else 0.1)
    if chart.log:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    if chart.limit is not None:
        limit = [
            dashboard_models.Threshold(value=None, color="transparent"),
            dashboard_models.Threshold(value=chart.limit, color="red"),
        ]
        panel = panel.thresholds(
            dashboard.ThresholdsConfig().mode(dashboard_models.ThresholdsMode.ABSOLUTE).steps(limit)
        ).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE)
        )
    if any(query.legend == "{{phase}}" for query in chart.queries):
        for phase, colour in PHASE_COLOURS.items():
            fixed = {"mode": "fixed", "fixedColor": colour}
            panel = panel.override_by_name(
                phase.value, [dashboard_models.DynamicConfigValue(id_val="color", value=fixed)]
            )
    return panel
