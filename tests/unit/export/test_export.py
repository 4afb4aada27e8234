"""Oracle: the model that was exported, bit for bit, and what the messages must say."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_dist.export.huggingface import INDEX_FILE, read_huggingface, write_huggingface
from mhc_dist.export.layout import latent_scale
from mhc_dist.export.settings import check_expressible
from mhc_dist.export.torch_file import read_torch, write_torch
from mhc_dist.export.vocabulary import ByteVocabulary, byte_names, vocabulary_of
from mhc_dist.export.weights import StateDictWeights, build_model, whole_state
from tests.unit.export.models import MHC, RESIDUAL, V4, export_config, logits, tokens, trained_model


@pytest.mark.parametrize("residual", [RESIDUAL, MHC, V4])
def test_huggingface_round_trip(tmp_path: Path, residual: dict[str, Any]) -> None:
    """Oracle: the state dict that went in, bit for bit, and its logits."""
    config = export_config(residual)
    model = trained_model(config)
    folder = tmp_path / "hf"
    write_huggingface(StateDictWeights(model.state_dict()), config, ByteVocabulary(), folder, shard_bytes=1)
    config_back, state = read_huggingface(folder)
    assert config_back.model == config.model.model_copy(
        update={"dense_dim": 128, "balance_rate": config_back.model.balance_rate}
    )
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    back = build_model(config_back, state)
    torch.testing.assert_close(logits(back, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "hc", "mhc", "identity", "mhc_lite", "krom"])
def test_torch_round_trip(tmp_path: Path, kind: str) -> None:
    """Oracle: the state dict that went in; the file loads with weights_only into a fresh model."""
    config = export_config({"kind": kind, "num_streams": 1 if kind == "residual" else 4, "reduce": "mean"})
    model = trained_model(config)
    write_torch(StateDictWeights(model.state_dict()), config, tmp_path / "out")
    plain = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert type(plain) is dict
    config_back, state = read_torch(tmp_path / "out")
    assert config_back == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_bf16_export_keeps_routers_and_connections_in_fp32(tmp_path: Path) -> None:
    """Oracle: rounding done by hand."""
    config = export_config(MHC)
    state = trained_model(config).state_dict()
    write_huggingface(
        StateDictWeights(state), config, ByteVocabulary(), tmp_path / "hf", dtype=torch.bfloat16
    )
    _, back = read_huggingface(tmp_path / "hf")
    for name, tensor in state.items():
        keeps = any(part in name for part in ("router", "phi_", "alpha_", "bias_", "scale_"))
        expected = tensor if keeps else tensor.bfloat16().float()
        assert torch.equal(back[name], expected), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("eps", "scale"), [(1e-20, 1024.0), (1e-6, 1.0), (1e-8, 8.0), (1e-5, 0.25)])
def test_latent_scale_is_a_power_of_two(eps: float, scale: float) -> None:
    """Oracle: 1e-6 / scale^2 within a factor of two of eps, by hand; 1024 at most."""
    assert latent_scale(eps) == scale


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ({"kind": "hc"}, "residual.kind=hc"),
        ({"kind": "identity"}, "residual.kind=identity"),
        ({"sinkhorn_eps": 1e-6}, "residual.sinkhorn_eps=1e-06 differs from residual.pre_eps=0.0"),
        ({"reduce": "mean"}, "residual.reduce=mean"),
        ({"shifted_pre": True}, "residual.shifted_pre=true"),
    ],
)
def test_what_the_layout_has_no_words_for_is_named(residual: dict[str, Any], message: str) -> None:
    """Oracle: the key and value in the message, and the way out."""
    with pytest.raises(ValueError, match=message) as caught:
        check_expressible(export_config({**MHC, **residual}))
    assert "--to torch" in str(caught.value)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    """Oracle: the file system after each refusal."""
    config = export_config(RESIDUAL)
    state = trained_model(config).state_dict()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="already exists"):
        write_torch(StateDictWeights(state), config, tmp_path / "there")
    del state["head.output.weight"]  # the last tensor: everything before it has been written
    with pytest.raises(ValueError, match=r"no tensor head\.output\.weight"):
        write_huggingface(StateDictWeights(state), config, ByteVocabulary(), tmp_path / "new", shard_bytes=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_torch(StateDictWeights(trained_model(config).state_dict()), config, tmp_path / "file" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """Oracle: the operating system, which lets no file of this process grow beyond 20 kB."""
    config = export_config(RESIDUAL)
    weights = StateDictWeights(trained_model(config).state_dict())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot take the weights.*File too large"):
            write_huggingface(weights, config, ByteVocabulary(), tmp_path / "hf")
        with pytest.raises(ValueError, match="cannot take the weights"):
            write_torch(weights, config, tmp_path / "torch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_folders_are_named(tmp_path: Path) -> None:
    """Oracle: the file and the key in the message."""
    config = export_config(RESIDUAL)
    folder = tmp_path / "hf"
    write_huggingface(
        StateDictWeights(trained_model(config).state_dict()), config, ByteVocabulary(), folder, shard_bytes=1
    )
    shard = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"]["lm_head.weight"]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{shard.name}.*cannot be read"):
        read_huggingface(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"q_lora_rank": 8}, "q_lora_rank=8"),
        ({"n_group": 4}, "n_group=4"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            read_huggingface(folder)
    del settings["kv_lora_rank"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="lacks the key 'kv_lora_rank'"):
        read_huggingface(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_huggingface(folder)


def test_weights_of_another_configuration_are_refused() -> None:
    """Oracle: both shapes in the message."""
    config, larger = export_config(RESIDUAL), export_config(RESIDUAL, kv_rank=24)
    weights = StateDictWeights(trained_model(config).state_dict())
    with pytest.raises(ValueError, match=r"shape \(20, 32\), the configuration says \(28, 32\)"):
        whole_state(weights, larger)


def test_bytes_have_distinct_visible_names() -> None:
    """Oracle: what byte-level tokenizers write: space is U+0120, newline U+010A, letters themselves."""
    names = byte_names()
    assert len(set(names)) == 256
    assert (names[ord("a")], names[ord(" ")], names[ord("\n")]) == ("a", "\u0120", "\u010a")
    assert all(name.isprintable() for name in names)


def test_vocabulary_follows_the_corpus(tmp_path: Path) -> None:
    """Oracle: how `data prepare` encodes: text as bytes, and a prepared folder with its tokenizer."""
    from tokenizers import Tokenizer, models

    bytes_config = export_config(RESIDUAL)
    assert isinstance(vocabulary_of(bytes_config), ByteVocabulary)
    stream = ByteVocabulary().stream()
    assert [stream.feed(byte) for byte in "é!".encode()] == ["", "é", "!"]

    elsewhere = bytes_config.model_copy(
        update={"data": bytes_config.data.model_copy(update={"corpus": str(tmp_path / "gone")})}
    )
    with pytest.raises(ValueError, match=r"256 token ids.*--tokenizer"):
        vocabulary_of(elsewhere)

    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "tokens.json").write_text(json.dumps({"separator": 2}))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    words.save(str(prepared / "tokenizer.json"))
    here = bytes_config.model_copy(
        update={"data": bytes_config.data.model_copy(update={"corpus": str(prepared)})}
    )
    vocabulary = vocabulary_of(here)
    assert vocabulary.encode("b") == [1]
    assert vocabulary.separator == 2
    assert vocabulary.stream().feed(1) == "b"
