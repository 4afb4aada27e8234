"""A program's run as one HTML page without dependencies: hover for the action, wheel to zoom."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mhc_dist.pipeline.bars import COLOURS, MEANINGS, bars, lanes
from mhc_dist.pipeline.demonstration import Shown

ROW = 60.0
COMPUTE = 34.0
LANE = 9.0
WIDTH = 1600.0

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:16px}} svg{{border:1px solid #ccc;width:100%;height:{height}px}}
rect{{stroke:#fff;stroke-width:.3;vector-effect:non-scaling-stroke}} .key span{{margin-right:18px}}
.key i{{display:inline-block;width:14px;height:14px;margin-right:5px;vertical-align:-2px}}</style></head>
<body><h3>{title}</h3><p class="key">{key}</p>
<svg id="gantt" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{body}</svg>
<p>Wheel zooms in time, dragging moves; rows are ranks 0 to {last}, thin lanes: {lanes}.</p>
<script>
const svg = document.getElementById("gantt"), full = {width}, high = {height};
let left = 0, span = full, held = null;
const show = () => svg.setAttribute("viewBox", `${{left}} 0 ${{span}} ${{high}}`);
svg.addEventListener("wheel", event => {{
  event.preventDefault();
  const at = left + span * event.offsetX / svg.clientWidth;
  const next = Math.min(full, Math.max(full / 500, span * (event.deltaY > 0 ? 1.2 : 1 / 1.2)));
  left = Math.max(0, Math.min(full - next, at - (at - left) * next / span)); span = next; show();
}}, {{passive: false}});
svg.addEventListener("mousedown", event => held = event.clientX);
window.addEventListener("mouseup", () => held = null);
window.addEventListener("mousemove", event => {{
  if (held === null) return;
  left = Math.max(0, Math.min(full - span, left - (event.clientX - held) * span / svg.clientWidth));
  held = event.clientX; show();
}});
</script></body></html>
"""


def write_html(shown: Shown, path: Path) -> None:
    """Write the page."""
    all_bars = bars(shown.simulation)
    names = lanes(all_bars)
    scale = WIDTH / (shown.simulation.makespan or 1.0)
    rectangles = []
    for bar in all_bars:
        index = names.index(bar.lane)
        top = bar.rank * ROW + (0.0 if index == 0 else COMPUTE + (index - 1) * LANE)
        height = COMPUTE if index == 0 else LANE - 1
        text = f"rank {bar.rank} {bar.lane}: {bar.action} ({bar.start:.6g} to {bar.end:.6g})"
        rectangles.append(
            f'<rect x="{bar.start * scale:.3f}" y="{top:.1f}" width="{(bar.end - bar.start) * scale:.3f}"'
            f' height="{height:.1f}" fill="{bar.colour}"><title>{escape(text)}</title></rect>'
        )
    used = {bar.action.kind for bar in all_bars}
    key = "".join(
        f'<span><i style="background:{COLOURS[kind]}"></i>{escape(text)}</span>'
        for kind, text in MEANINGS.items()
        if kind in used
    )
    program = shown.program
    title = f"{program.schedule}, {program.num_ranks} ranks, {program.num_microbatches} microbatches"
    page = PAGE.format(
        title=escape(title),
        key=key,
        body="".join(rectangles),
        width=WIDTH,
        height=ROW * program.num_ranks,
        last=program.num_ranks - 1,
        lanes=escape(", ".join(names[1:]) or "none"),
    )
    path.write_text(page)
