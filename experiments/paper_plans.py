"""Which butterflies the paper's experiments fit, side by side: of radix 2, as in the paper, and wide ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from butterfly_opt import RotatedDiagonal, fit_symmetric
from butterfly_opt.orthogonal import num_angles
from butterfly_opt.plan import check_plan, make_plan
from experiments.config import ConfigError
from experiments.paper_files import check_at_least


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """A butterfly; see ``butterfly_opt.plan``.

    Attributes:
        block: coordinates of a group.
        lead: outputs of a group that go on; 2 and 2 is the paper's butterfly.
        rotations: how many in a row.
    """

    block: int
    lead: int
    rotations: int = 1

    def __post_init__(self) -> None:
        try:
            check_plan(self.block, self.lead)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        check_at_least(1, rotations=self.rotations)

    def angles(self, n: int) -> int:
        """Free angles on n coordinates."""
        return self.rotations * num_angles(make_plan(n, self.block, self.lead))

    def fit(self, matrix: Tensor) -> RotatedDiagonal:
        """Fitted to a positive definite matrix, for the likelihood; radix 2 knows only the energy."""
        return fit_symmetric(matrix, **dataclasses.asdict(self), criterion="logdet").operator


def check_plans(plans: Mapping[str, PlanConfig]) -> None:
    """Checks that there is a plan.

    Raises:
        ConfigError: there is none.
    """
    if not plans:
        raise ConfigError("plans must name at least one butterfly, got none")
