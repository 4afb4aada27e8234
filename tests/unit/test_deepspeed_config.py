from typing import Any

import pytest

from mhc_dist.config import RunConfig
from mhc_dist.optim.deepspeed_config import engine_config
from mhc_dist.optim.deepspeed_options import ALLOWED, OWNED, check_config


@pytest.mark.parametrize(
    ("option", "complaint", "remedy"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage=2", "Set it to 1"),
        ({"zero_optimization": {"stage": 3}}, "stage=3", "Set it to 1"),
        ({"zero_optimization": {"stage": 0}}, "stage=0", "Set it to 1"),
        ({"zero_optimization": {"stage": True}}, "stage=True", "Set it to 1"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm=true", "Set it to false"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "offload_optimizer has no effect", "Remove it"),
        ({"zero_optimization": 1}, "not a mapping", "stage: 1"),
        ({"communication_data_type": "bf16"}, "communication_data_type=bf16", "Set it to fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype=bf16", "Set it to fp32"),
        ({"data_types": {"params_dtype": "bf16"}}, "params_dtype", "train.precision|Remove it"),
        ({"fp16": {"enabled": True}}, "no loss scaling", "train.precision to bf16"),
        ({"elasticity": {"enabled": True}}, "number of processes is fixed", "restart on another topology"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is decided by", "optim.gradient_clipping"),
        ({"train_batch_size": 8}, "train_batch_size is decided by", "schedule.num_microbatches"),
        ({"prescale_gradients": True}, "prescale_gradients has no effect", "may be set: comet"),
    ],
)
def test_refused_options_say_why_and_what_to_do(option: dict[str, Any], complaint: str, remedy: str) -> None:
    # Oracle: the measured traps and the wording promised to users.
    with pytest.raises(ValueError, match=rf"(?s){complaint}.*({remedy})"):
        check_config(option)


def test_harmless_options_pass() -> None:
    # Oracle: the list of what is allowed.
    check_config(
        {
            "zero_optimization": {"stage": 1, "overlap_comm": False},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "tensorboard": {"enabled": True, "output_path": "x"},
            "csv_monitor": {"enabled": True},
        }
    )
    assert not set(ALLOWED) & set(OWNED)


def test_the_engine_gets_fp32_sums_and_the_batch_of_the_run() -> None:
    # Oracle: 3 sequences x 4 microbatches x 2 data ranks; both dtypes default to the model's in DeepSpeed.
    config = RunConfig.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "vocab_size": 16,
                "num_heads": 2,
                "num_experts": 4,
                "num_active_experts": 2,
                "expert_dim": 8,
            },
            "parallel": {"pipeline": 2, "data": 2, "expert": 2},
            "schedule": {"name": "1f1b", "num_microbatches": 4},
            "data": {"sequences_per_microbatch": 3},
            "train": {"precision": "bf16"},
            "deepspeed": {"csv_monitor": {"enabled": False}},
        }
    )
    options = engine_config(config)
    assert options["train_batch_size"] == 24
    assert options["communication_data_type"] == "fp32"
    assert options["data_types"] == {"grad_accum_dtype": "fp32"}
    assert options["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert options["bf16"] == {"enabled": True}
    assert options["csv_monitor"] == {"enabled": False}
