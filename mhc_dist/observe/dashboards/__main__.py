"""`python -m mhc_dist.observe.dashboards`: write configs/grafana/dashboards/*.json anew."""

from __future__ import annotations

import sys
from pathlib import Path

from mhc_dist.observe.dashboards.all_sheets import SHEETS
from mhc_dist.observe.dashboards.grafana import to_json

FOLDER = Path("configs/grafana/dashboards")


def main() -> int:
    """Write every dashboard; run it at the root of the repository."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for sheet in SHEETS:
        path = FOLDER / f"{sheet.uid}.json"
        path.write_text(to_json(sheet), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
