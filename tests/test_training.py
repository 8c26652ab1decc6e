"""Whole training runs: Butterfly against Adam, against itself without rotation, and Newton steps.

Oracle: torch.optim.Adam on the same batches and initial weights, each optimizer at its best learning
rate of a small grid, linear warm-up then linear decay.
"""

import functools
import itertools
import statistics

import pytest
import torch
from sklearn.datasets import load_digits

from butterfly_opt import Butterfly
from butterfly_opt.rotation import Rotation
from experiments import full_batch

STEPS = 150
WARMUP = 20


def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32)


def autoencoder_losses(make, lr, seed, steps=STEPS, *, max_norm=None, bad_steps=()):
    """Training losses of a digits autoencoder 64-48-12-48-64, batch 128; gradients clipped by norm, some NaN."""
    torch.manual_seed(seed)
    widths = [64, 48, 12, 48, 64]
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.Tanh()]
    network = torch.nn.Sequential(*layers[:-1])
    inputs, generator = digits(), torch.Generator().manual_seed(seed + 1)
    optimizer = make(network.parameters(), lr)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
        batch = inputs[torch.randint(len(inputs), (128,), generator=generator)]
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(batch), batch) * 64
        loss.backward()
        if step in bad_steps:
            network[step % len(layers) // 2 * 2].weight.grad[0, 0] = float("nan")
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def best_final(make, grid, seed, steps=STEPS, **options):
    """Mean loss of the last 15 steps at the best learning rate."""
    return min(statistics.mean(autoencoder_losses(make, lr, seed, steps, **options)[-15:]) for lr in grid)


@functools.cache
def adams(seed, steps, max_norm=None):
    make = functools.partial(torch.optim.Adam, betas=(0.9, 0.99))
    return best_final(lambda p, lr: make(p, lr=lr), (1e-2, 2e-2, 4e-2), seed, steps, max_norm=max_norm)


@functools.cache
def ours(seed, structure="axes", max_norm=None):
    return best_final(lambda p, lr: Butterfly(p, lr=lr, structure=structure), (1e-2, 2e-2), seed, max_norm=max_norm)


@pytest.mark.parametrize(("structure", "seed"), [("axes", 0), ("axes", 1), ("axes", 2), ("flat", 0)])
def test_butterfly_reaches_adams_loss_in_fewer_steps(structure, seed):
    """At STEPS steps Butterfly is below Adam's loss at twice as many, by a wide margin."""
    adam, found = adams(seed, 2 * STEPS), ours(seed, structure)
    print(f"{structure}, seed {seed}: Butterfly {found:.3f} at {STEPS}, Adam {adam:.3f} at {2 * STEPS} steps")
    assert found < {"axes": 0.85, "flat": 0.9}[structure] * adam


@pytest.mark.parametrize("seed", [0, 1])
def test_the_rotation_is_what_pays(seed):
    """Against itself with rotations that stay the identity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotation, "start_", lambda *_: None)
        patch.setattr(Rotation, "refit_", lambda *_: None)
        plain = best_final(lambda p, lr: Butterfly(p, lr=lr), (1e-2, 2e-2, 4e-2), seed)
    print(f"seed {seed}: rotated {ours(seed):.3f}, without rotation {plain:.3f}")
    assert ours(seed) < 0.85 * plain


def test_clipping_by_norm_keeps_the_advantage():
    """The bound is near the median norm of the gradients: rescaled steps bend the identity behind the pairs."""
    adam, found = adams(0, 2 * STEPS, max_norm=2), ours(0, max_norm=2)
    print(f"clipped: Butterfly {found:.3f} at {STEPS}, Adam {adam:.3f} at {2 * STEPS} steps")
    assert found < 0.85 * adam


@pytest.mark.filterwarnings("ignore:.*their step was skipped")
def test_training_recovers_from_bad_gradients():
    """Ten steps, each with a NaN in one layer: the end is as good as that of other seeds."""
    unharmed = [ours(seed) for seed in (0, 1, 2)]
    harmed = best_final(lambda p, lr: Butterfly(p, lr=lr), (2e-2,), 0, bad_steps=range(25, 125, 10))
    print(f"harmed {harmed:.3f}, unharmed {unharmed}")
    assert harmed < max(unharmed) + (max(unharmed) - min(unharmed))


def test_newton_goes_on_after_a_rate_of_zero() -> None:
    """As a schedule may have it: a step of no length does not bound the next one."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Butterfly([weight], lr=1.0, diagonal="newton", structure="flat")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.square() * torch.tensor([1.0, 3.0, 10.0])).sum()
        loss.backward()
        return loss

    for lr in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        before = weight.detach().clone()
        optimizer.step(closure)
        assert torch.equal(before, weight) == (lr == 0.0)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0])
