"""A directory that one job at a time may write: the lock names its holder and does not outlive it.

`DIRECTORY/LOCK` is one JSON object: host, process, start of the process, since when, job. Its holder touches it every
`BEAT_S` seconds and removes it at the end. Whoever finds it judges the holder:

- same host (and kernel start, and process namespace): the process is looked up; a number that another process has got
  since is told apart by the start time;
- an earlier start of the same Slurm job: dead, because Slurm requeues a job only when its processes are gone;
- elsewhere: dead once the file has not been touched for `SILENT_AFTER_S` seconds of this machine's own clock, so that
  clocks need not agree;
- a copy of a lock (`cp -r` of a directory that is held): known by its inode, holds nothing.

Looking and taking over happen under `flock`, which ends with its process; where a file system has none, two jobs that
take over from a dead one in the same instant are not told apart, and the holder notices at its next `confirm`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = "LOCK"
BEAT_S = 10.0
SILENT_AFTER_S = 120.0


class DirectoryHeldError(ValueError):
    """Another job holds the directory; the message is one line and names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a directory.

    Attributes:
        host: its name.
        pid: the process there.
        process_start: when the kernel started that process, in ticks since the machine's start.
        place: what a process number is unique in: the kernel's start and the process namespace.
        since: when the directory was taken, for people.
        job: Slurm's cluster and job id; empty outside Slurm.
        restarts: how often Slurm had requeued the job.
        token: distinguishes two holdings by one process.
        inode: of the lock itself.
    """

    host: str
    pid: int
    process_start: str
    place: str
    since: str
    job: str
    restarts: str
    token: str
    inode: int

    def __str__(self) -> str:
        job = f", job {self.job.rpartition(':')[2]}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job} since {self.since}"


class DirectoryLock:
    """One process's hold on a directory. Not collective: rank 0 of a job has one.

    Args:
        directory: an existing directory.
        beat_s: seconds between signs of life.
        silent_after_s: seconds without one after which a holder on another host is dead.
    """

    def __init__(
        self, directory: Path, *, beat_s: float = BEAT_S, silent_after_s: float = SILENT_AFTER_S
    ) -> None:
        self.path = directory / LOCK_NAME
        self.waits_for: str = ""
        self._beat_s = beat_s
        self._silent_after_s = silent_after_s
        self._token = secrets.token_hex(8)
        self._seen: tuple[str, int] | None = None
        self._seen_at = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def try_acquire(self) -> bool:
        """Returns whether the directory is held by this process now; ask again in a moment where it is not.

        False means that the holder is on another host and may be dead; `waits_for` then says who it is.

        Raises:
            DirectoryHeldError: a living process holds it.
            OSError: the directory cannot be written.
        """
        with self._opened() as (descriptor, is_new):
            status = os.fstat(descriptor)
            holder = None if is_new else _parse(os.read(descriptor, 1 << 16))
            if not (is_new or self._is_dead(holder, status)):
                return False
            try:
                self._write(descriptor, status.st_ino)
            except OSError:
                if is_new:
                    self.path.unlink(missing_ok=True)
                raise
        if holder is not None:
            logger.warning("taking over %s from %s, which is dead", self.path.parent, holder)
        self._thread = threading.Thread(target=self._beat, name="directory-lock", daemon=True)
        self._thread.start()
        return True

    def confirm(self) -> None:
        """Returns if the directory is still held by this process; a lock that somebody deleted is written again.

        Raises:
            DirectoryHeldError: another job has taken it over, after a pause of this one.
        """
        with self._opened() as (descriptor, is_new):
            holder = None if is_new else _parse(os.read(descriptor, 1 << 16))
            if holder is None:
                self._write(descriptor, os.fstat(descriptor).st_ino)
            elif holder.token != self._token:
                raise DirectoryHeldError(f"{self.path.parent} was taken over by {holder}")

    def release(self) -> None:
        """Lets the directory go, if it is still this process's; safe to call twice."""
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join(timeout=5)
        self._thread = None
        with contextlib.suppress(OSError), self._opened() as (descriptor, is_new):
            holder = None if is_new else _parse(os.read(descriptor, 1 << 16))
            if is_new or (holder is not None and holder.token == self._token):
                self.path.unlink()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[int, bool]]:
        """Opens the lock, new or old, and keeps all others from looking at it until the block's end."""
        while True:
            try:
                descriptor, is_new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                try:
                    descriptor, is_new = os.open(self.path, os.O_RDWR), False
                except FileNotFoundError:
                    continue  # released in between
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _inode_of(self.path) != os.fstat(descriptor).st_ino:
                    continue  # released while this process waited
                yield descriptor, is_new
                return
            finally:
                os.close(descriptor)

    def _is_dead(self, holder: Holder | None, status: os.stat_result) -> bool:
        """Whether a lock holds nothing; False while that is not known yet. Raises where it holds."""
        own = describe_self("", status.st_ino)
        if holder is not None:
            if holder.inode != status.st_ino:
                return True
            if holder.job and holder.job == own.job and holder.restarts != own.restarts:
                return True
            if (holder.host, holder.place) == (own.host, own.place):
                if find_process_start(holder.pid) not in (holder.process_start, UNKNOWN_START):
                    return True
                raise self._held(holder)
        # Elsewhere, or a lock that is being written: what it is shows in whether it is touched.
        beat = ("" if holder is None else holder.token, status.st_mtime_ns)
        self.waits_for = "a job that left no name" if holder is None else str(holder)
        now = time.monotonic()
        if self._seen is None or (holder is not None and self._seen[0] == ""):
            self._seen, self._seen_at = beat, now
        elif self._seen != beat:
            raise self._held(holder)
        return now - self._seen_at >= self._silent_after_s

    def _held(self, holder: Holder | None) -> DirectoryHeldError:
        who = "a job that left no name" if holder is None else str(holder)
        return DirectoryHeldError(
            f"run directory {self.path.parent} is held by {who}; expected one job a run directory; wait for its end "
            "or stop it, or set run.name"
        )

    def _write(self, descriptor: int, inode: int) -> None:
        content = json.dumps(asdict(describe_self(self._token, inode))).encode()
        os.ftruncate(descriptor, 0)
        if os.pwrite(descriptor, content, 0) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(
                OSError
            ):  # deleted, or an unreachable file system: `confirm` judges that
                os.utime(self.path)


UNKNOWN_START = "unknown"


def find_process_start(pid: int) -> str | None:
    """Returns when a process of this machine started, in ticks; None if there is none, or only its remains.

    `UNKNOWN_START` for a process that this user may not look at.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        return UNKNOWN_START
    try:
        # The name in parentheses may hold anything; field 3 is the state, field 22 the start (proc(5)).
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return UNKNOWN_START
    return None if text[0] in "ZX" else text[19]


def describe_self(token: str, inode: int) -> Holder:
    """Returns this process as a holder."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID", "")
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=find_process_start(os.getpid()) or UNKNOWN_START,
        place=_place(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        job=f"{environment.get('SLURM_CLUSTER_NAME', '')}:{job}" if job else "",
        restarts=environment.get("SLURM_RESTART_COUNT", "0"),
        token=token,
        inode=inode,
    )


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {secrets.token_hex(8)}"  # equal to nobody's: judged by signs of life


def _inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Holder | None:
    """Returns the holder that a lock names; None where it is empty or something else."""
    try:
        found = json.loads(content)
        holder = Holder(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = ("pid", "inode")
    fit = all(type(value) is (int if name in numbers else str) for name, value in asdict(holder).items())
    return holder if fit else None
