"""Stochastic rounding: unbiased, between the two neighbours, reproducible, and what it is for."""

import torch
from contract import copies, make_params, train, values
from torch import nn

from butterfly_opt import Butterfly
from butterfly_opt.rounding import round_stochastically


def write_stochastic_(param: torch.Tensor, update: torch.Tensor, **key: int) -> None:
    param.copy_(round_stochastically(param.float() + update, stream=key["stream"], step=torch.tensor(key["step"])))


def test_rounds_to_a_neighbour_without_bias() -> None:
    start = torch.full((200_000,), 1.0, dtype=torch.bfloat16)
    unit = 2.0**-7
    param = start.clone()
    write_stochastic_(param, torch.full((200_000,), 0.3 * unit), stream=3, step=5)
    assert set(param.float().unique().tolist()) == {1.0, 1.0 + unit}
    # Standard deviation of the mean: 0.46 / sqrt(200,000) = 0.001 units.
    assert abs((param.float() - 1).mean().item() / unit - 0.3) < 0.005


def test_exact_values_stay_and_signs_are_symmetric() -> None:
    param = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-130], dtype=torch.bfloat16)
    before = param.clone()
    write_stochastic_(param, torch.zeros(5), stream=0, step=0)
    assert torch.equal(param, before)
    negative = torch.full((100_000,), -1.0, dtype=torch.bfloat16)
    write_stochastic_(negative, torch.full((100_000,), -0.25 * 2.0**-7), stream=0, step=0)
    assert abs((-1 - negative.float()).mean().item() * 2**7 - 0.25) < 0.007


def test_non_finite_values_stay_what_they_are() -> None:
    param = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=torch.bfloat16)
    write_stochastic_(param, torch.zeros(3), stream=0, step=0)
    assert param[:2].tolist() == [float("inf"), float("-inf")]
    assert param[2].isnan()


def test_streams_and_steps_are_independent() -> None:
    def draw(**key: int) -> torch.Tensor:
        param = torch.ones(4096, dtype=torch.bfloat16)
        write_stochastic_(param, torch.full((4096,), 2.0**-8), **{"stream": 0, "step": 0, **key})
        return (param > 1).float()

    reference = draw()
    assert torch.equal(reference, draw())
    for key in ({"stream": 1}, {"stream": 1 << 16}, {"step": 1}):
        agreement = (draw(**key) == reference).float().mean().item()
        assert abs(agreement - 0.5) < 0.04, key


def test_no_two_parameters_of_an_optimizer_share_random_bits() -> None:
    """Of one shape in one group, of several lengths, in two groups."""
    params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (4096, 4096, 5000, 4096)]
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    opt = Butterfly(groups, lr=2.0**-9, stochastic_rounding=True)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    drawn = [param[:4096].detach() < 1 for param in params]
    for i, left in enumerate(drawn):
        for right in drawn[:i]:
            assert 0.35 < (left == right).float().mean().item() < 0.65


def test_tiny_updates_arrive_only_with_it() -> None:
    """A constant gradient at an lr of a fiftieth of a unit in the last place."""
    moved = []
    for rounding in (False, True):
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        opt = Butterfly([param], lr=2.0**-8 / 50, stochastic_rounding=rounding)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            opt.step()
        moved.append(1 - param.detach().float().mean().item())
    assert moved[0] == 0.0
    assert moved[1] > 0.5 * 100 * 2.0**-8 / 50


def test_a_resumed_run_rounds_alike() -> None:
    """Also of two tensors of one shape, which share their operations but no random bits."""
    params = make_params(((6, 5), (6, 5), (4,)), dtype=torch.bfloat16)
    opt = Butterfly(params, stochastic_rounding=True)
    train(opt, params, range(5))
    twins = copies(params)
    other = Butterfly(twins, stochastic_rounding=True)
    other.load_state_dict(opt.state_dict())
    train(opt, params, range(5, 10))
    train(other, twins, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(values(params), values(twins), strict=True))


def test_other_dtypes_are_written_as_ever() -> None:
    runs = []
    for rounding in (False, True):
        params = make_params()
        train(Butterfly(params, stochastic_rounding=rounding), params, range(3))
        runs.append(values(params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
