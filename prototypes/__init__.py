"""Decoupled prototypes: what another program imports, `from decoupled_prototypes import ...`.

A name is looked up when it is asked for: options must stay free of torch, which `config` does not import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build_estimator as build_estimator
    from .config import PartitionConfig as PartitionConfig
    from .config import PrototypesConfig as PrototypesConfig
    from .diagnostics import UsageCounter as UsageCounter
    from .diagnostics import count_unique as count_unique
    from .estimator import PrototypeEstimator as PrototypeEstimator
    from .mixture.config import GmmConfig as GmmConfig
    from .mixture.config import RevivalConfig as RevivalConfig
    from .objectives.carp import carp_loss as carp_loss
    from .objectives.partitions import draw_partition as draw_partition

_HOME = {
    "GmmConfig": "mixture.config",
    "PartitionConfig": "config",
    "PrototypeEstimator": "estimator",
    "PrototypesConfig": "config",
    "RevivalConfig": "mixture.config",
    "UsageCounter": "diagnostics",
    "build_estimator": "build",
    "carp_loss": "objectives.carp",
    "count_unique": "diagnostics",
    "draw_partition": "objectives.partitions",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
