"""experiments.paper and its parts, at tiny settings. Oracles: numpy, scipy, dense matrices, finite differences.

Numbers that must hold are few: a planted butterfly is found, a random eigenbasis is not, a full covariance has the
largest training likelihood.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from scipy.stats import multivariate_normal

from experiments import paper, paper_covariance, paper_hessian, paper_synthetic
from experiments.config import ConfigError, DatasetConfig
from experiments.paper_covariance import CovarianceConfig, CovarianceRow
from experiments.paper_files import load
from experiments.paper_hessian import HessianConfig, HessianRow, ProblemConfig
from experiments.paper_models import Objective, digits_objectives
from experiments.paper_plans import PlanConfig
from experiments.paper_synthetic import SyntheticRow

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
PLANS = "{radix 2: {block: 2, lead: 2}, wide: {block: 16, lead: 4}}"
TINY = {
    "synthetic": ["sizes=[16,20]", "row_size=16", "rotations=2", f"plans={PLANS}"],
    "covariance": [f"plans={PLANS}"],
    "hessian": [
        "problems={mlp: {hidden: [2], l2: 0.01, damping: 0.1, lr: 0.01}, linear: {l2: 0.01, damping: 0.1, lr: 0.01}}",
        "checkpoints=[2,6]",
        "plans={ours: {block: 16, lead: 4}}",
    ],
}
ROWS = {"synthetic": SyntheticRow, "covariance": CovarianceRow, "hessian": HessianRow}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """The three commands, run once; their tables."""
    found = {}
    for name, overrides in TINY.items():
        folder = tmp_path_factory.mktemp("paper") / name
        assert paper.main([name, *overrides, f"run_dir={folder}"]) == 0
        assert {file.name for file in folder.iterdir()} == {"config.yaml", *(f"{name}.{end}" for end in END)}
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert min((folder / f"{name}.{end}").stat().st_size for end in ("png", "pdf")) > 8_000
        # The folder's own configuration starts the same run again.
        section, _ = paper.EXPERIMENTS[name]
        assert load(section, folder / "config.yaml", []) == load(section, paper.CONFIGS / f"{name}.yaml", overrides)
        with (folder / f"{name}.csv").open(newline="") as file:
            found[name] = list(csv.DictReader(file))
        assert list(found[name][0]) == [field.name for field in dataclasses.fields(ROWS[name])]
    return found


END = ("csv", "png", "pdf")


def test_every_config_loads() -> None:
    assert {path.stem for path in CONFIGS} >= set(paper.EXPERIMENTS)
    for path in CONFIGS:
        section, _ = paper.EXPERIMENTS[path.stem.partition("_")[0]]
        assert load(section, path, []).run_dir is None


def test_synthetic_finds_what_is_planted_and_not_what_is_random(tables: dict[str, list[dict[str, str]]]) -> None:
    table = tables["synthetic"]
    assert len(table) == 5 * 2 * (3 + 2)
    for row in table:
        error, flat = float(row["error"]), float(row["diagonal_error"])
        assert error <= flat
        if row["rotations"] == "0":
            assert (error, row["angles"]) == (flat, "0")
        elif (row["family"], row["plan"]) in (("planted", "radix 2"), ("wide", "wide")) and row["n"] == "16":
            assert error < 1e-10 < 0.2 < flat
        elif row["family"] == "haar" and row["plan"] == "radix 2":
            assert error > 0.2
    # Radix 2: 4 stages of 8 pairs; 20 coordinates have 10 + 10 + 8 + 8 + 4 pairs.
    # Wide: 16 coordinates are dense; 20 have two leaves of 10, less what is shared, and a root of 8.
    single = {(row["plan"], row["n"], row["angles"]) for row in table if row["rotations"] == "1"}
    wide = {("wide", "16", str(16 * 15 // 2)), ("wide", "20", str(2 * (45 - 6) + 28))}
    assert single == {("radix 2", "16", "32"), ("radix 2", "20", "40")} | wide
    in_a_row = [row for row in table if row["study"] == "rotations"]
    assert {(row["plan"], row["rotations"]) for row in in_a_row} == {(p, k) for p in ("radix 2", "wide") for k in "012"}


@pytest.mark.parametrize("family", paper_synthetic.FAMILIES)
def test_families_are_what_they_say(family: str) -> None:
    matrix = paper_synthetic.FAMILIES[family](64, torch.Generator().manual_seed(1)).double().numpy()
    values = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    if family == "low_rank":
        np.testing.assert_allclose(values[:8], np.linspace(1, 0.5, 8), atol=0.05)
        assert abs(values[8:]).max() < 0.05
        assert abs(values[8:]).max() > 0.02
    else:
        np.testing.assert_allclose(values, np.logspace(0, -3, 64), rtol=1e-2)


def test_covariance_table(tables: dict[str, list[dict[str, str]]]) -> None:
    table = tables["covariance"]
    by_model = {(row["model"], int(row["rank"])): row for row in table}
    train = {key: float(row["train_log_likelihood"]) for key, row in by_model.items()}
    full = train["full", 64]
    assert all(value <= full for value in train.values())
    assert float(by_model["full", 64]["error"]) == 0.0
    # 6 stages of 32 pairs; 4 leaves of 16, less what is shared, and a root of 16: about as many as 3 and 10 factors.
    for name, angles, rank in (("radix 2", 192, 3), ("wide", 4 * (120 - 6) + 120, 10)):
        ours, theirs = by_model[name, 0], by_model["factor analysis", rank]
        assert int(ours["numbers"]) == angles + 64
        assert int(theirs["numbers"]) == 64 * rank - rank * (rank - 1) // 2 + 64
        assert abs(int(ours["numbers"]) - int(theirs["numbers"])) < 40
        assert float(ours["error"]) < float(by_model["diagonal", 0]["error"])
        assert train[name, 0] > train["diagonal", 0]
    assert train["wide", 0] > train["radix 2", 0]


def test_models_of_a_covariance() -> None:
    rng = np.random.default_rng(0)
    samples = torch.from_numpy(rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6)))
    covariance = samples.T @ samples / 50
    expected = multivariate_normal(np.zeros(6), covariance.numpy()).logpdf(samples.numpy()).mean()
    assert paper_covariance.log_likelihood(samples, covariance) == pytest.approx(expected)
    # Factors and noise that are there are found.
    factors = torch.from_numpy(rng.standard_normal((8, 2)))
    truth = factors @ factors.T + torch.diag(torch.linspace(0.1, 0.5, 8, dtype=torch.float64))
    torch.testing.assert_close(paper_covariance.factor_analysis(truth, 2), truth, rtol=0.02, atol=0.02)
    components = paper_covariance.principal_components(truth, 2)
    torch.testing.assert_close(components.diagonal(), truth.diagonal())
    leading = components - torch.diag(components.diagonal())
    values, vectors = np.linalg.eigh(truth.numpy())
    expected_leading = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    np.testing.assert_allclose(leading.numpy(), expected_leading - np.diag(np.diag(expected_leading)), atol=1e-12)


def test_patches_are_cut_from_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pixel tells its place: a patch must be a window of it."""
    data = paper_covariance.load_dataset(DatasetConfig("digits"))
    places = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    split = dataclasses.replace(data.train, images=places.expand(40, 1, 8, 8), targets=torch.zeros(40))
    shown = dataclasses.replace(data, train=split, test=split, max_value=1)
    monkeypatch.setattr(paper_covariance, "load_dataset", lambda config: shown)
    config = CovarianceConfig(
        DatasetConfig("digits"), {"radix 2": PlanConfig(2, 2)}, patch=3, train_samples=30, test_samples=5
    )
    train, test = paper_covariance.image_vectors(config)
    assert (train.shape, test.shape) == ((30, 9), (5, 9))
    first = train[:, :1]
    window = torch.tensor([8.0 * row + column for row in range(3) for column in range(3)]).double()
    torch.testing.assert_close(train, first + window)
    assert len(first.unique()) > 5
    assert (first % 8).max() == 5


