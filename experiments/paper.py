"""The paper's experiments.

python -m experiments.paper {synthetic,covariance,hessian} [--config FILE] [key=value ...]

After M. Mathieu and Y. LeCun, arXiv:1404.7195 (2014). The run folder (`run_dir=...`, by default runs/NAME-TIME) gets
the resolved configuration, a CSV file and a figure as PDF and PNG. Exit codes: 0 done, 2 a mistake in the
configuration, the arguments or the data (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import paper_covariance, paper_hessian, paper_synthetic
from experiments.paper_files import load, open_folder
from experiments.run_folder import default_folder
from experiments.train import Parser, exit_code

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "paper"
EXPERIMENTS: dict[str, tuple[type, Callable[[Any, Path], Sequence[Any]]]] = {
    "synthetic": (paper_synthetic.SyntheticConfig, paper_synthetic.run),
    "covariance": (paper_covariance.CovarianceConfig, paper_covariance.run),
    "hessian": (paper_hessian.HessianConfig, paper_hessian.run),
}


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m experiments.paper", description="The paper's experiments.", allow_abbrev=False)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--config", type=Path, help="YAML file, by default configs/paper/EXPERIMENT.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=20 run_dir=runs/mine")
    arguments = parser.parse_intermixed_args(argv)
    path: Path = arguments.config or CONFIGS / f"{arguments.experiment}.yaml"
    section, run = EXPERIMENTS[arguments.experiment]
    config = load(section, path, arguments.overrides)
    folder = open_folder(Path(config.run_dir) if config.run_dir is not None else default_folder(path), config)
    try:
        run(config, folder)
    except KeyboardInterrupt:
        print(f"interrupted; the run folder {folder} holds what was finished", file=sys.stderr)
        return 130
    print(f"run folder: {folder}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return exit_code(lambda: _command(argv))


if __name__ == "__main__":
    sys.exit(main())
