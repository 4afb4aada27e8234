"""loss.png: drawn from any log a run can leave behind."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.image import imread

from mhc_dist.observe.loss_plot import BIGRAM_COLOUR, TRAIN_COLOUR, VALIDATION_COLOUR, plot_loss, smooth
from mhc_dist.observe.run_log import RunLog, Scalar


def write_log(folder: Path, num_steps: int) -> None:
    generator = np.random.default_rng(0)
    with RunLog.create(folder) as log:
        for step in range(1, num_steps + 1):
            noise = float(generator.normal(0, 0.1))
            record: dict[str, Scalar] = {"step": step, "loss": 2 + 3 * 0.99**step + noise}
            if step % 50 == 0:
                record["validation_loss"] = 2.05 + 3 * 0.99**step
            log.append(record)


def has_colour(path: Path, colour: str) -> bool:
    pixels = imread(path)[..., :3].reshape(-1, 3)
    return bool((np.abs(pixels - np.array(colors.to_rgb(colour))).max(axis=1) < 0.02).any())


def test_training_validation_and_bigram_are_drawn(tmp_path: Path) -> None:
    """Oracle: pixels of each line's colour are in the picture; without validation and bigram they are not."""
    write_log(tmp_path, 300)
    path = plot_loss(tmp_path, "tiny", bigram_loss=2.45, unit="nats per byte")
    assert path == tmp_path / "loss.png"
    assert all(has_colour(path, colour) for colour in (TRAIN_COLOUR, VALIDATION_COLOUR, BIGRAM_COLOUR))
    write_log(tmp_path, 40)
    plot_loss(tmp_path, "tiny")
    assert has_colour(path, TRAIN_COLOUR)
    assert not has_colour(path, VALIDATION_COLOUR)


@pytest.mark.parametrize("num_steps", [1, 3, 49, 51])
def test_short_runs_can_be_drawn(tmp_path: Path, num_steps: int) -> None:
    """Oracle: a picture of the usual size."""
    write_log(tmp_path, num_steps)
    assert imread(plot_loss(tmp_path, "short")).shape[:2] == (676, 1170)


def test_steps_without_a_loss_are_left_out(tmp_path: Path) -> None:
    """Oracle: a log with null losses draws; one with nothing else is refused with the number of records."""
    with RunLog.create(tmp_path) as log:
        log.append({"step": 1, "loss": 3.0})
        log.append({"step": 2, "loss": float("nan")})
    assert plot_loss(tmp_path, "gaps").is_file()
    with RunLog.create(tmp_path) as log:
        log.append({"step": 1, "loss": float("nan")})
    with pytest.raises(ValueError, match="none of the 1 records"):
        plot_loss(tmp_path, "nothing")


def test_smoothing_is_a_symmetric_mean() -> None:
    """Oracle: means by hand, and a straight line that stays as it is up to its ends."""
    assert smooth(np.array([1.0, 3.0, 5.0, 10.0, 8.0]), 1).tolist() == pytest.approx([1, 3, 6, 23 / 3, 8])
    line = np.arange(20.0)
    assert smooth(line, 4) == pytest.approx(line)
