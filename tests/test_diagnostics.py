"""``Butterfly.diagnostics``: plain numbers, right on cases that can be computed by hand."""

import json
import warnings

import pytest
import torch
from contract import make_params, train
from torch import nn

from butterfly_opt import Butterfly
from butterfly_opt.diagnostics import off_diagonal_share
from butterfly_opt.plan import make_plan
from butterfly_opt.rotation import Rotation


@pytest.mark.parametrize("diagonal", ["innovation", "secant"])
def test_plain_numbers_for_every_group_and_tensor(diagonal: str) -> None:
    params = make_params()
    opt = Butterfly(
        [{"params": [("a.weight", params[0]), ("a.bias", params[1])]}, {"params": [("b.weight", params[2])]}],
        lr=1e-2,
        diagonal=diagonal,
    )
    assert opt.diagnostics()[0] == {"steps": 0, "nonfinite_steps": 0, "state_bytes": 0, "tensors": []}
    train(opt, params, range(12))
    groups = opt.diagnostics()
    json.dumps(groups)
    assert [tensor["name"] for group in groups for tensor in group["tensors"]] == ["a.weight", "a.bias", "b.weight"]
    assert groups[0]["steps"] == 12
    weight, bias = groups[0]["tensors"]
    assert (weight["shape"], bias["shape"]) == ((6, 5), (4,))
    assert len(weight["off_diagonal"]) == 2
    assert all(0 <= share < 0.5 for share in weight["off_diagonal"])
    assert "off_diagonal" not in bias
    assert ("curvature_quantiles" in weight) == ("curvature_quantiles" in bias) == (diagonal == "secant")
    assert len(weight["noise_quantiles"]) == 3
    assert [tensor["steps"] for group in groups for tensor in group["tensors"]] == [12, 12, 12]
    saved = opt.state_dict()["state"].values()
    tensors = [value for state in saved for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(group["state_bytes"] for group in groups) == sum(t.numel() * t.element_size() for t in tensors)


def test_curvature_and_noise_of_a_quadratic() -> None:
    curvature = torch.logspace(-1, 1, 20)
    param = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0)))
    # Short steps: what has arrived moves no more.
    opt = Butterfly([param], lr=5e-3, betas=(0.9, 0.8), diagonal="secant")
    for _ in range(100):
        param.grad = curvature * param.detach()
        opt.step()
    (tensor,) = opt.diagnostics()[0]["tensors"]
    expected = torch.quantile(curvature, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(torch.tensor(tensor["curvature_quantiles"]), expected, rtol=0.05, atol=0)

    noisy = nn.Parameter(torch.zeros(400))
    opt = Butterfly([noisy], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        noisy.grad = 3 * torch.randn(400, generator=generator)
        opt.step()
    # The innovation g - gbar has variance 1 + (1 - beta1) / (1 + beta1).
    assert abs(opt.diagnostics()[0]["tensors"][0]["noise_quantiles"][1] / (3 * (1 + 0.1 / 1.9) ** 0.5) - 1) < 0.05


def test_off_diagonal_energy() -> None:
    """One group: of ``[[2, 1], [1, 2]]`` 2 / 10 lies off the diagonal, and nothing in its eigenbasis."""
    plan = make_plan(2, 4, 2)
    moments = torch.tensor([[2.0, 1.0, 1.0, 2.0]])
    root = 0.5**0.5
    for matrices, share in (([1.0, 0.0, 0.0, 1.0], 0.2), ([root, -root, root, root], 0.0)):
        assert off_diagonal_share(Rotation(plan, torch.tensor([matrices]), moments)) == pytest.approx(share, abs=1e-6)
    assert off_diagonal_share(Rotation.identity(50, block=8, lead=2)) == 0.0


def test_refits_lower_the_off_diagonal_energy() -> None:
    """Gradients with one strong direction that no coordinate has: found by the basis, which says so."""
    generator = torch.Generator().manual_seed(0)
    direction = nn.functional.normalize(torch.randn(40, generator=generator), dim=0)
    shares = []
    for refit_every in (2, 10**9):
        param = nn.Parameter(torch.zeros(40, 30))
        opt = Butterfly([param], lr=1e-3, block=8, lead=2, refit_every=refit_every)
        for _ in range(160):
            noise = torch.randn(40, 30, generator=generator)
            param.grad = noise + 5 * direction[:, None] * torch.randn(30, generator=generator)
            opt.step()
            if refit_every > 2:
                opt.state[param]["rotation0"].copy_(Rotation.identity(40, block=8, lead=2).matrices)
        shares.append(opt.diagnostics()[0]["tensors"][0]["off_diagonal"][0])
    print(f"share off the diagonal: fitted {shares[0]:.3f}, identity {shares[1]:.3f}")
    assert shares[0] < 0.5 * shares[1]


def test_skipped_steps_are_counted_and_warned_of_once() -> None:
    params = make_params()
    opt = Butterfly(params, capturable=True)
    train(opt, params, range(2))
    params[0].grad = torch.full_like(params[0], float("nan"))
    opt.step()
    with pytest.warns(UserWarning, match="1 tensors had a gradient that is not finite, and their step was skipped"):
        groups = opt.diagnostics()
    assert groups[0]["nonfinite_steps"] == 1
    assert [tensor["nonfinite_steps"] for tensor in groups[0]["tensors"]] == [1, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.diagnostics()
