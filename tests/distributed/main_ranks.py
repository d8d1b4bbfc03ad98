"""What `Process.do_on_main` gives every rank: a value, a user's mistake, and a rank 0 that takes too long.

RANK=.. WORLD_SIZE=.. python -m tests.distributed.main_ranks OUT_DIR
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from runtime import distributed
from runtime.program import Fault


def refuse() -> None:
    raise ValueError("data.images is 'x'; expected a folder")


def main(out: Path) -> None:
    process = distributed.start("cpu", timeout_s=2.0)
    # Longer than a collective may take, and within its own time.
    found = {"value": process.do_on_main(lambda: time.sleep(3) or process.rank + 7, "sleep", 60.0, "a.key")}
    for name, act, timeout_s in (("mistake", refuse, 60.0), ("late", lambda: time.sleep(4), 1.0)):
        try:
            process.do_on_main(act, "write the shards", timeout_s, "data.images_timeout_s")
            found[name] = ""
        except (ValueError, Fault) as error:
            found[name] = f"{type(error).__name__}: {error}"
    (out / f"rank-{process.rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the ranks no longer agree: nothing collective may follow


if __name__ == "__main__":
    main(Path(sys.argv[1]))
