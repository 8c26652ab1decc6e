"""Butterfly Gaussians against dense ones: `python -m experiments.bench_normal [--root DIR] [--output FILE]`.

Two tables, printed as Markdown, and as CSV rows to a file:

* time of log-densities and bytes of the model at n = 64 ... 4096, float32, beside
  `torch.distributions.MultivariateNormal` and scikit-learn's `GaussianMixture` of one component;
* held-out log-likelihood, nats an image, of `ButterflyMixture` and `GaussianMixture` (full, diagonal) on digits and
  MNIST, the latter in torchvision's layout under `--root` (skipped where it is not there). A pixel of level l gets
  the value (l + u) / number of levels, u uniform in [0, 1): without that noise a density of discrete values has no
  upper bound (L. Theis et al., arXiv:1511.01844, section 3.1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import MultivariateNormal

from butterfly_opt import Basis, RotatedDiagonal, Rotation
from butterfly_opt.mixture import ButterflyMixture
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.rotation import MAX_DENSE_LENGTH
from experiments.benchmarking import RowWriter, environment, measure, note
from experiments.config import ConfigError, DatasetConfig
from experiments.data import Dataset, load_dataset

SIZES = (64, 256, 1024, 4096)
SAMPLES = 256
"""Samples in one call of log_prob."""
COMPONENTS = 10
DENSITY_COLUMNS = ("n", "model", "prepare_ms", "log_prob_ms", "p20_ms", "p80_ms", "model_bytes")
LIKELIHOOD_COLUMNS = ("data", "samples", "model", "reg_covar", "train", "held_out", "parameters", "iterations", "fit_s")
Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Density:
    """A Gaussian to time: what builds it and returns its log-density, and the numbers that it holds."""

    name: str
    prepare: Callable[[], Callable[[], object]]
    numbers: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Images as vectors, and the mixtures to fit to them."""

    name: str
    train: ndarray
    held_out: ndarray
    reg_covars: tuple[float, ...]
    butterflies: tuple[dict[str, Any], ...]


def densities(n: int) -> Iterator[Density]:
    """One Gaussian of dimension n in each form; the diagonal one is of course another."""
    generator = torch.Generator().manual_seed(0)
    loc, x = torch.randn(n, generator=generator), torch.randn(SAMPLES, n, generator=generator)
    d = 0.5 + torch.rand(n, generator=generator)
    for block, lead in ((2, 2), (64, 16)):
        rotation = Rotation.identity(n, block=block, lead=lead)
        rotation.start_(torch.randn(1, n, 2 * block, generator=generator))
        operator = RotatedDiagonal(Basis((n,), [(0, rotation)]), d)

        def butterfly(operator: RotatedDiagonal = operator) -> Callable[[], object]:
            return partial(ButterflyNormal(loc, operator, validate_args=False).log_prob, x)

        # Short axes are rotated by the dense Q, made once.
        dense_numbers = n * n if n <= MAX_DENSE_LENGTH else 0
        yield Density(f"ButterflyNormal, block {block}", butterfly, 2 * n + rotation.plan.numel + dense_numbers)
    dense = operator.to_dense()

    def multivariate() -> Callable[[], object]:
        return partial(MultivariateNormal(loc, dense, validate_args=False).log_prob, x)

    yield Density("MultivariateNormal", multivariate, n + n * n)
    yield Density("GaussianMixture(1, full)", partial(_sklearn, "full", loc, dense, x), n + n * n)
    yield Density("GaussianMixture(1, diag)", partial(_sklearn, "diag", loc, dense, x), 2 * n)


def _sklearn(kind: str, loc: Tensor, covariance: Tensor, x: Tensor) -> Callable[[], object]:
    """The log-density of a mixture of one component, its parameters given."""
    model = GaussianMixture(1, covariance_type=kind)
    model.weights_, model.means_ = torch.ones(1).numpy(), loc[None].numpy()
    if kind == "diag":
        model.precisions_cholesky_ = covariance.diagonal()[None].rsqrt().numpy()
    else:
        factor = torch.linalg.cholesky(covariance)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(loc)), upper=False)
        model.precisions_cholesky_ = inverse.T[None].numpy()
    return partial(model.score_samples, x.numpy())


