"""Oracle: the transformers library itself, which loads what `export --to hf` wrote."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhc_dist.export.huggingface import write_huggingface
from mhc_dist.export.vocabulary import ByteVocabulary
from mhc_dist.export.weights import StateDictWeights
from tests.unit.export.models import MHC, RESIDUAL, V4, export_config, logits, tokens, trained_model


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Imported once (5 s), without the network, with a module cache that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield transformers


def load(transformers: ModuleType, folder: Path, **options: Any) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(report.values()), report  # no key missing, unexpected, of another shape
    return model.eval()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2, "num_dense_layers": 2},
        {"num_dense_layers": 3},
        {"norm_eps": 1e-6},
    ],
)
@torch.no_grad()
def test_residual_model_is_a_deepseek_v3(
    transformers: ModuleType, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    """Oracle: DeepseekV3ForCausalLM's logits on the loaded folder."""
    config = export_config(RESIDUAL, **sizes)
    model = trained_model(config)
    write_huggingface(StateDictWeights(model.state_dict()), config, ByteVocabulary(), tmp_path / "hf")
    loaded = load(transformers, tmp_path / "hf")
    assert type(loaded) is transformers.DeepseekV3ForCausalLM
    ours, theirs = logits(model, tokens()), loaded(tokens()).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    # Not equal by being constant: another text gives other logits.
    assert (theirs - loaded(tokens() // 2).logits).abs().max() > 0.1


@pytest.mark.parametrize("residual", [MHC, V4])
@torch.no_grad()
def test_hyper_connection_model_loads_with_its_own_code(
    transformers: ModuleType, tmp_path: Path, residual: dict[str, Any]
) -> None:
    """Oracle: transformers' DeepSeek-V3 with the streams of the modeling file that travels along."""
    config = export_config(residual)
    model = trained_model(config)
    write_huggingface(
        StateDictWeights(model.state_dict()), config, ByteVocabulary(), tmp_path / "hf", shard_bytes=50_000
    )
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    loaded = load(transformers, tmp_path / "hf", trust_remote_code=True)
    assert isinstance(loaded, transformers.DeepseekV3ForCausalLM)
    torch.testing.assert_close(loaded(tokens()).logits, logits(model, tokens()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_hyper_connection_tensors_mean_what_they_mean_in_deepseek_v4(
    transformers: ModuleType, tmp_path: Path
) -> None:
    """Oracle: transformers' DeepseekV4HyperConnection and its hyper-head on the exported tensors."""
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4HyperConnection,
        DeepseekV4HyperHead,
    )

    config = export_config(V4)
    model = trained_model(config)
    write_huggingface(StateDictWeights(model.state_dict()), config, ByteVocabulary(), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    theirs = DeepseekV4Config(
        hidden_size=config.model.hidden_size,
        hc_mult=4,
        hc_sinkhorn_iters=6,
        hc_eps=1e-6,
        rms_norm_eps=config.model.norm_eps,
    )
    streams_TNC = torch.randn(9, 4, config.model.hidden_size, generator=torch.Generator().manual_seed(1))
    for part, layer, connection in (
        ("attn", 1, model.layers[1].attention_connection),
        ("ffn", 2, model.layers[2].feed_forward_connection),
    ):
        module = DeepseekV4HyperConnection(theirs)
        for leaf in ("fn", "base", "scale"):
            module.get_parameter(leaf).copy_(tensors[f"model.layers.{layer}.hc_{part}_{leaf}"])
        post, comb, collapsed = (x[0] for x in module(streams_TNC[None]))
        entry = connection.enter(streams_TNC)
        torch.testing.assert_close(entry.mix.post_TN, post, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entry.mix.res_TNN, comb.transpose(1, 2), rtol=1e-5, atol=1e-6)
        assert (comb - comb.transpose(1, 2)).abs().max() > 0.01  # the test sees the transpose
        normed = collapsed * torch.rsqrt(collapsed.square().mean(-1, keepdim=True))
        torch.testing.assert_close(entry.h_TC, normed * connection.norm_gain, rtol=1e-4, atol=1e-5)
    head = DeepseekV4HyperHead(theirs)
    for leaf in ("fn", "base", "scale"):
        head.get_parameter(f"hc_{leaf}").copy_(tensors[f"model.hc_head_{leaf}"])
    collapsed = head(streams_TNC[None])[0]
    ours = model.head.streams(streams_TNC)
    normed = collapsed * torch.rsqrt(collapsed.square().mean(-1, keepdim=True))
    torch.testing.assert_close(ours, normed * model.head.streams.norm.gain, rtol=1e-4, atol=1e-5)


def test_names_are_those_that_transformers_renames_when_it_loads_a_deepseek_v4(
    transformers: ModuleType,
) -> None:
    """Oracle: transformers' own conversion table for DeepSeek-V4's released weights."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamed = "\n".join(
        str(rule.source_patterns) for rule in get_checkpoint_conversion_mapping("deepseek_v4")
    )
    for name in ("hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale"):
        assert name in renamed, name
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        assert name in renamed, name


@torch.no_grad()
def test_an_eps_that_transformers_has_fixed_is_made_up_for(transformers: ModuleType, tmp_path: Path) -> None:
    """Oracle: logits. Latents so small that eps 1e-6 is a tenth of their mean square."""
    config = export_config(RESIDUAL)
    model = trained_model(config)
    for layer in model.layers:
        layer.attention.latent.weight[: config.model.kv_rank] *= 0.005
    write_huggingface(StateDictWeights(model.state_dict()), config, ByteVocabulary(), tmp_path / "hf")
    loaded = load(transformers, tmp_path / "hf")
    torch.testing.assert_close(loaded(tokens()).logits, logits(model, tokens()), rtol=0, atol=1e-5)
    for layer in loaded.model.layers:
        layer.self_attn.kv_a_proj_with_mqa.weight[: config.model.kv_rank] /= 1024  # as if not made up for
    assert (loaded(tokens()).logits - logits(model, tokens())).abs().max() > 1e-3


@torch.no_grad()
def test_tokenizer_and_generation_of_an_export(transformers: ModuleType, tmp_path: Path) -> None:
    """Oracle: a token is a byte; greedy generation equals asking our model again and again."""
    config = export_config(RESIDUAL)
    model = trained_model(config)
    write_huggingface(StateDictWeights(model.state_dict()), config, ByteVocabulary(), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def f():\n\treturn 'é Ā \u4e2d'  # end\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0

    loaded = load(transformers, tmp_path / "hf")
    prompt = torch.tensor([[0, *b"import"]])
    answer = loaded.generate(prompt, max_new_tokens=8, do_sample=False)
    text_1L = prompt
    for _ in range(8):
        following = logits(model, text_1L)[:, -1].argmax(-1)
        text_1L = torch.cat((text_1L, following[:, None]), dim=1)
        if following == 0:
            break
    assert answer.tolist() == text_1L.tolist()
