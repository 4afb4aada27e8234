"""The settings of a run that is small enough to be started by many tests, on top of configs/tiny.yaml."""

SMALL_RUN = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.head_dim=16",
    "model.value_dim=16",
    "model.rope_dim=8",
    "model.kv_rank=16",
    "model.num_experts=4",
    "model.expert_dim=16",
    "data.sequence_length=32",
    "schedule.num_microbatches=4",
    "observe.metrics_port=0",
    "train.validate_every=0",
    "train.validation_batches=1",
)
