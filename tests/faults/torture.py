"""Kills, damages, doubles and fills the disk of two-rank runs until the time is up; the bar is 0, 0 and 0.

    python -m tests.faults.torture [--minutes 30] [--seed N] [--work DIRECTORY]

Every trial begins with a run that is new, interrupted or finished, does one thing to it that happens to runs, starts
it again, and compares what comes out with an undisturbed run, byte for byte. Printed are the trials of each kind and

    lost commits        a start that went on from less than the newest whole checkpoint, or ended with other bytes
    wrong exit codes    0, 1, 2, 75 or a signal where another was right, or a rank that had to be ended
    tracebacks          in a start whose ranks were left alone

Exits with 1 unless all three are 0. Ranks are forked from one process that has the imports behind it, so that a trial
takes seconds; from `pretrain.main` on they are ordinary ones. A seed repeats the choices, not the moments.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

import pretrain
from runtime.program import run_program
from runtime.rendezvous import free_port
from tests.faults import injection
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from training.checkpoints.files import CheckpointError, list_committed, load_manifest

STEPS, EVERY, WORLD_SIZE = 12, 3, 2
STEP_POINTS = ("forward", "reduce", "backward", "update")
SAVE_POINTS = ("begin", "written", "hashed", "manifest", "commit", "committed")
RANK_0_ONLY = SAVE_POINTS[3:]
TIMEOUT_S = 180.0
SHAPES = (
    None,
    True,
    3,
    "x",
    [],
    {},
    [[1]],
    {"dict": []},
    {"dict": [["step", 1]]},
    {"list": [1]},
    {"tensor": "x"},
)
# What a rank imports late is imported once, before ranks are forked.
IMPORTED = ("training.build", "training.engines.deepspeed", "evaluation.probes.knn")
UNCOMPARED = ("teacher/README.md", "record.json")  # the run's name; seconds


class Job:
    """Two ranks of one start."""

    def __init__(self, arguments: list[str], logs: Path, fault: str | None = None) -> None:
        logs.mkdir(parents=True)
        self.logs = logs
        shared = {
            "WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "FAULT": fault or "",
        }
        self.codes: list[int | None] = [None] * WORLD_SIZE
        self.pids = [
            _fork(
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, arguments, logs / f"rank-{rank}.log"
            )
            for rank in range(WORLD_SIZE)
        ]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a rank that has not been waited for."""
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], number)

    def poll(self) -> list[int | None]:
        """Returns the exit codes so far; a signal is negative."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
        return self.codes

    def wait(self, launcher_s: float = 0.0) -> list[int]:
        """Returns the exit codes; a rank that does not end is killed and counts as 99.

        With `launcher_s` ranks are killed that have not ended so long after a peer, as launchers do: a rank that waits
        for a peer before the first collective has no connection that could break.
        """
        deadline = time.monotonic() + TIMEOUT_S
        first_end = math.inf
        while None in self.poll() and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(code is not None for code in self.codes):
                first_end = min(first_end, time.monotonic())
            if launcher_s and time.monotonic() > first_end + launcher_s:
                for rank in range(WORLD_SIZE):
                    self.kill(rank)
        hung = [rank for rank, code in enumerate(self.codes) if code is None]
        for rank in hung:
            os.kill(self.pids[rank], signal.SIGKILL)
            os.waitpid(self.pids[rank], 0)
            self.codes[rank] = 99
        return [code for code in self.codes if code is not None]

    def text(self) -> str:
        """Returns what the ranks printed."""
        return "".join(path.read_text() for path in sorted(self.logs.glob("rank-*.log")))


def _fork(environment: dict[str, str], arguments: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 98
    try:
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = run_program(injection.main if environment["FAULT"] else pretrain.main, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Torture:
    """The trials, and what they have found."""

    def __init__(self, work: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.work = work
        self.shards = write_digit_shards(work / "digits")
        self.trials: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.out = work / "trial"
        self.disk: Path | None = None
        self._starts = 0
        self.keep_last = 10
        self.out = work / "reference"
        assert self.start().wait() == [0, 0], "the undisturbed run"
        self.reference = self.out
        self.expected = hashes(self.out / "run" / "checkpoints" / f"step-{STEPS:08d}")
        self.kinds: dict[str, Callable[[], None]] = {
            "kill at a point": self.kill_at_a_point,
            "kill by the clock": self.kill_by_the_clock,
            "preempt": self.preempt,
            "inconsistent damage": lambda: self.damage(spoil),
            "consistent damage": lambda: self.damage(forge),
            "two at once": self.two_at_once,
        }
        if can_mount():
            self.kinds["full disk"] = self.full_disk

    @property
    def root(self) -> Path:
        """The trial's checkpoints."""
        return self.out / "run" / "checkpoints"

    def start(self, fault: str | None = None, *overrides: str) -> Job:
        """Starts the trial's run."""
        self._starts += 1
        arguments = [
            DEMO,
            *TINY,
            f"data.shards={self.shards}",
            f"run.output_dir={self.out}",
            "run.name=run",
            f"optim.steps={STEPS}",
            f"checkpoint.every_steps={EVERY}",
            f"checkpoint.keep_last={self.keep_last}",
            "evaluation.knn_every_steps=0",
            "engine.hang_timeout_s=60",
            "run.collective_timeout_s=60",
            "model.head.use_bn=false",
            f"checkpoint.asynchronous={self.random.choice(('true', 'false'))}",
            *overrides,
        ]
        return Job(arguments, self.work / "logs" / f"{self._starts:05d}", fault)

    def blame(self, what: str, why: str, *jobs: Job) -> None:
        """Counts a fault and says where to look."""
        self.faults[what] += 1
        logs = ", ".join(str(job.logs) for job in jobs)
        print(f"{what}: {why}; logs {logs}; directory {self.out}", flush=True)

    def finish(self, spoiled: frozenset[str] = frozenset()) -> None:
        """Starts a trial's run again, undisturbed, and judges everything about it."""
        whole = [path for path in list_committed(self.root) if path.name not in spoiled]
        newest = int(whole[0].name[5:]) if whole else 0
        job = self.start()
        codes, text = job.wait(), job.text()
        if codes != [0, 0]:
            self.blame("wrong exit codes", f"{codes} for [0, 0] from step {newest}", job)
            return
        if newest and f"step-{newest:08d}: {newest} steps done" not in text:
            self.blame("lost commits", f"step {newest} was there and is not what the run went on from", job)
        if hashes(self.root / f"step-{STEPS:08d}") != self.expected:
            self.blame("lost commits", "other bytes than those of the undisturbed run", job)
        self.look_for_tracebacks(job)

    def look_for_tracebacks(self, job: Job) -> None:
        """Counts a traceback of a start whose ranks were left alone."""
        if "Traceback" in job.text():
            self.blame("tracebacks", "in a start whose ranks were left alone", job)

    def kill_at_a_point(self) -> None:
        """SIGKILL of one rank or of both, in a step or in a save, several times in a row."""
        for _ in range(self.random.randint(1, 3)):
            rank = self.random.choice(("0", "1", "*"))
            if self.random.random() < 0.5:
                step, point = self.random.randrange(STEPS), self.random.choice(STEP_POINTS)
            else:
                step = self.random.randrange(EVERY, STEPS + 1, EVERY)
                points = SAVE_POINTS if rank != "1" else SAVE_POINTS[:3]
                point = f"save_{self.random.choice(points)}"
            job = self.start(f"kill@{rank}:{step}:{point}")
            codes = job.wait()
            victims = [0, 1] if rank == "*" else [int(rank)]
            if point.removeprefix("save_") in RANK_0_ONLY:
                victims = [0]
            # A later start is past the step, or finds it saved: then nothing strikes.
            # Of two victims one may learn of the other's end before its own.
            struck = any(codes[victim] == -signal.SIGKILL for victim in victims)
            if codes != [0, 0] and not (struck and all(code in (1, -signal.SIGKILL) for code in codes)):
                self.blame("wrong exit codes", f"{codes} after kill@{rank}:{step}:{point}", job)
        self.finish()

    def kill_by_the_clock(self) -> None:
        """SIGKILL at any moment, also before the first commit."""
        for _ in range(self.random.randint(1, 3)):
            job = self.start()
            time.sleep(self.random.uniform(0.05, 6.0))
            victims = self.random.choice(([0], [1], [0, 1]))
            alive = [rank for rank in victims if job.poll()[rank] is None]
            for rank in alive:
                job.kill(rank)
            codes = job.wait(launcher_s=20)
            # The peer of a rank that was killed while it was leaving may be through.
            allowed = {0: (0, -9), 1: (0, 1, -9)}
            if any(code not in allowed[int(bool(alive))] for code in codes):
                self.blame("wrong exit codes", f"{codes} after SIGKILL of {alive}", job)
        self.finish()

    def preempt(self) -> None:
        """A warning signal to one rank: saved and 75, or already through."""
        job = self.start()
        deadline = time.monotonic() + 60
        while not (self.out / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(self.random.uniform(0.0, 2.0))
        job.kill(self.random.randrange(WORLD_SIZE), self.random.choice((signal.SIGUSR2, signal.SIGTERM)))
        codes = job.wait()
        if codes not in ([75, 75], [0, 0]):
            self.blame("wrong exit codes", f"{codes} after a warning", job)
        self.look_for_tracebacks(job)
        self.finish()

    def damage(self, harm: Callable[[Path, random.Random], str]) -> None:
        """Some checkpoints of a finished run are damaged; if all are, nothing may change."""
        shutil.copytree(self.reference / "run", self.out / "run")
        checkpoints = list_committed(self.root)
        count = self.random.choice((1, 1, 2, 3, len(checkpoints)))
        chosen = checkpoints[:count] if self.random.random() < 0.7 else self.random.sample(checkpoints, count)
        harms = [f"{path.name}: {harm(path, self.random)}" for path in chosen]
        if count < len(checkpoints):
            self.finish(frozenset(path.name for path in chosen))
            return
        before = content(self.out / "run")
        job = self.start()
        codes, text = job.wait(), job.text()
        if codes != [2, 2] or "none can be used" not in text:
            self.blame("wrong exit codes", f"{codes} for [2, 2] after {'; '.join(harms)}", job)
        if content(self.out / "run") != before:
            self.blame("lost commits", f"a refused start changed the directory after {'; '.join(harms)}", job)
        self.look_for_tracebacks(job)

    def two_at_once(self) -> None:
        """Two starts in one directory: one trains, the other is refused and names it."""
        if self.random.random() < 0.5:
            self.start(f"kill@*:{self.random.randrange(STEPS)}:forward").wait()
        jobs = [self.start()]
        time.sleep(self.random.choice((0.0, self.random.uniform(0.0, 4.0))))
        jobs.append(self.start())
        codes = [job.wait() for job in jobs]
        for job, found in zip(jobs, codes, strict=True):
            if found not in ([0, 0], [2, 2]) or (found == [2, 2] and "is held by process" not in job.text()):
                self.blame("wrong exit codes", f"{codes} of two at once", *jobs)
            self.look_for_tracebacks(job)
        if [0, 0] not in codes:
            self.blame("wrong exit codes", f"{codes} of two at once: nobody trained", *jobs)
        self.finish()

    def full_disk(self) -> None:
        """A disk that takes some saves or none: exit 1 unless the last step is saved; then there is room again."""
        size = sum(
            entry["bytes"]
            for entry in load_manifest(list_committed(self.reference / "run" / "checkpoints")[0])["files"]
        )
        self.out.mkdir()
        self.disk = self.out
        mount(self.out, int(size * self.random.uniform(0.3, 3.0)) + (1 << 17))
        job = self.start()
        codes, text = job.wait(), job.text()
        found = [path.name for path in list_committed(self.root)]
        right = [0, 0] if f"step-{STEPS:08d}" in found else [1, 1]
        newest = (
            f"the newest whole checkpoint is that of step {int(found[0][5:])}," if found else "no checkpoint"
        )
        if codes != right or (codes == [1, 1] and newest not in text):
            self.blame("wrong exit codes", f"{codes} for {right} on a full disk with {found}", job)
        self.look_for_tracebacks(job)
        mount(self.out, size * 20 + (1 << 22), remount=True)
        self.finish()

    def run(self, minutes: float) -> None:
        """Makes trials, each kind in turn and in a random order, until the time is up."""
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            for kind in self.random.sample(sorted(self.kinds), len(self.kinds)):
                if time.monotonic() >= until:
                    break
                self.trials[kind] += 1
                self.out = self.work / f"trial-{sum(self.trials.values()):05d}"
                self.keep_last = self.random.choice((1, 2, 10))
                before = sum(self.faults.values())
                self.kinds[kind]()
                if self.disk is not None:
                    unmount(self.disk)
                    self.disk = None
                if sum(self.faults.values()) == before:
                    shutil.rmtree(self.out, ignore_errors=True)


def hashes(checkpoint: Path) -> dict[str, str]:
    """Returns SHA-256 by file of what a run computed; nothing where there is no checkpoint."""
    try:
        files = load_manifest(checkpoint)["files"]
    except CheckpointError:
        return {}
    return {entry["path"]: entry["sha256"] for entry in files if entry["path"] not in UNCOMPARED}


def content(run_dir: Path) -> dict[str, bytes]:
    """Returns every file of a run directory but its logs and signs of life."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and not path.name.startswith("console") and "heartbeats" not in path.parts
    }


def spoil(checkpoint: Path, chance: random.Random) -> str:
    """Damages one file so that its hash no longer fits; returns what was done."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path, kind = chance.choice(files), chance.choice(("flip", "truncate", "empty", "remove", "add", "grow"))
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del data[chance.randrange(len(data)) :]
    elif kind == "grow":
        data += b"x"
    path.write_bytes(b"" if kind == "empty" else bytes(data))
    if kind == "remove":
        path.unlink()
    elif kind == "add":
        (checkpoint / "planted.json").write_text("{}")
    return f"{kind} {path.relative_to(checkpoint)}"


def forge(checkpoint: Path, chance: random.Random) -> str:
    """Puts something unusable into one file that a resume reads, with right hashes; returns what was done."""
    kind = chance.choice(("manifest", "json", "json", "json", "tensors", "no tensors"))
    if kind == "manifest":
        manifest = load_manifest(checkpoint)
        shape = chance.choice(
            (*SHAPES, {"schema": 1, "step": 3}, {**manifest, "schema": 2}, {**manifest, "files": [3]})
        )
        commit(checkpoint, json.dumps(shape))
        return f"MANIFEST.json is {shape!s:.40}"
    if kind == "json":
        ranks = [f"rng-{rank:05d}-of-{WORLD_SIZE:05d}" for rank in range(WORLD_SIZE)]
        name, shape = chance.choice(("progress", "record", "estimator", *ranks)), chance.choice(SHAPES)
        if name == "record" and shape == {"dict": []}:
            shape = None  # an empty record is a record
        if name == "record" and shape == {"dict": [["step", 1]]}:
            shape = {"dict": [["metrics_bytes", "many"]]}
        (checkpoint / f"{name}.json").write_text(json.dumps(shape))
        done = f"{name}.json is {shape}"
    else:
        path = chance.choice(sorted(checkpoint.glob("state-*.safetensors")))
        tensors = load_file(path)
        victim = chance.choice(sorted(tensors))
        moved = tensors.pop(victim)
        if kind == "no tensors":
            tensors = {}
        elif chance.random() < 0.5:
            tensors[f"{victim}x"] = moved
        elif chance.random() < 0.5 and moved.dim():
            tensors[victim] = moved[None].contiguous()
        save_file(tensors, path)
        done = f"{path.name} is without a right {victim}"
    manifest = load_manifest(checkpoint)
    for entry in manifest["files"]:
        data = (checkpoint / entry["path"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit(checkpoint, json.dumps(manifest))
    return done


def commit(checkpoint: Path, manifest: str) -> None:
    """Writes a manifest and its right hash."""
    (checkpoint / "MANIFEST.json").write_text(manifest)
    (checkpoint / "COMMIT").write_text(hashlib.sha256(manifest.encode()).hexdigest() + "\n")


_LIBC = ctypes.CDLL(None, use_errno=True)
_REMOUNT = 32  # MS_REMOUNT of mount(2)


def mount(where: Path, size: int, *, remount: bool = False) -> None:
    """Mounts a tmpfs of `size` bytes, or gives one another size."""
    flags = _REMOUNT if remount else 0
    if _LIBC.mount(b"tmpfs", str(where).encode(), b"tmpfs", flags, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {where}")


def unmount(where: Path) -> None:
    """Unmounts, at once or when its last user has gone."""
    _LIBC.umount2(str(where).encode(), 2)


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as place:
        try:
            mount(Path(place), 1 << 16)
        except OSError:
            return False
        unmount(Path(place))
        return True


def main(arguments: list[str]) -> int:
    """Returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--work", type=Path, help="where to work; a new directory by default")
    options = parser.parse_args(arguments)
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for name in IMPORTED:
        importlib.import_module(name)
    work = options.work or Path(tempfile.mkdtemp(prefix="torture-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.minutes:g} minutes, in {work}", flush=True)
    torture = Torture(work.absolute(), options.seed)
    torture.run(options.minutes)
    return report(torture.trials, torture.faults, torture._starts)


def report(trials: Counter[str], faults: Counter[str], starts: int) -> int:
    """Prints the counts and returns the exit code."""
    for kind, count in sorted(trials.items()):
        print(f"{count:5d}  {kind}")
    print(f"{sum(trials.values()):5d}  trials, {starts} starts of {WORLD_SIZE} ranks")
    for what in ("lost commits", "wrong exit codes", "tracebacks"):
        print(f"{faults[what]:5d}  {what}")
    return int(bool(sum(faults.values())) or not trials)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
