"""A run's configuration as the `config.json` of an export folder, and back. Imports no torch.

Keys are those of transformers' `DeepseekV3Config`; hyper-connections add `hc_mult`, `hc_sinkhorn_iters` and
`hc_eps` of `DeepseekV4Config`. `latent_scale` is ours (see `layout`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.model.count import dense_width

RESIDUAL_TYPE = "deepseek_v3"
HYPER_TYPE = "deepseek_v3_mhc"
"""Not `deepseek_v3`: transformers would load such weights, skip what it does not know and answer wrongly."""

MODELING_FILE = "modeling_deepseek_v3_mhc.py"
"""Travels in the export folder of a hyper-connection model: transformers runs it with trust_remote_code."""


def check_expressible(config: RunConfig) -> None:
    """Refuse what the layout has no words for. Raises ValueError that names every problem."""
    residual, model = config.residual, config.model
    problems = []
    if residual.kind not in (ResidualKind.RESIDUAL, ResidualKind.MHC):
        problems.append(
            f"residual.kind={residual.kind}: DeepSeek's layout has the plain residual (V3) and Sinkhorn's"
            " hyper-connections (V4) only"
        )
    if residual.kind is ResidualKind.MHC:
        if residual.sinkhorn_eps != residual.pre_eps:
            problems.append(
                f"residual.sinkhorn_eps={residual.sinkhorn_eps} differs from residual.pre_eps="
                f"{residual.pre_eps}: hc_eps is one number for both"
            )
        if residual.shifted_pre:
            problems.append("residual.shifted_pre=true: in DeepSeek-V4 every sublayer uses its own H_pre")
        if residual.reduce != "learned":
            problems.append(f"residual.reduce={residual.reduce}: hc_head_fn is a learned head")
    if model.num_layers > model.num_dense_layers and model.num_experts < 2:
        problems.append(f"model.num_experts={model.num_experts}: the router compares pairs of experts")
    if problems:
        raise ValueError(
            "this model cannot be written in Hugging Face's DeepSeek layout:\n  "
            + "\n  ".join(problems)
            + "\nUse --to torch, which writes every model."
        )


def settings_of(config: RunConfig, separator: int, dtype: str, latent_scale: float) -> dict[str, Any]:
    """The `config.json` of a model that `check_expressible` let pass.

    separator: the token between texts. dtype: float32 or bfloat16.
    """
    model, residual = config.model, config.residual
    settings: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": RESIDUAL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "intermediate_size": dense_width(model),
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": model.kv_rank,
        "qk_nope_head_dim": model.head_dim,
        "qk_rope_head_dim": model.rope_dim,
        "v_head_dim": model.value_dim,
        "rope_theta": model.rope_theta,
        "rope_interleave": True,
        "max_position_embeddings": config.data.sequence_length,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.num_active_experts,
        "n_shared_experts": model.num_shared_experts,
        "moe_intermediate_size": model.expert_dim,
        "routed_scaling_factor": model.gate_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": None,
        "dtype": dtype,
        "latent_scale": latent_scale,
    }
    if residual.kind is ResidualKind.MHC:
        module = MODELING_FILE.removesuffix(".py")
        settings |= {
            "architectures": ["DeepseekV3MhcForCausalLM"],
            "model_type": HYPER_TYPE,
            "auto_map": {
                "AutoConfig": f"{module}.DeepseekV3MhcConfig",
                "AutoModelForCausalLM": f"{module}.DeepseekV3MhcForCausalLM",
            },
            "hc_mult": residual.num_streams,
            "hc_sinkhorn_iters": residual.sinkhorn_iterations,
            "hc_eps": residual.sinkhorn_eps,
        }
    return settings


def config_of(settings: dict[str, Any], source: Path) -> RunConfig:
    """The configuration whose model an export folder holds: everything but how it was trained.

    Raises ValueError when the folder holds a model of another kind, or keys are missing.
    """
    kind = settings.get("model_type")
    if kind not in (RESIDUAL_TYPE, HYPER_TYPE):
        raise ValueError(f"{source}: model_type={kind!r}, expected {RESIDUAL_TYPE} or {HYPER_TYPE}")
    if settings.get("q_lora_rank") is not None:
        raise ValueError(
            f"{source}: q_lora_rank={settings['q_lora_rank']}: models here have no query compression"
        )
    if (settings.get("n_group"), settings.get("topk_group")) != (1, 1):
        raise ValueError(
            f"{source}: n_group={settings.get('n_group')}: experts here are chosen from one group"
        )
    try:
        residual: dict[str, Any] = {"kind": "residual", "num_streams": 1}
        if kind == HYPER_TYPE:
            residual = {
                "kind": "mhc",
                "num_streams": settings["hc_mult"],
                "sinkhorn_iterations": settings["hc_sinkhorn_iters"],
                "sinkhorn_eps": settings["hc_eps"],
                "pre_eps": settings["hc_eps"],
            }
        model = {
            "num_layers": settings["num_hidden_layers"],
            "num_dense_layers": settings["first_k_dense_replace"],
            "hidden_size": settings["hidden_size"],
            "vocab_size": settings["vocab_size"],
            "num_heads": settings["num_attention_heads"],
            "head_dim": settings["qk_nope_head_dim"],
            "value_dim": settings["v_head_dim"],
            "rope_dim": settings["qk_rope_head_dim"],
            "kv_rank": settings["kv_lora_rank"],
            "rope_theta": settings["rope_theta"],
            "num_experts": settings["n_routed_experts"],
            "num_active_experts": settings["num_experts_per_tok"],
            "num_shared_experts": settings["n_shared_experts"],
            "expert_dim": settings["moe_intermediate_size"],
            "dense_dim": settings["intermediate_size"],
            "norm_eps": settings["rms_norm_eps"],
            "init_std": settings["initializer_range"],
            "gate_scale": settings["routed_scaling_factor"],
        }
        data = {"sequence_length": settings["max_position_embeddings"]}
    except KeyError as error:
        raise ValueError(f"{source} lacks the key {error}") from None
    return RunConfig.model_validate(
        {"model": model, "residual": residual, "data": data, "schedule": {"name": "1f1b"}}
    )
