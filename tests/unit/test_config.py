from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mhc_dist.config import ConfigError, RunConfig, dump_config, load_config
from mhc_dist.config_text import key_paths

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_write_out_every_key(path: Path) -> None:
    """Oracle: the models' own list of keys; a shipped file hides nothing behind a default."""
    document = yaml.safe_load(path.read_text())
    written = {
        f"{section}.{key}" if keys else section
        for section, keys in document.items()
        for key in (keys or [""])
    }
    with_keys = {name for name in key_paths(RunConfig) if name != "deepspeed"}
    assert written - {"deepspeed"} == with_keys
    load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dump_loads_back_to_an_equal_config(path: Path, tmp_path: Path) -> None:
    """Oracle: equality with the config that was dumped, odd values included."""
    config = load_config(path, ["optim.eps=1e-20", "deepspeed.wandb.enabled=true", "deepspeed.wandb.x=3e-7"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.deepspeed == {"wandb": {"enabled": True, "x": 3e-7}}


def test_overrides_apply_in_order_and_leave_the_rest() -> None:
    """Oracle: the same file without overrides, with the two named keys replaced."""
    plain = load_config(TINY)
    changed = load_config(TINY, ["train.steps=7", "residual.kind=hc", "train.steps=9"])
    expected = plain.model_dump()
    expected["train"]["steps"] = 9
    expected["residual"]["kind"] = "hc"
    assert changed.model_dump() == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=3", ["model.num_layer = 3", "unknown key", "Did you mean model.num_layers?"]),
        ("num_layers=3", ["num_layers = 3", "Did you mean model.num_layers?"]),
        ("trian.steps=3", ["trian", "Did you mean train?"]),
        ("parallel.tensor=3", ["parallel has: pipeline, data, expert"]),
        ("checkpoint.every=3", ["checkpoint.every", "Did you mean checkpoint.keep_every?"]),
        ("checkpoint.keep_every=70", ["70", "50"]),
        ("train.steps.more=3", ["train.steps = ", "is a value, it has no keys below it"]),
        ("train.steps", ["write section.key=value"]),
        ("=3", ["write section.key=value"]),
        ("train.steps=[1", ["line 1", "not valid YAML"]),
        ("train.steps=0", ["train.steps = 0", "greater than 0"]),
        ("train.steps=many", ["train.steps = 'many'", "integer"]),
        ("train.steps=yes", ["train.steps = True", "not true or false"]),
        ("train.name=../up", ["train.name = '../up'", "letters, digits"]),
        ("train.backend=mpi", ["'auto', 'gloo' or 'nccl'"]),
        ("optim.peak_learning_rate=.inf", ["finite"]),
        ("optim.betas=[0.9, 1.0]", ["optim.betas.1 = 1.0", "less than 1"]),
        ("optim.decay_at=[[0.9, 0.1], [0.8, 0.3]]", ["[0.9, 0.8]", "not increasing"]),
        ("recompute.mode=block", ["recompute.mode = 'block'", "none", "mhc", "full"]),
        ("residual.kind=residual", ["residual.num_streams=4", "Set residual.num_streams=1"]),
        ("model.hidden_size=100", ["model.hidden_size=100", "16 channels", "112"]),
        ("model.rope_dim=15", ["model.rope_dim=15 is odd", "16"]),
        ("model.num_active_experts=9", ["model.num_active_experts=9", "model.num_experts=8"]),
        ("model.num_dense_layers=7", ["model.num_dense_layers=7", "model.num_layers=6"]),
        ("model.num_experts=7", ["parallel.expert=2 does not divide model.num_experts=7", "8"]),
        ("model.num_layers=3", ["model.num_layers=3", "4 chunks", "dualpipev"]),
        ("parallel.data=3", ["parallel.expert=2", "parallel.data=3", "[1, 3]"]),
        ("parallel.pipeline=4", ["schedule.num_microbatches", "8", "parallel.pipeline"]),
        ("schedule.name=dualpipe", ["2 copies", "Set schedule.name to dualpipev"]),
        ("schedule.name=dualpipe9", ["dualpipe9", "1f1b", "dualpipev"]),
        ("schedule.num_microbatches=1", ["schedule.num_microbatches", "1", "4"]),
        ("deepspeed.zero_optimization.stage=2", ["zero_optimization.stage=2", "Set it to 1"]),
        ("deepspeed.fp16.enabled=true", ["deepspeed.fp16", "train.precision"]),
        ("observe.metrics_port=65534", ["65534", "65532"]),
    ],
)
def test_impossible_values_are_refused_with_numbers_and_remedy(override: str, words: list[str]) -> None:
    """Oracle: the words a user needs to repair the line, listed beside each mistake."""
    message = refusal(TINY, override)
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    assert "pydantic" not in message


def test_all_problems_are_named_at_once() -> None:
    """Oracle: three independent mistakes, three lines."""
    lines = refusal(TINY, "model.num_experts=7", "model.rope_dim=15", "parallel.data=3").splitlines()
    assert lines[0].startswith(str(TINY))
    assert len(lines[1:]) == 3, lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["found nothing"]),
        ("- 1\n", ["found list"]),
        ("model: {num_layers: 2\n", ["line 2", "not valid YAML"]),
        ("train:\n  steps: 1\n  steps: 2\n", ["line 3", "'steps' is given twice"]),
        ("train: {steps: 3}\n", ["model: missing"]),
        ("model:\n  num_layers: 4\n", ["model.hidden_size: missing", "model.expert_dim: missing"]),
    ],
)
def test_broken_files_are_refused_with_the_place(text: str, words: list[str], tmp_path: Path) -> None:
    """Oracle: the place and cause of each defect, listed beside it."""
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = refusal(path)
    assert [word for word in words if word not in message] == [], message


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    """Oracle: three kinds of unreadable path, each named for what it is."""
    assert "no such file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal(tmp_path / "binary.yaml")


def test_empty_section_keeps_its_defaults(tmp_path: Path) -> None:
    """Oracle: the same file with the section left out."""
    path = tmp_path / "run.yaml"
    document = yaml.safe_load(TINY.read_text())
    del document["observe"]
    path.write_text(yaml.safe_dump(document))
    without = load_config(path)
    path.write_text(yaml.safe_dump(document) + "observe:\n")
    assert load_config(path) == without


def test_config_needs_no_torch() -> None:
    """Oracle: the modules of a fresh interpreter after loading a config."""
    code = f"import sys; from mhc_dist.config import load_config; load_config({str(TINY)!r})"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_of_a_step() -> None:
    """Oracle: table 5 of the mHC paper: 1280 sequences of 4096 tokens a step for the 27B model."""
    config = load_config(next(path for path in CONFIGS if path.stem == "paper_27b"))
    assert (config.sequences_per_step, config.tokens_per_step) == (1280, 1280 * 4096)
    assert config.num_processes == 256
