"""The flag itself, and a process that finishes its step after a warning."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.preemption import PreemptionFlag, ignore_preemption_signals

ROOT = Path(__file__).resolve().parents[3]

# A trainer's outline: a step takes 0.4 s in small parts, and the flag is read between steps only.
TRAINER = """
import sys, time
from runtime.preemption import PreemptionFlag
with PreemptionFlag() as flag:
    print("ready", flush=True)
    for step in range(1000):
        for part in range(8):
            time.sleep(0.05)
        print("finished", step, flush=True)
        if flag.is_set:
            print("saved", step, flag.signal_name, "torch" in sys.modules, flush=True)
            sys.exit(75)
"""

# Loader workers as torch makes them, so that torch's own SIGTERM handler is in place before ours.
LOADER = """
import sys, time
import torch
from torch.utils.data import DataLoader, IterableDataset
from runtime.preemption import PreemptionFlag, ignore_preemption_signals

class Slow(IterableDataset):
    def __iter__(self):
        while True:
            time.sleep(0.02)
            yield torch.zeros(1)

def start_worker(index):
    ignore_preemption_signals()

if __name__ == "__main__":
    with PreemptionFlag() as flag:
        loader = DataLoader(Slow(), num_workers=2, worker_init_fn=start_worker)
        batches = iter(loader)
        next(batches), next(batches)
        print("ready", flush=True)
        while not flag.is_set:
            next(batches)
        for _ in range(40):
            next(batches)
        print("saved", all(w.is_alive() for w in batches._workers), flush=True)
        del batches
    sys.exit(75)
"""


def start(program: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["USR2", "TERM", "USR1"])
def test_flag_names_the_first_signal_and_keeps_it(name: str) -> None:
    with PreemptionFlag() as flag:
        assert not flag.is_set
        assert flag.signal_name is None
        assert flag.seconds_since == 0.0
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        assert flag.is_set
        time.sleep(0.01)
        assert flag.seconds_since >= 0.01
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.signal_name == f"SIG{name}"
    assert flag.is_set


def test_former_handlers_come_back_also_after_an_error() -> None:
    def mine(number: int, frame: object) -> None: ...

    former = signal.signal(signal.SIGUSR2, mine)
    try:
        terminate = signal.getsignal(signal.SIGTERM)
        with pytest.raises(ZeroDivisionError), PreemptionFlag():
            assert signal.getsignal(signal.SIGUSR2) is not mine
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGUSR2) is mine
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGUSR2, former)


def test_only_the_chosen_signals_are_caught() -> None:
    usr1 = signal.getsignal(signal.SIGUSR1)
    with PreemptionFlag(signals=("SIGHUP",)) as flag:
        assert signal.getsignal(signal.SIGUSR1) is usr1
        os.kill(os.getpid(), signal.SIGHUP)
        assert flag.signal_name == "SIGHUP"


@pytest.mark.parametrize("name", ["KILL", "USR3", ""])
def test_signals_that_cannot_be_caught_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a signal .*; pass names"):
        PreemptionFlag(signals=(name,))


def test_a_thread_and_a_second_entry_are_refused() -> None:
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with PreemptionFlag():
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    with PreemptionFlag() as flag, pytest.raises(RuntimeError, match="twice"):
        flag.__enter__()


def test_a_forked_child_keeps_its_own_copy_unraised() -> None:
    with PreemptionFlag() as flag:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if not flag.is_set else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert not flag.is_set


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_warned_process_finishes_its_step_then_leaves_with_75(number: signal.Signals) -> None:
    process = start(TRAINER)
    time.sleep(0.1)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.02)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert output.splitlines() == ["finished 0", f"saved 0 {number.name} False"]


def test_without_the_flag_the_same_signal_kills() -> None:
    process = start('import time; print("ready", flush=True); time.sleep(20)')
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=10) == -signal.SIGUSR2


def test_ignoring_makes_a_process_deaf() -> None:
    child = os.fork()
    if child == 0:
        ignore_preemption_signals()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9


def test_forked_loader_workers_survive_signals_to_the_whole_process_group() -> None:
    process = start(LOADER)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output.splitlines() == ["saved True"]
