"""pretrain.py whose steps take turns with another process's, so that two settings are timed under one load.

    python paired_pretrain.py READ_FD WRITE_FD REPORT CONFIG [key=value ...]

Before each step a byte is read from READ_FD, after it one is written to WRITE_FD. REPORT becomes JSON: when the first
step was reached, the seconds of every step, the seconds from the last one to the end, and every connection that this
process opened from Python.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

STARTED = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

connections: list[str] = []


def audit(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        connections.append(f"{threading.current_thread().name} {event} {arguments!r}")


def main(read_fd: int, write_fd: int, report: Path, arguments: list[str]) -> int:
    import pretrain
    from training.trainer import Trainer

    times: list[float] = []
    reached: list[float] = []
    step = Trainer._train_step

    def take_turns(trainer: Trainer) -> None:
        reached.append(time.time())
        os.read(read_fd, 1)  # empty once the other has ended
        started = time.perf_counter()
        step(trainer)
        times.append(time.perf_counter() - started)
        with contextlib.suppress(BrokenPipeError):
            os.write(write_fd, b".")

    Trainer._train_step = take_turns  # type: ignore[method-assign]
    sys.addaudithook(audit)
    code = pretrain.main(arguments)
    document = {
        "first_step_s": reached[0] - STARTED,
        "step_s": times,
        "after_last_step_s": time.time() - reached[-1] - times[-1],
        "connections": connections,
    }
    report.write_text(json.dumps(document))
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