def time_density(density: Density, n: int, *, milliseconds: int) -> Row:
    """The row of one Gaussian: milliseconds to build it and of one call of log_prob."""
    cpu = torch.device("cpu")
    log_prob = density.prepare()
    prepare = measure(density.prepare, cpu, milliseconds=milliseconds)
    timing = measure(log_prob, cpu, milliseconds=milliseconds)
    return {
        "n": n,
        "model": density.name,
        "prepare_ms": prepare.median * 1e3,
        "log_prob_ms": timing.median * 1e3,
        "p20_ms": timing.low * 1e3,
        "p80_ms": timing.high * 1e3,
        "model_bytes": 4 * density.numbers,
    }


def data_sets(root: str, samples: int) -> Iterator[Data]:
    """Digits, and MNIST where it is found."""
    digits = load_dataset(DatasetConfig(name="digits"))
    yield Data("digits", *_vectors(digits, samples), (1e-6, 1e-3), ({}, {"block": 2, "lead": 2}))
    try:
        mnist = load_dataset(DatasetConfig(name="mnist", root=root))
    except ConfigError as error:
        note(f"the rows of MNIST are skipped: {error}")
        return
    yield Data("MNIST", *_vectors(mnist, samples), (1e-3, 1e-2), ({},))


def _vectors(data: Dataset, samples: int) -> tuple[ndarray, ndarray]:
    """At most so many training and test images as vectors with entries in [0, 1), see the module docstring."""
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for split in (data.train, data.test):
        levels = split.images[:samples].flatten(1).double()
        noise = torch.rand(levels.shape, generator=generator, dtype=levels.dtype)
        vectors.append(((levels + noise) / (data.max_value + 1)).numpy())
    return vectors[0], vectors[1]


def likelihoods(data: Data) -> Iterator[Row]:
    """The rows of one data set."""
    for reg_covar in data.reg_covars:
        models: list[tuple[str, ButterflyMixture | GaussianMixture]] = [
            (f"GaussianMixture({kind})", GaussianMixture(COMPONENTS, covariance_type=kind, reg_covar=reg_covar,
                                                         random_state=0))
            for kind in ("diag", "full")
        ]  # fmt: skip
        for options in data.butterflies:
            name = f"ButterflyMixture({', '.join(f'{key}={value}' for key, value in options.items())})"
            model = ButterflyMixture(COMPONENTS, reg_covar=reg_covar, random_state=0, **options)
            models.append((name, model))
        for name, model in models:
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(data.train)
            seconds = time.perf_counter() - start
            yield {
                "data": data.name,
                "samples": len(data.train),
                "model": name,
                "reg_covar": reg_covar,
                "train": model.score(data.train),
                "held_out": model.score(data.held_out),
                "parameters": model._n_parameters(),
                "iterations": model.n_iter_,
                "fit_s": seconds,
            }


def print_table(columns: Sequence[str], rows: Iterator[Row], writer: RowWriter | None) -> None:
    """Prints rows as they come, as Markdown, and writes them."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)
        if writer is not None:
            writer.write(row)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_normal", description="Butterfly Gaussians.")
    parser.add_argument("--root", default=DatasetConfig.root, help="folder of MNIST, in torchvision's layout")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="dimensions to time")
    parser.add_argument("--samples", type=int, default=2000, help="at most so many training and test images")
    parser.add_argument("--milliseconds", type=int, default=500, help="time to spend on the samples of a row")
    arguments = parser.parse_args(argv)
    machine = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value))
    with contextlib.ExitStack() as stack:
        writer = None
        if arguments.output is not None:
            file = stack.enter_context(arguments.output.open("w", encoding="utf-8", newline=""))
            columns = dict.fromkeys((*DENSITY_COLUMNS, *LIKELIHOOD_COLUMNS))
            writer = RowWriter(file, list(columns), machine)
        timed = (
            time_density(density, n, milliseconds=arguments.milliseconds)
            for n in arguments.sizes
            for density in densities(n)
        )
        print_table(DENSITY_COLUMNS, timed, writer)
        fitted = (row for data in data_sets(arguments.root, arguments.samples) for row in likelihoods(data))
        print_table(LIKELIHOOD_COLUMNS, fitted, writer)


if __name__ == "__main__":
    main()
