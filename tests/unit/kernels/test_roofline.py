"""The derived times: arithmetic by hand, and errors that say what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from mhc_kernels import formula, roofline
from mhc_kernels.seam import ConnectionSpec
from mhc_kernels.tiles import tiles_for

CLUSTER = """
device:
  name: test device
  memory_bytes_per_second: {value: 1.0e+12}
  memory_efficiency: {value: 0.5}
"""


def test_time_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    """Oracle: arithmetic by hand. The streams of one forward are 14 * 1280 * 2 bytes per token; at half of
    1 TB/s a million tokens take 71.7 ms, and coefficients add less than 3%."""
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    one = roofline.roofline(roofline.load_device(str(path)), 1_000_000, 1280, ConnectionSpec(num_streams=4))
    streams_us = 14 * 1280 * 2 * 1e6 / 0.5e12 * 1e6
    assert streams_us < one.forward_us < 1.03 * streams_us
    assert one.label == "derived"


def test_formula_scales_with_width() -> None:
    """Oracle: what is not streams or partial sums does not depend on C."""
    spec = ConnectionSpec(num_streams=4)
    narrow, wide = (formula.forward(c, spec, tiles_for("sm_90", 4, c), 2) for c in (1280, 2560))
    assert wide.streams == 2 * narrow.streams
    assert wide.coefficients == narrow.coefficients


@pytest.mark.parametrize("content", ["", "device: {}", "device: {memory_bytes_per_second: 3}"])
def test_incomplete_cluster_files_are_refused(tmp_path: Path, content: str) -> None:
    """Oracle: the contract; the error names the missing key."""
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"memory_bytes_per_second\.value"):
        roofline.load_device(str(path))


def test_unknown_cluster_is_refused() -> None:
    """Oracle: the contract; the error names where clusters are looked for."""
    with pytest.raises(ValueError, match="does not exist"):
        roofline.load_device("moon")