def test_hessian_table(tables: dict[str, list[dict[str, str]]]) -> None:
    table = tables["hessian"]
    assert len(table) == 2 * 2 * (3 + 2 * 5 + 1)
    assert sum(row["method"] == paper_hessian.PROBED for row in table) == 2 * 2
    assert {(row["step"], row["pairs"]) for row in table} == {(s, k) for s in "26" for k in ("exact", "path", "probes")}
    for row in table:
        assert math.isfinite(float(row["condition"]))
        assert float(row["condition"]) >= 1
        assert 0 < float(row["relative_error"]) < 10
    flat = [row for row in table if row["method"] == "multiple of I" and row["problem"] == "linear"]
    assert len(flat) == 2
    for row in flat:
        low, high = float(row["smallest"]), float(row["largest"])
        assert low == pytest.approx(0.01)
        assert float(row["condition"]) == pytest.approx((high + 0.1) / (low + 0.1), rel=1e-6)


def test_judge_against_dense_inverses() -> None:
    rng = np.random.default_rng(0)
    H, P = (x @ x.T + 0.1 * np.eye(5) for x in rng.standard_normal((2, 5, 5)))
    values, vectors = np.linalg.eigh(H)
    shift = 0.3 * np.eye(5)
    damped, inverse = np.linalg.inv(np.linalg.inv(P) + shift), np.linalg.inv(H + shift)
    found = paper_hessian.judge(torch.from_numpy(P), torch.from_numpy(values + 0.3), torch.from_numpy(vectors), 0.3)
    error = np.linalg.norm(damped - inverse) / np.linalg.norm(inverse)
    assert found == pytest.approx((error, reference.condition(damped, H + shift)))


