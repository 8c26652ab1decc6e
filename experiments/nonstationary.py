"""Problems whose objective moves with the model: reinforcement learning on CartPole, and a small GAN.

Their losses say nothing about success, so each has a `score` beside it, lower is better: what a comparison ranks by.
Of reinforcement learning it is 500 (the longest episode) over the mean return of the last episodes, whose logarithm is
that of the return, and 1 at the best; of the GAN the energy distance between samples and data.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from experiments.config import ConfigError

LONGEST = 500
"""Steps after which an episode of CartPole-v1 ends; each gives a reward of 1."""


def tanh_mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Two hidden layers of one width."""
    hidden = (nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class CartPoles:
    """CartPole-v1 of gymnasium, some side by side on the CPU; an episode that ends is followed by the next.

    Attributes:
        states: what each policy sees now, `(count, 4)`.
        returns: of the last 20 episodes that ended.

    Raises:
        ConfigError: gymnasium is not installed.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise ConfigError(f"CartPole needs gymnasium (pip install gymnasium): {error}") from error
        self._environments = [gymnasium.make("CartPole-v1", disable_env_checker=True) for _ in range(count)]
        firsts = [item.reset(seed=1000 * seed + i)[0] for i, item in enumerate(self._environments)]
        self.states = torch.stack([torch.from_numpy(first) for first in firsts])
        self.returns: collections.deque[int] = collections.deque(maxlen=20)
        self._lengths = [0] * count

    def step(self, actions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Acts in each; returns the states arrived at `(count, 4)`, which of them are failures, which end an episode.

        An episode that is cut at its longest is no failure: its last state has a value.
        """
        arrived, failed, ended = [], [], []
        for i, (environment, action) in enumerate(zip(self._environments, actions, strict=True)):
            state, _, terminated, truncated, _ = environment.step(action)
            self._lengths[i] += 1
            arrived.append(torch.from_numpy(state))
            failed.append(terminated)
            ended.append(terminated or truncated)
        self.states = torch.stack(arrived)
        for i in (i for i, is_over in enumerate(ended) if is_over):
            self.returns.append(self._lengths[i])
            self._lengths[i] = 0
            self.states[i] = torch.from_numpy(self._environments[i].reset()[0])
        return torch.stack(arrived), torch.tensor(failed).float(), torch.tensor(ended).float()

    def score(self) -> float:
        """`LONGEST` over the mean of `returns`; infinite before the first."""
        return LONGEST / statistics.fmean(self.returns) if self.returns else float("inf")


@torch.no_grad()
def greedy_return(values: Callable[[Tensor], Tensor], *, episodes: int = 20) -> float:
    """The mean return of always the action of the largest value, over episodes of their own."""
    poles = CartPoles(episodes, seed=10_000)
    lengths = [0] * episodes
    for step in range(1, LONGEST + 1):
        _, _, ended = poles.step(values(poles.states).argmax(1).tolist())
        for i in ended.nonzero().flatten().tolist():
            lengths[i] = lengths[i] or step
        if all(lengths):
            break
    return statistics.fmean(lengths)


class DQN:
    """Deep Q-learning with a replay memory and a target network; Mnih et al., Nature 518 (2015).

    A gradient step comes after every `every` steps of the environment. Exploration falls from 1 to 0.05 over `explore`
    of them; the target network is replaced every `target_every` gradient steps.
    """

    metric_name = "return"

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        width: int = 128,
        batch_size: int = 128,
        every: int = 4,
        explore: int = 6000,
        target_every: int = 100,
        warmup: int = 1000,
        memory: int = 10_000,
    ) -> None:
        self._poles = CartPoles(1, seed=seed)
        self._generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model: nn.Module = tanh_mlp(4, 2, width).to(device)
        self._target = tanh_mlp(4, 2, width).to(device).requires_grad_(False)
        self._device, self._batch_size, self._every, self._explore = device, batch_size, every, explore
        self._target_every, self._warmup = target_every, warmup
        # Rows of state, action, failed, next state.
        self._memory = torch.empty(memory, 10)
        self._acted = self._drawn = 0

    @torch.no_grad()
    def _act(self) -> None:
        state = self._poles.states
        chance, choice = torch.rand(2, generator=self._generator).tolist()
        exploration = max(0.05, 1 - 0.95 * max(0, self._acted - self._warmup) / self._explore)
        greedy = chance >= exploration
        action = int(self.model(state.to(self._device)).argmax()) if greedy else int(2 * choice)
        arrived, failed, _ = self._poles.step([action])
        row = torch.cat([state[0], torch.tensor([float(action)]), failed, arrived[0]])
        self._memory[self._acted % len(self._memory)] = row
        self._acted += 1

    def next_batch(self) -> Tensor:
        """Acts, and draws transitions from the memory."""
        if self._drawn % self._target_every == 0:
            self._target.load_state_dict(self.model.state_dict())
        self._drawn += 1
        for _ in range(self._every if self._acted >= self._warmup else self._warmup):
            self._act()
        filled = min(self._acted, len(self._memory))
        rows = torch.randint(filled, (self._batch_size,), generator=self._generator)
        return self._memory[rows].to(self._device)

    def loss(self, batch: Tensor) -> Tensor:
        """Huber loss of the one-step error, discount 0.99."""
        states, action, failed, arrived = batch.split([4, 1, 1, 4], dim=1)
        with torch.no_grad():
            goal = 1 + 0.99 * (1 - failed) * self._target(arrived).amax(1, keepdim=True)
        return functional.smooth_l1_loss(self.model(states).gather(1, action.long()), goal)

    def score(self) -> float:
        """500 over the mean return of the last 20 episodes, exploration included."""
        return self._poles.score()

    def metric(self) -> float:
        """The mean return of 20 episodes without exploration."""
        return greedy_return(lambda states: self.model(states.to(self._device)))


