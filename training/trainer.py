"""What happens in time: steps, lines of the record, evaluations, checkpoints, and the end.

Checkpoints, evaluation and preemption happen only at the step boundary, agreed by all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from prototypes.alarms import find_alarms
from runtime.distributed import Process
from runtime.preemption import PreemptionFlag
from runtime.program import EXIT_DONE, EXIT_FAULT, EXIT_PREEMPTED
from runtime.progress import Pace
from runtime.seeding import seed_everything
from training.checkpoints.snapshot import Progress, RecordPosition, Snapshot
from training.checkpoints.store import CheckpointStore
from training.config import PretrainConfig
from training.feed import Feed
from training.figures import close_epoch, compare_with_start, count_unique_shares, describe_step
from training.health import RunHealth
from training.metrics import WANDB_ID_NAME, MetricsRecord, RecordView, keep_wandb_id, open_views
from training.prototype_sets import modules_of
from training.run_directory import RunDirectory
from training.run_length import ends_epoch, schedule_at, steps_per_epoch
from training.schedules import StepSchedule
from training.step import StepOutcome, TrainingStep
from training.throughput import Throughput

logger = logging.getLogger(__name__)

Probe = Callable[[nn.Module], dict[str, float]]


class Trainer:
    """Trains until the schedule's end, a preemption or a fault.

    Args:
        config: the run's configuration.
        directory: the run directory, held by this job.
        process: this process.
        num_samples: images of one epoch.
        feed: this rank's micro-batches.
        throughput: what counts the steps.
        training_step: one optimizer step.
        store: the run's checkpoints.
        progress: where to begin.
        record_position: how far the record was there.
        provenance: plain facts about code and data, for exports.
        probe: in-training evaluation of the teacher's backbone, or None.
        preemption: the scheduler's warning, as a flag.
    """

    def __init__(
        self,
        *,
        config: PretrainConfig,
        directory: RunDirectory,
        process: Process,
        num_samples: int,
        feed: Feed,
        throughput: Throughput,
        training_step: TrainingStep,
        store: CheckpointStore,
        progress: Progress,
        record_position: RecordPosition,
        provenance: dict[str, Any],
        probe: Probe | None,
        preemption: PreemptionFlag,
    ) -> None:
        self.config = config
        self.process = process
        self.training_step = training_step
        self.progress = progress
        self._record_position = record_position
        self._directory = directory
        self._run_dir = directory.path
        self._num_samples = num_samples
        self._feed = feed
        self._throughput = throughput
        self._store = store
        self._provenance = provenance
        self._probe = probe
        self._preemption = preemption
        self._steps_per_epoch = steps_per_epoch(config, num_samples)
        self._num_steps = config.num_steps(num_samples)
        self._health = RunHealth(
            config.engine,
            directory.path,
            process,
            training_step.engine,
            {**modules_of(training_step.sets), "objective": training_step.objective},
        )
        self._alarms_raised: set[str] = set()
        self._skipped_samples = 0
        self._worker_rss_mib = 0.0
        self._is_claimed = False
        self._record: MetricsRecord | None = None
        self._views: list[RecordView] = []
        self._pace = Pace(self._num_steps, progress.step)

    def fit(self) -> int:
        """Trains to the end of the schedule, a preemption or too many skips; returns the exit code. Collective."""
        self._open_record()
        if self.progress.step >= self._num_steps:
            logger.info("nothing to do: %d of %d steps are done", self.progress.step, self._num_steps)
            self._claim()
        try:
            with self._progress_bar() as bar, self._health:
                while self.progress.step < self._num_steps:
                    self._train_step()
                    bar.update(self.progress.step - bar.n)
                    if not self._is_claimed:
                        self._claim()
                    if self.process.agree_any(self._preemption.is_set):
                        return self._stop_for_preemption()
                    if self.progress.skipped_in_row >= self.config.optim.max_skipped_steps:
                        return self._stop_for_skipped_steps()
                    self._publish(wait=False)
                    if self.progress.step % self.config.checkpoint.every_steps == 0:
                        self._save()
            return EXIT_DONE if self._save_to_the_end("the run is done") else EXIT_FAULT
        finally:
            self._close_record()

    def _claim(self) -> None:
        """Makes the directory this configuration's, now that a first step is done, and starts the record's views."""
        self._is_claimed = True
        if self._record is None:
            return
        self._directory.claim()
        self._views = open_views(self._run_dir, self.config.logging, self._provenance)

    def _train_step(self) -> None:
        started = time.perf_counter()
        self._health.beat(f"step {self.progress.step}, waiting for data")
        batches = self._feed.take()
        step, schedule = self.progress.step, self._schedule()
        seed_everything(self.config.run.seed, "step", step, self.process.rank)
        if step == 0:
            self._log_initial_prototypes()
        self._health.beat(f"step {step}, training")
        is_last = step + 1 == self._num_steps
        meanwhile = (lambda: None) if is_last else self._feed.prepare
        outcome = self.training_step(batches.crops, step, schedule, meanwhile)
        self._health.check(step)
        self.progress = self.progress.advanced(
            applied=outcome.applied,
            samples=self.config.batch.global_batch_size,
            position=batches.position,
        )
        self._skipped_samples += batches.skipped
        self._worker_rss_mib = batches.worker_rss_mib
        self._throughput.add(time.perf_counter() - started)
        if not outcome.applied:
            self._warn_of_skip(outcome)
        else:
            self._after_update(outcome, schedule)

    def _after_update(self, outcome: StepOutcome, schedule: StepSchedule) -> None:
        """Collects this step's line; what is collective happens on every rank, at steps all ranks agree on."""
        step, logging_config = self.progress.step, self.config.logging
        values: dict[str, float] = {}
        is_epoch = ends_epoch(self.config, self._num_samples, step)
        # Usage is a figure of one whole epoch; a run shorter than that reports what it has.
        if is_epoch or step == self._num_steps < self._steps_per_epoch:
            for one in self.training_step.sets:
                values |= close_epoch(one, outcome.sets[one.section], self.training_step.reduce_sum)
        if is_epoch or step in logging_config.unique_early_steps or step == self._num_steps:
            for one in self.training_step.sets:
                _, prototypes, vanished = outcome.sets[one.section]
                values |= count_unique_shares(one, prototypes[~vanished], is_main=self.process.is_main)
                if not self.config.model.init_head:  # then they started in another run
                    values |= compare_with_start(one, prototypes, is_main=self.process.is_main)
        probe_every = self.config.evaluation.knn_every_steps
        if self._probe is not None and probe_every and (step % probe_every == 0 or step == self._num_steps):
            values |= self._probe(self.training_step.engine.teacher_network().backbone)
        if values or step % logging_config.every_steps == 0 or step == 1:
            self._log(self._step_values(outcome, schedule) | values)

    def _step_values(self, outcome: StepOutcome, schedule: StepSchedule) -> dict[str, float]:
        """Returns the figures of the step that was just done, of all ranks together. Collective."""
        scalars = torch.stack([outcome.grad_norm.to(self.process.device), *outcome.loss.values()]).tolist()
        loss = {f"loss/{name}": value for name, value in zip(outcome.loss, scalars[1:], strict=True)}
        values = loss | {
            "optim/lr": schedule.lr,
            "optim/weight_decay": schedule.weight_decay,
            "optim/ema_momentum": schedule.ema_momentum,
            "optim/grad_norm": scalars[0],
            "optim/skipped_steps": float(self.progress.skipped_steps),
        }
        for one in self.training_step.sets:
            values |= describe_step(one, outcome.sets[one.section], self.training_step.gather_rows)
        for gauge in self.training_step.drift:
            values |= gauge.metrics()
        return values | self._process_values()

    def _process_values(self) -> dict[str, float]:
        """Returns what the processes measured since the last line. Collective.

        The clock is this rank's; skipped samples are the sum over ranks, waiting and memory the largest of any rank.
        """
        values = self._throughput.read(self._feed.read_wait())
        own = (
            values["throughput/data_wait_fraction"],
            peak_memory_gib(self.process.device),
            self._worker_rss_mib / 1024,
            self._skipped_samples,
        )
        wait_fractions, peaks, worker_rss, skipped = zip(*self.process.all_gather_object(own), strict=True)
        return values | {
            "throughput/data_wait_fraction": max(wait_fractions),
            "memory/peak_gib": max(peaks),
            "memory/worker_rss_gib": max(worker_rss),
            "data/skipped_samples": float(sum(skipped)),
        }

    def _log(self, values: dict[str, float]) -> None:
        if self._record is None:
            return
        self._record.write(self.progress.step, self.progress.samples_seen, values)
        interesting = ("loss/total", "prototypes/unique_0.025", "prototypes/used", "eval/knn20_top1")
        text = "  ".join(f"{name.split('/')[1]} {values[name]:.4f}" for name in interesting if name in values)
        speed = values.get("throughput/images_per_s", 0.0)
        step = self.progress.step
        pace = self._pace.describe(step)
        logger.info("step %d/%d  %s  %.0f images/s  %s", step, self._num_steps, text, speed, pace)
        for alarm in find_alarms(
            values,
            step=self.progress.step,
            collapses=self.training_step.objective.collapses,
            prefixes=[one.prefix for one in self.training_step.sets],
        ):
            # Once a run: an alarm that stays true would bury every other line.
            if alarm.name not in self._alarms_raised:
                self._alarms_raised.add(alarm.name)
                logger.warning("ALARM at step %d: %s", self.progress.step, alarm.message)

    def _log_initial_prototypes(self) -> None:
        if 0 in self.config.logging.unique_early_steps:
            values: dict[str, float] = {}
            for one in self.training_step.sets:
                values |= count_unique_shares(one, one.initial_prototypes(), is_main=self.process.is_main)
            self._log(values)

    def _schedule(self) -> StepSchedule:
        return schedule_at(self.config, self._num_samples, self.progress.step)

    def _warn_of_skip(self, outcome: StepOutcome) -> None:
        limit = self.config.optim.max_skipped_steps
        logger.warning(
            "step %d moved nothing: loss %.4g, non-finite loss or gradient, or a loss spike (%d in a row, limit %d)",
            self.progress.step,
            float(outcome.loss["total"]),
            self.progress.skipped_in_row,
            limit,
        )

    def _save(self) -> None:
        """Saves the run as it is, unless that is saved already or being saved. Collective."""
        if self.progress.step in (self._store.newest_step, self._store.pending_step):
            return
        self._health.beat(f"step {self.progress.step}, saving")
        self._directory.confirm()
        snapshot = Snapshot(
            self.config,
            self.progress,
            self.training_step,
            self.process,
            self._provenance,
            self._position_of_record(),
        )
        self._store.save(self.progress.step, snapshot.write, self._provenance)

    def _publish(self, *, wait: bool) -> None:
        """Publishes a background save once all ranks have written it. Collective."""
        if self._store.pending_step is not None:
            self._directory.confirm()
            self._store.finish() if wait else self._store.poll()

    def _save_to_the_end(self, how: str) -> bool:
        """Saves, waits for it and returns whether this very step is saved; says what is newest if not. Collective."""
        self._save()
        self._publish(wait=True)
        is_saved = self._store.newest_step == self.progress.step
        if not is_saved:
            logger.error("%s, but step %d is not saved; %s", how, self.progress.step, self._describe_newest())
        return is_saved

    def _describe_newest(self) -> str:
        newest = self._store.newest_step
        if newest is None:
            return "no checkpoint is saved yet: the next start begins anew"
        return f"the newest whole checkpoint is that of step {newest}, from which the next start goes on"

    def _position_of_record(self) -> RecordPosition:
        if self._record is None:
            return RecordPosition()
        identity = self._run_dir / WANDB_ID_NAME
        return RecordPosition(
            metrics_bytes=self._record.num_bytes,
            wandb_id=identity.read_text().strip() if identity.exists() else None,
        )

    def _stop_for_preemption(self) -> int:
        name = self._preemption.signal_name or "a signal to another rank"
        logger.info("stopping at step %d after %s", self.progress.step, name)
        is_saved = self._save_to_the_end(f"stopped by {name}")
        # The grace time is for the state; what a view has not got yet follows with the next start.
        self._close_record(views_timeout_s=5.0)
        # Unsaved and started again it would come here again: the disk needs somebody first.
        return EXIT_PREEMPTED if is_saved else EXIT_FAULT

    def _stop_for_skipped_steps(self) -> int:
        """Ends a run that no longer moves; a save that has begun is completed, the state itself not saved."""
        self._publish(wait=True)
        logger.error(
            "%d steps in a row were skipped; %s; lower optim.lr",
            self.progress.skipped_in_row,
            self._describe_newest(),
        )
        return EXIT_FAULT

    def _open_record(self) -> None:
        if not self.process.is_main:
            return
        position = self._record_position
        self._record = MetricsRecord(
            self._run_dir, resume_step=self.progress.step, resume_bytes=position.metrics_bytes
        )
        if position.wandb_id is not None:
            keep_wandb_id(self._run_dir, position.wandb_id)

    def _close_record(self, views_timeout_s: float = 20.0) -> None:
        if self._record is not None:
            self._record.close()
        for view in self._views:
            view.close(views_timeout_s)
        self._views = []

    def _progress_bar(self) -> tqdm:
        """A bar on rank 0's terminal; elsewhere (batch jobs, files) the log lines are enough."""
        return tqdm(
            total=self._num_steps,
            initial=self.progress.step,
            unit="step",
            disable=None if self.process.is_main else True,
            dynamic_ncols=True,
        )


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process in GiB: allocated on its GPU, or resident where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
