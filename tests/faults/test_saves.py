"""Faults of a save: SIGKILL between any two file operations, flipped bits, a full disk."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.distributed import Process
from training.checkpoints.files import list_unfinished
from training.checkpoints.state_files import load_tensors, save_tensors, save_tree
from training.checkpoints.store import find_latest_checkpoint, find_problems, save_checkpoint

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
FILE_EVENTS = frozenset(
    {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir"}
)


def save(root: Path, step: int, numel: int = 3000) -> None:
    def write(directory: Path) -> None:
        save_tensors(directory / "state-00000-of-00001.safetensors", {"w": torch.full((numel,), float(step))})
        (directory / "teacher").mkdir()
        save_tensors(directory / "teacher" / "model.safetensors", {"w": torch.full((10,), float(step))})
        save_tree(directory, "progress", {"step": step, "window": [1.0, 2.0]})

    save_checkpoint(root, step, write, ALONE, keep_last=2)


def in_child(work) -> int:
    """Runs `work` in a forked process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def save_killed_at(root: Path, step: int, event_number: int) -> int:
    """Saves in a child that kills itself (SIGKILL) at its n-th file operation; returns 9, or 0 if it finished."""

    def work() -> None:
        seen = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in FILE_EVENTS:
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        save(root, step)

    return in_child(work)


def check_after_kill(root: Path, finished: bool, label: str) -> None:
    """A killed save leaves the old or the new checkpoint, whole; the next save works and cleans up."""
    found = find_latest_checkpoint(root, ALONE)
    assert found is not None, label
    step = int(found.name[-8:])
    assert step in ((20,) if finished else (10, 20)), label
    value = load_tensors(found / "state-00000-of-00001.safetensors")["w"]
    assert bool((value == step).all()), label
    save(root, 30)
    after = find_latest_checkpoint(root, ALONE)
    assert after is not None and after.name == "step-00000030", label
    assert list_unfinished(root) == [], label


@pytest.mark.timeout(200)
def test_sigkill_at_every_file_operation_of_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    killed = 0
    for event_number in range(1, 200):
        root = tmp_path / str(event_number)
        save(root, 10)
        code = save_killed_at(root, 20, event_number)
        check_after_kill(root, code == 0, f"file operation {event_number}")
        if code == 0:
            break
        killed += 1
    assert killed >= 20, "the save has fewer file operations than the matrix asks for kill points"


def test_sigkill_at_20_moments_of_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the clock instead of by operation: also inside writes, flushes and hashing."""
    caplog.set_level(logging.CRITICAL)
    started = time.perf_counter()
    save(tmp_path / "probe", 10, numel=2_000_000)
    duration = time.perf_counter() - started
    for moment in range(20):
        root = tmp_path / str(moment)
        save(root, 10)
        child = os.fork()
        if child == 0:
            save(root, 20, numel=2_000_000)
            os._exit(0)
        time.sleep(duration * moment / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_after_kill(root, False, f"moment {moment}")


@pytest.mark.timeout(200)
def test_a_thousand_bit_flips_are_all_detected_and_name_their_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 10)
    save(tmp_path, 20)
    newest = tmp_path / "step-00000020"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    generator = random.Random(0)
    detected = fallbacks = 0
    for number in range(1000):
        path = generator.choice(files)
        content = bytearray(path.read_bytes())
        bit = generator.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        detected += any(path.name in problem for problem in find_problems(newest, ALONE))
        if number % 10 == 0:
            fallbacks += find_latest_checkpoint(tmp_path, ALONE) == tmp_path / "step-00000010"
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
    assert (detected, fallbacks) == (1000, 100)
    assert find_latest_checkpoint(tmp_path, ALONE) == newest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if libc.mount(b"tmpfs", str(mount_point).encode(), b"tmpfs", 0, b"size=2m") != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield mount_point
    finally:
        libc.umount2(str(mount_point).encode(), 2)


def test_a_full_disk_keeps_the_old_checkpoint_and_a_retry_works(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = small_disk / "checkpoints"
    save(root, 10)
    old = find_latest_checkpoint(root, ALONE)
    for numel in (600_000, 460_000):  # in the weights; in what follows them
        outcome = save_checkpoint(root, 20, lambda d, n=numel: _fill(d, n), ALONE, keep_last=1)
        assert outcome.path is None and os.strerror(errno.ENOSPC) in (outcome.error or "")
        assert "the run goes on" in caplog.text
        assert find_latest_checkpoint(root, ALONE) == old
        assert sorted(path.name for path in root.iterdir()) == ["step-00000010"]
    save(root, 20)
    retried = find_latest_checkpoint(root, ALONE)
    assert retried is not None and retried.name == "step-00000020"


def _fill(directory: Path, numel: int) -> None:
    save_tensors(directory / "a.safetensors", {"w": torch.zeros(numel)})
    save_tensors(directory / "b.safetensors", {"w": torch.zeros(100_000)})
