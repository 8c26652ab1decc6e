"""``Butterfly.diagnostics``: plain numbers, right on cases that can be computed by hand."""

import json

import pytest
import torch
from contract import make_params, train
from torch import nn

from butterfly_opt import Butterfly
from butterfly_opt.diagnostics import off_diagonal_share


def test_plain_numbers_for_every_group_and_tensor() -> None:
    params = make_params()
    opt = Butterfly(
        [{"params": [("a.weight", params[0]), ("a.bias", params[1])]}, {"params": [("b.weight", params[2])]}],
        lr=1e-2,
        refit_steps=1,
    )
    assert opt.diagnostics()[0] == {"steps": 0, "nonfinite_steps": 0, "restarts": 0, "state_bytes": 0, "tensors": []}
    train(opt, params, range(12))
    groups = opt.diagnostics()
    json.dumps(groups)
    assert [tensor["name"] for group in groups for tensor in group["tensors"]] == ["a.weight", "a.bias", "b.weight"]
    assert groups[0]["steps"] == 12
    weight, bias = groups[0]["tensors"]
    assert len(weight["angle_change"]) == len(weight["off_diagonal"]) == 2
    assert all(0 < change < 0.5 for change in weight["angle_change"])
    assert "angle_change" not in bias
    saved = opt.state_dict()["state"].values()
    tensors = [value for state in saved for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(group["state_bytes"] for group in groups) == sum(t.numel() * t.element_size() for t in tensors)


def test_no_change_of_angles_is_known_before_the_first_refit() -> None:
    params = make_params()
    opt = Butterfly(params)
    train(opt, params, range(1))
    assert all("angle_change" not in tensor for tensor in opt.diagnostics()[0]["tensors"])


def test_curvature_and_noise_of_a_quadratic() -> None:
    curvature = torch.logspace(-1, 1, 20)
    param = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    opt = Butterfly([param], lr=1e-2, betas=(0.9, 0.9), refit_steps=0)
    for _ in range(300):
        param.grad = curvature * param.detach()
        opt.step()
    (tensor,) = opt.diagnostics()[0]["tensors"]
    expected = torch.quantile(curvature, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(torch.tensor(tensor["curvature_quantiles"]), expected, rtol=0.05, atol=0)

    noisy = nn.Parameter(torch.zeros(400))
    opt = Butterfly([noisy], lr=1e-3, diagonal="innovation")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        noisy.grad = 3 * torch.randn(400, generator=generator)
        opt.step()
    # The innovation g - gbar has variance 1 + (1 - beta1) / (1 + beta1).
    assert abs(opt.diagnostics()[0]["tensors"][0]["noise_quantiles"][1] / (3 * (1 + 0.1 / 1.9) ** 0.5) - 1) < 0.05


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.1), (0.9, 0.6, 1.0)])
def test_off_diagonal_energy_from_sketches(share: float, low: float, high: float) -> None:
    """Covariance I plus one strong direction spread over all coordinates, or on a single one."""
    generator = torch.Generator().manual_seed(0)
    n, columns, found = 64, 8, []
    direction = torch.ones(n) / n**0.5 if share else torch.eye(n)[0]
    for _ in range(200):
        noise = torch.randn(n, columns, generator=generator)
        strong = 30 * direction[:, None] * torch.randn(1, columns, generator=generator)
        found.append(off_diagonal_share((noise + strong) / columns**0.5).item())
    assert low <= sum(found) / len(found) <= high


def test_skipped_steps_are_counted_and_warned_of_once() -> None:
    params = make_params()
    opt = Butterfly(params, refit_steps=1, capturable=True)
    train(opt, params, range(2))
    params[0].grad = torch.full_like(params[0], float("nan"))
    opt.step()
    with pytest.warns(UserWarning, match="1 steps of tensors were skipped"):
        groups = opt.diagnostics()
    assert groups[0]["nonfinite_steps"] == 1
    assert [tensor["nonfinite_steps"] for tensor in groups[0]["tensors"]] == [1, 0, 0]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.diagnostics()
