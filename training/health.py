"""What watches a run from beside it: the hang watchdog, and the comparison of replicas over ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from runtime.distributed import Process
from runtime.watchdog import HangWatchdog
from training.config import EngineConfig
from training.engines.interface import Engine
from training.guards import check_replicas

logger = logging.getLogger(__name__)


class RunHealth:
    """Watches one run; a context manager around its loop.

    Args:
        config: how often replicas are compared, and the watchdog's patience.
        run_dir: signs of life and stacks go to its `heartbeats` folder.
        process: this process.
        engine: whose replicated weights are compared (sharded ones have no replica).
        replicas: modules whose state is replicated on every rank, by name.
    """

    def __init__(
        self,
        config: EngineConfig,
        run_dir: Path,
        process: Process,
        engine: Engine,
        replicas: Mapping[str, nn.Module],
    ) -> None:
        self._every = config.checksum_every
        self._process = process
        self._engine = engine
        self._modules = dict(replicas)
        self._watchdog = HangWatchdog(
            run_dir / "heartbeats", process.rank, process.world_size, config.hang_timeout_s
        )

    def __enter__(self) -> RunHealth:
        self._watchdog.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watchdog.stop()

    def beat(self, where: str) -> None:
        """Notes where this rank is; not collective."""
        self._watchdog.beat(where)

    def check(self, step: int) -> None:
        """Compares all replicated tensors over ranks at every `checksum_every`-th step. Collective.

        Raises:
            ReplicaMismatchError: on all ranks alike, naming rank and tensor.
        """
        if self._every == 0 or step % self._every:
            return
        check_replicas(self._replicas(), self._process, step)

    def _replicas(self) -> Iterator[tuple[str, Tensor]]:
        for place, module in self._modules.items():
            for name, value in module.state_dict().items():
                if isinstance(value, Tensor):
                    yield f"{place}/{name}", value
        yield from self._engine.replicated_tensors()
