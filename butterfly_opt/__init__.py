"""Butterfly rotations plus a diagonal: a second-order drop-in for ``torch.optim.Adam``."""

from butterfly_opt._version import __version__
from butterfly_opt.autograd import butterfly_rotation
from butterfly_opt.optimizer import Butterfly
from butterfly_opt.secant import SecantEstimate

__all__ = ["Butterfly", "SecantEstimate", "__version__", "butterfly_rotation"]
