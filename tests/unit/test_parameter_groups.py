import torch
from torch import nn

from mhc_dist.optim.parameter_groups import cast_to_bf16, parameter_groups


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.phi = nn.Parameter(torch.ones(2, 3))
        self.phi.keep_fp32 = True  # type: ignore[attr-defined]
        self.experts = nn.Parameter(torch.ones(4, 3, 3))
        self.experts.is_expert = True  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("bias_E", torch.zeros(4))


def test_matrices_decay_vectors_do_not_and_experts_stand_apart() -> None:
    # Oracle: the rule, applied by hand to one parameter of each kind.
    groups = parameter_groups(Mixed().named_parameters())
    assert [(group.names, group.decays, group.is_expert) for group in groups] == [
        (("weight", "phi"), True, False),
        (("gain",), False, False),
        (("experts",), True, True),
    ]


def test_a_flat_buffer_has_one_dtype() -> None:
    # Oracle: the same parameters after the cast; phi stays fp32, buffers are not touched.
    module = Mixed()
    cast_to_bf16(module)
    groups = parameter_groups(module.named_parameters())
    assert [(group.names, group.dtype) for group in groups] == [
        (("weight",), torch.bfloat16),
        (("phi",), torch.float32),
        (("gain",), torch.bfloat16),
        (("experts",), torch.bfloat16),
    ]
    assert str(groups[1]) == "dense parameters with weight decay in float32"
    assert module.bias_E.dtype == torch.float32
