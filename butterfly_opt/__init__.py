"""Butterfly rotations plus a diagonal: a second-order drop-in for ``torch.optim.Adam``."""

from butterfly_opt._version import __version__
from butterfly_opt.optimizer import Butterfly

__all__ = ["Butterfly", "__version__"]