def test_newton_steps_stay_finite_where_products_of_gradients_underflow(scale):
    for seed in range(3):
        x = torch.randn(10, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        h = scale * torch.linspace(1, 30, 10)
        optimizer = Butterfly([x], lr=1.0, diagonal="newton", block=16, lead=2)

        def closure(x=x, h=h, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 0.5 * (h * x * x).sum()
            loss.backward()
            return loss

        for _ in range(120):
            optimizer.step(closure)
        assert torch.isfinite(x).all()


def test_newton_needs_fewer_gradients_than_adam_and_momentum():
    """Digits logistic regression, gradients to 1e-4: 44, more than 300, 162."""

    def evaluations(make, limit):
        return full_batch.run(full_batch.digits(hidden=(), l2=0.01), make, limit).evaluations() or limit

    found = evaluations(lambda p: Butterfly(p, lr=1.0, diagonal="newton", structure="flat"), 90)
    adam = evaluations(lambda p: torch.optim.Adam(p, lr=0.03), 170)
    momentum = evaluations(lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9), 170)
    print(f"Butterfly {found}, Adam {adam}, momentum {momentum}")
    assert found < 0.4 * min(adam, momentum)


def test_newton_needs_fewer_gradients_than_quasi_newton_methods():
    """The same in one dense block: 28; torch's L-BFGS 36, SciPy's BFGS, which knows as much, 50."""

    def problem():
        return full_batch.digits(hidden=(), l2=0.01)

    newton = functools.partial(Butterfly, lr=1.0, diagonal="newton", structure="flat", block=650, lead=16)
    ours = full_batch.run(problem(), newton, 45).evaluations()
    theirs = full_batch.run(problem(), functools.partial(torch.optim.LBFGS, max_iter=1), 45).evaluations()
    bfgs = full_batch.run_bfgs(problem(), 60).evaluations()
    print(f"Butterfly {ours}, L-BFGS {theirs}, BFGS {bfgs}")
    assert ours < min(theirs, bfgs)


def test_full_batch_table(capsys):
    full_batch.main(["logistic", "--evaluations", "6"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(full_batch.contenders(650)) + 1
    assert all("more than 6" in line for line in lines[2:])
    for wrong in (["pinn", "--l2", "1"], ["mlp", "--l2", "nan"], ["mlp", "--evaluations", "2"], []):
        with pytest.raises(SystemExit):
            full_batch.main(wrong)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_newton_converges_to_rounding(dtype: torch.dtype, least: float) -> None:
    """Near a minimum a loss falls by less than its rounding: steps are not halved for that."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator, dtype=dtype)
    targets = torch.randint(3, (60,), generator=generator)
    weight = torch.nn.Parameter(torch.zeros(3, 8, dtype=dtype))
    optimizer = Butterfly([weight], lr=1.0, diagonal="newton", structure="flat")
    norms: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # As of a large sum of losses, most of which does not change.
        loss = 10 + torch.nn.functional.cross_entropy(inputs @ weight.T, targets) + 0.005 * weight.square().sum()
        loss.backward()
        norms.append(float(weight.grad.norm()))
        return loss

    for _ in range(60):
        optimizer.step(closure)
    assert norms[-1] < least * norms[0]
    assert len(norms) < 80