def test_trackers_against_the_reference() -> None:
    """On a quadratic: dense BFGS by the formula, L-BFGS equal to it while it forgets nothing, a diagonal found."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 6))
    pairs = [(s, (x @ x.T) @ s) for s in rng.standard_normal((paper_hessian.MEMORY, 6))]
    expected = reference.bfgs_inverse(pairs)
    dense = paper_hessian._DenseBFGS(6)
    for s, y in pairs:
        dense.update(torch.from_numpy(s), torch.from_numpy(y))
    dense.update(torch.ones(6).double(), -torch.ones(6).double())  # negative curvature: skipped
    np.testing.assert_allclose(dense.dense().numpy(), expected, rtol=1e-8, atol=1e-10)
    # gamma is that of the last pair.
    s, y = pairs[-1]
    inverse = np.eye(6) * (s @ y) / (y @ y)
    for pair in pairs:
        inverse = reference.bfgs_update(inverse, *pair)
    limited = paper_hessian._LimitedBFGS(6)
    limited.update(torch.from_numpy(pairs[3][0]), torch.from_numpy(pairs[3][1]))  # forgotten
    for s, y in pairs:
        limited.update(torch.from_numpy(s), torch.from_numpy(y))
    np.testing.assert_allclose(limited.dense().numpy(), inverse, rtol=1e-8, atol=1e-10)
    diagonal = torch.tensor([1.0, 2.0, 5.0, 10.0]).double()
    flat = paper_hessian._Diagonal(4)
    for _ in range(20):
        step = torch.from_numpy(rng.standard_normal(4))
        flat.update(step, diagonal * step)
    torch.testing.assert_close(flat.dense(), torch.diag(1 / diagonal), rtol=1e-10, atol=0)


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_objective_and_its_derivatives(hidden: tuple[int, ...]) -> None:
    train, test = digits_objectives(hidden=hidden, l2=0.1)
    small = Objective(paper_covariance.load_dataset(DatasetConfig("digits")).test, hidden=hidden, l2=0.1)
    assert (len(train.inputs), len(test.inputs)) == (1437, 360)
    theta = torch.randn(small.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    layers = [torch.nn.Linear(*reversed(shape), dtype=torch.float64) for shape in small.shapes[::2]]
    for param, value in zip((p for layer in layers for p in layer.parameters()), small.parameters(theta), strict=True):
        param.data.copy_(value)
    model = torch.nn.Sequential(layers[0], *(m for layer in layers[1:] for m in (torch.nn.Tanh(), layer)))
    loss = torch.nn.functional.cross_entropy(model(small.inputs), small.targets)
    torch.testing.assert_close(small.loss(theta), loss + 0.05 * theta.square().sum())
    v, step = torch.randn(small.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-4
    ahead, behind = theta + step * v, theta - step * v
    slope = (small.loss(ahead) - small.loss(behind)) / (2 * step)
    torch.testing.assert_close(small.gradient(theta) @ v, slope, rtol=1e-5, atol=1e-7)
    curved = (small.gradient(ahead) - small.gradient(behind)) / (2 * step)
    torch.testing.assert_close(small.product(theta, v[None])[0], curved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.hessian(theta) @ v, small.product(theta, v[None])[0])
    mean = small.sample_gradients(theta).mean(0) + 0.1 * theta
    torch.testing.assert_close(mean, small.gradient(theta))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("synthetic", "families=[harr]", "unknown family 'harr'; did you mean 'haar'"),
        ("synthetic", "sizes=[1]", "sizes must be at least 2, got"),
        ("synthetic", "plans={}", "plans must name at least one butterfly, got none"),
        ("synthetic", "plans={mine: {block: 8, lead: 5}}", "Invalid lead value: 5, expected at most block // 2 = 4"),
        ("synthetic", "plans={mine: {block: 8, lead: 2, rotations: 0}}", "rotations must be at least 1, got 0"),
        ("synthetic", "sizez=[4]", "unknown key 'sizez'; did you mean 'sizes'"),
        ("covariance", "shrinkage=0.5", "leave out shrinkage=0.5"),
        ("covariance", "train_samples=1", "train_samples must be at least 2, got 1"),
        ("covariance", "patch=9", "patch must be at most 8, the side of the images, got 9"),
        ("hessian", "lead=64", "pairs need lead < block, got lead = block = 64"),
        ("hessian", "checkpoints=[3,2]", "checkpoints must be ascending"),
        ("hessian", "problems.logistic.lr=0.0", "problems.logistic.lr must be above 0, got 0.0"),
        ("hessian", "problems.logistic.damping=-1.0", "problems.logistic.damping must be at least 0, got -1.0"),
    ],
)
def test_mistakes_are_named(
    name: str, override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([name, override, f"run_dir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err


def test_shrinkage_has_bounds_and_a_used_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"shrinkage must be from 0 to 1, got 1\.5"):
        CovarianceConfig(DatasetConfig("digits"), {"radix 2": PlanConfig(2, 2)}, shrinkage=1.5)
    (tmp_path / "mine").touch()
    assert paper.main(["covariance", f"run_dir={tmp_path}"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_ctrl_c_leaves_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: HessianConfig, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(paper.EXPERIMENTS, "hessian", (HessianConfig, interrupted))
    assert paper.main(["hessian", f"run_dir={tmp_path / 'run'}"]) == 130
    assert "interrupted; the run folder" in capsys.readouterr().err


def test_the_path_is_adam_and_its_pairs_are_of_the_full_batch() -> None:
    problem = ProblemConfig(l2=0.1, damping=0.0, lr=0.02)
    config = HessianConfig({"logistic": problem}, checkpoints=[3], batch_size=16)
    objective, _ = digits_objectives(l2=0.1)
    before = objective.start(0)
    for step, theta, pairs in paper_hessian.path(objective, problem, config):
        s, y = pairs["path"]
        torch.testing.assert_close(s, theta - before)
        torch.testing.assert_close(y, objective.gradient(theta) - objective.gradient(before))
        probe, product = pairs["probes"]
        torch.testing.assert_close(product, objective.hessian(theta) @ probe)
        if step == 1:  # Adam's first step: lr a coordinate that has a gradient
            assert s.abs().max().item() == pytest.approx(0.02, rel=1e-4)
        before = theta.clone()
