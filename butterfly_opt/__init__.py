"""Butterfly rotations plus a diagonal: a second-order drop-in for ``torch.optim.Adam``."""

from butterfly_opt._version import __version__
from butterfly_opt.angle_basis import AngleBasis
from butterfly_opt.autograd import butterfly_rotation
from butterfly_opt.fit import CovarianceFit, Fit, FitOptions, fit_covariance, fit_inverse, fit_symmetric
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.operators import DirectSum, RotatedDiagonal, SymmetricOperator
from butterfly_opt.optimizer import Butterfly
from butterfly_opt.secant import SecantEstimate

__all__ = [
    "AngleBasis",
    "Butterfly",
    "ButterflyNormal",
    "CovarianceFit",
    "DirectSum",
    "Fit",
    "FitOptions",
    "RotatedDiagonal",
    "SecantEstimate",
    "SymmetricOperator",
    "__version__",
    "butterfly_rotation",
    "fit_covariance",
    "fit_inverse",
    "fit_symmetric",
]
