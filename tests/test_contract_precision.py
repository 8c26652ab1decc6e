"""butterfly_opt.Butterfly: parameters of half precision.

Oracle: the dtypes DESIGN.md promises.
"""

from typing import Any

import pytest
import torch
from contract import build, every_mode, make_params, snapshot, through_state_dict, train
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_mode
def test_state_of_half_precision_parameters_is_float32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(dtype=dtype)
    opt = build(params, **{**options, "lr": 0.01})
    train(opt, params, range(8))
    resumed, new = through_state_dict(opt, params, options)
    train(resumed, new, range(8, 12))
    for optimizer in (opt, resumed):
        tensors = [v for state in snapshot(optimizer) for v in state.values() if isinstance(v, Tensor)]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert {param.dtype for param in new} == {dtype}
