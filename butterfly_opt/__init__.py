"""Wide butterfly rotations plus a diagonal: a second-order drop-in for ``torch.optim.Adam``."""

from butterfly_opt._version import __version__
from butterfly_opt.basis import Basis
from butterfly_opt.fit import CovarianceFit, Fit, fit_covariance, fit_inverse, fit_symmetric
from butterfly_opt.normal import ButterflyNormal
from butterfly_opt.operators import DirectSum, RotatedDiagonal, SymmetricOperator
from butterfly_opt.optimizer import Butterfly, ButterflyW
from butterfly_opt.orthogonal import ButterflyOrthogonal, butterfly_rotation
from butterfly_opt.probe import ProbedFit, hessian_product, probe_inverse
from butterfly_opt.rotation import Rotation
from butterfly_opt.secant import SecantEstimate

__all__ = [
    "Basis",
    "Butterfly",
    "ButterflyNormal",
    "ButterflyOrthogonal",
    "ButterflyW",
    "CovarianceFit",
    "DirectSum",
    "Fit",
    "ProbedFit",
    "RotatedDiagonal",
    "Rotation",
    "SecantEstimate",
    "SymmetricOperator",
    "__version__",
    "butterfly_rotation",
    "fit_covariance",
    "fit_inverse",
    "fit_symmetric",
    "hessian_product",
    "probe_inverse",
]