class PPO:
    """Proximal policy optimization; Schulman et al., arXiv:1707.06347 (2017).

    `horizon` steps of `count` environments make a rollout, which is used in four epochs of four batches each. Gradients
    are not clipped.
    """

    metric_name = "return"

    def __init__(self, *, seed: int, device: torch.device, width: int = 64, count: int = 8, horizon: int = 128) -> None:
        self._poles = CartPoles(count, seed=seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._horizon = device, horizon
        torch.manual_seed(seed)
        self._actor, self._critic = tanh_mlp(4, 2, width), tanh_mlp(4, 1, width)
        with torch.no_grad():
            list(self._actor.parameters())[-2].mul_(0.01)  # both actions are as likely at first
        self.model: nn.Module = nn.ModuleList([self._actor, self._critic]).to(device)
        self._batches: Iterator[Sequence[Tensor]] = iter(())

    @torch.no_grad()
    def _rollout(self) -> Iterator[Sequence[Tensor]]:
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(self._horizon):
            states = self._poles.states.to(self._device)
            log_p = self._actor(states).log_softmax(1)
            actions = torch.multinomial(log_p.exp().cpu(), 1, generator=self._generator)
            arrived, failed, ended = (item.to(self._device) for item in self._poles.step(actions.flatten().tolist()))
            actions = actions.to(self._device)
            rows.append((states, actions, log_p.gather(1, actions), arrived, failed[:, None], ended[:, None]))
        states, actions, log_p, arrived, failed, ended = (torch.stack(item) for item in zip(*rows, strict=True))
        value = self._critic(states)
        error = 1 + 0.99 * (1 - failed) * self._critic(arrived) - value
        advantage = error
        for t in reversed(range(self._horizon - 1)):
            advantage[t] += 0.99 * 0.95 * (1 - ended[t]) * advantage[t + 1]
        known = [item.flatten(0, 1) for item in (states, actions, log_p, advantage, advantage + value)]
        for _ in range(4):
            order = torch.randperm(len(known[0]), generator=self._generator).to(self._device)
            for part in order.chunk(4):
                yield [item[part] for item in known]

    def next_batch(self) -> Sequence[Tensor]:
        """States, actions, their log-probabilities, advantages and returns; of a new rollout where one is used up."""
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._rollout()
            batch = next(self._batches)
        return batch

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """The clipped surrogate, half the squared error of the critic, and a hundredth of the entropy."""
        states, actions, old, advantage, goal = batch
        log_p = self._actor(states).log_softmax(1)
        ratio = (log_p.gather(1, actions) - old).exp()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        loss: Tensor = 0.5 * functional.mse_loss(self._critic(states), goal) - surrogate - 0.01 * entropy
        return loss

    def score(self) -> float:
        """500 over the mean return of the last 20 episodes, of the policy as it is sampled."""
        return self._poles.score()

    def metric(self) -> float:
        """The mean return of 20 episodes, the likelier action each time."""
        return greedy_return(lambda states: self._actor(states.to(self._device)))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """`2 E|X - Y| - E|X - X'| - E|Y - Y'|` of two samples `(count, dims)`, >= 0."""
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


class GAN:
    """A generator and a discriminator on eight Gaussians on a circle, both stepped at once by the same optimizer.

    Non-saturating losses; Goodfellow et al., arXiv:1406.2661 (2014). Their sum is no function that falls: the gradient
    of each player is that of its own loss.
    """

    metric_name = "energy distance"

    def __init__(
        self, *, seed: int, device: torch.device, width: int = 128, latent: int = 16, batch_size: int = 256
    ) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._device, self._latent, self._batch_size = device, latent, batch_size
        torch.manual_seed(seed)
        self._generator, self._discriminator = tanh_mlp(latent, 2, width), tanh_mlp(2, 1, width)
        self.model: nn.Module = nn.ModuleList([self._generator, self._discriminator]).to(device)
        self._held_out = self._draw(2048)
        self._steps, self._score = 0, float("inf")

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Data of deviation 0.05 on the circle of radius 2, and latent numbers."""
        angle = torch.randint(8, (count,), generator=self._random) * (torch.pi / 4)
        centers = 2 * torch.stack([angle.cos(), angle.sin()], 1)
        data = centers + 0.05 * torch.randn(count, 2, generator=self._random)
        latent = torch.randn(count, self._latent, generator=self._random)
        return data.to(self._device), latent.to(self._device)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Fresh data and latent numbers."""
        return self._draw(self._batch_size)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The losses of both players, each with a gradient for its own parameters only."""
        data, latent = batch
        made = self._generator(latent)
        fixed: dict[str, Any] = {name: param.detach() for name, param in self._discriminator.named_parameters()}
        fooling = functional.softplus(-functional_call(self._discriminator, fixed, made)).mean()
        real, fake = self._discriminator(data), self._discriminator(made.detach())
        return functional.softplus(-real).mean() + functional.softplus(fake).mean() + fooling

    def score(self) -> float:
        """The energy distance to 512 held-out data, measured every 20 steps."""
        if self._steps % 20 == 0:
            self._score = self._distance(512)
        self._steps += 1
        return self._score

    def metric(self) -> float:
        """The energy distance to all held-out data."""
        return self._distance(None)

    @torch.no_grad()
    def _distance(self, count: int | None) -> float:
        data, latent = (item[:count] for item in self._held_out)
        return float(energy_distance(self._generator(latent), data))
