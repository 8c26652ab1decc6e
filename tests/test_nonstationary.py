"""experiments.nonstationary, and what a comparison does with a score. Oracles: returns and targets written out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import measure
from experiments.config import Component, ConfigError
from experiments.nonstationary import DQN, GAN, PPO, CartPoles, energy_distance, greedy_return
from experiments.problems import build_problem
from experiments.suite import build_run, load_suite, plan

CPU = torch.device("cpu")
TINY = """
seeds: [0, 1, 2]
lr_grid: {factor: 10, points: 3, max_points: 3, seeds: 2}
baselines: [adam]
target: adam
tasks:
  task: {problem: {name: gan}, steps: 3}
optimizers:
  adam: {optimizer: {name: Adam}, lr: 1e-3}
"""
gymnasium = pytest.importorskip("gymnasium")


def test_episodes_follow_each_other_and_their_lengths_are_the_returns() -> None:
    poles = CartPoles(2, seed=3)
    lone = gymnasium.make("CartPole-v1")
    state, _ = lone.reset(seed=3001)
    length, ended = 0, torch.zeros(2)
    while not ended[1]:
        torch.testing.assert_close(poles.states[1], torch.from_numpy(state))
        arrived, failed, ended = poles.step([0, 1])
        state, *_ = lone.step(1)
        torch.testing.assert_close(arrived[1], torch.from_numpy(state))
        length += 1
    assert poles.returns[-1] == length < 20
    assert failed[1] == 1
    assert poles.states[1].abs().max() <= 0.05  # the next episode, near the middle
    poles.returns.clear()
    poles.returns.extend([100, 300])
    assert poles.score() == 2.5


class CutAtThree:
    """An environment whose episodes are cut after three steps, and never fail."""

    def reset(self, seed: int = 0) -> tuple[Any, dict[str, Any]]:
        self.count = 0
        return torch.zeros(4).numpy(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return torch.full((4,), float(self.count)).numpy(), 1.0, False, self.count == 3, {}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium, "make", lambda *arguments, **keywords: CutAtThree())


@pytest.mark.usefixtures("cut")
def test_an_episode_that_is_cut_is_no_failure() -> None:
    poles = CartPoles(1, seed=0)
    found = [poles.step([0]) for _ in range(6)]
    assert [float(arrived[0, 0]) for arrived, _, _ in found] == [1, 2, 3, 1, 2, 3]
    assert [float(failed) for _, failed, _ in found] == [0] * 6
    assert [float(ended) for _, _, ended in found] == [0, 0, 1, 0, 0, 1]
    assert list(poles.returns) == [3, 3]


@pytest.mark.usefixtures("cut")
def test_advantages_are_sums_within_an_episode() -> None:
    """With the critic at 5 everywhere every error is 1 + 0.99 * 5 - 5, discounted until the episode is cut."""
    problem = PPO(seed=0, device=CPU, width=4, count=1, horizon=4)
    for param in problem._critic.parameters():
        torch.nn.init.zeros_(param)
    torch.nn.init.constant_(list(problem._critic.parameters())[-1], 5.0)
    batches = [problem.next_batch() for _ in range(16)]
    error, decay = 1 + 0.99 * 5 - 5, 0.99 * 0.95
    wanted = [error * (1 + decay + decay**2), error * (1 + decay), error, error]
    by_state = {(float(state[0, 0])): float(advantage) for state, _, _, advantage, _ in batches if state[0, 0] > 0}
    assert by_state == pytest.approx({1.0: wanted[1], 2.0: wanted[2]})
    at_start = sorted(float(advantage) for state, _, _, advantage, _ in batches[:4] if state[0, 0] == 0)
    assert at_start == pytest.approx(sorted([wanted[0], wanted[3]]))
    assert all(float(goal) == pytest.approx(float(advantage) + 5) for _, _, _, advantage, goal in batches)


@pytest.mark.usefixtures("cut")
def test_the_goal_of_q_learning() -> None:
    problem = DQN(seed=0, device=CPU, width=4, batch_size=3, warmup=8)
    batch = problem.next_batch()
    states, action, failed, arrived = batch.split([4, 1, 1, 4], dim=1)
    assert torch.equal(arrived[:, :1], states[:, :1] + 1)
    failed[0] = 1
    goal = 1 + 0.99 * (1 - failed) * problem._target(arrived).amax(1, keepdim=True)
    taken = torch.stack([problem.model(state)[int(a)] for state, a in zip(states, action, strict=True)])
    wanted = torch.nn.functional.smooth_l1_loss(taken[:, None], goal)
    torch.testing.assert_close(problem.loss(batch), wanted)
    torch.autograd.backward(problem.loss(batch))
    assert all(param.grad is None for param in problem._target.parameters())


def test_the_greedy_return_is_that_of_the_policy() -> None:
    assert greedy_return(lambda states: torch.tensor([[1.0, 0.0]]).expand(len(states), 2), episodes=3) < 15

    def balance(states: torch.Tensor) -> torch.Tensor:
        lean = states[:, 2] + 0.5 * states[:, 3] + 0.05 * states[:, 0] + 0.1 * states[:, 1]
        return torch.stack([-lean, lean], 1)

    assert greedy_return(balance, episodes=3) == 500


def test_each_player_has_the_gradient_of_its_own_loss() -> None:
    problem = GAN(seed=0, device=CPU, width=8, batch_size=16)
    batch = problem.next_batch()
    torch.autograd.backward(problem.loss(batch))
    softplus = torch.nn.functional.softplus
    made = problem._generator(batch[1])
    judge = problem._discriminator
    own: Sequence[tuple[Any, torch.Tensor]] = [
        (problem._generator, softplus(-judge(made)).mean()),
        (judge, softplus(-judge(batch[0])).mean() + softplus(judge(made)).mean()),
    ]
    for player, loss in own:
        params = list(player.parameters())
        for param, grad in zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True):
            torch.testing.assert_close(param.grad, grad)


def test_energy_distance() -> None:
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    assert float(energy_distance(x, y)) == pytest.approx(2 * 1 - 1 - 0)
    assert float(energy_distance(x, x)) == pytest.approx(0)


@pytest.mark.parametrize("name", ["dqn", "ppo", "gan"])
def test_a_seed_decides_the_batches_and_the_score_is_recorded(
    name: str, suite_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"dqn": {"warmup": 50, "batch_size": 4}, "ppo": {"horizon": 40}, "gan": {"batch_size": 4}}[name]
    component = Component(name, {"width": 4, **small})
    first, second = (build_problem(component, seed=1, device=CPU) for _ in range(2))
    for one, other in zip(first.next_batch(), second.next_batch(), strict=True):
        torch.testing.assert_close(one, other)
    run = build_run(load_suite(suite_file(TINY)), "task", "adam", lr=1e-3, seed=0)
    scores = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(type(first), "score", lambda self: next(scores))
    result = measure.measure(type(run)(**{**vars(run), "problem": component}))
    assert (result.losses, result.final_loss, result.status) == ([3.0, 2.0, 1.0], 1.0, "ok")


def test_without_gymnasium_the_task_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match="CartPole needs gymnasium"):
        build_problem(Component("dqn"), seed=0, device=CPU)


def test_a_rate_counts_by_its_mean_over_the_seeds_of_the_search(suite_file: Callable[[str], Path]) -> None:
    suite = load_suite(suite_file(TINY))
    losses = {1e-4: (0.0, 9.0, 0.0), 1e-3: (3.0, 3.0, 9.0), 1e-2: (4.0, 4.0, 0.0)}
    found = plan(suite, lambda run: losses[run.lr][run.seed])
    assert found.best_rates["task", "adam"] == 1e-3
    assert sum(role == "search" for _, role in found.runs) == 6
    assert plan(suite, lambda run: None if run.seed else 1.0).num_to_come["task", "adam"] == 1
    with pytest.raises(ConfigError, match=r"lr_grid\.seeds must be from 1 to 3"):
        load_suite(suite_file(TINY), ["lr_grid.seeds=4"])
