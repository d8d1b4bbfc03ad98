"""`run.collective_timeout_s` holds for every group, those that engines make for themselves included."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.distributed.timeout_ranks import TIMEOUT_S
from tests.helpers.digits import write_digit_shards
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "engine", ["engine.deepspeed_config=ds_configs/zero1_fp32.json", "engine.name=fsdp2"]
)
def test_every_group_has_the_runs_timeout(engine: str, tmp_path: Path) -> None:
    shards = write_digit_shards(tmp_path / "digits", num_train=96, num_test=48)
    out = tmp_path / "timeouts.json"
    run_ranks("tests.distributed.timeout_ranks", [str(out), shards, engine], 2, log_dir=tmp_path / "logs")
    found = json.loads(out.read_text())
    assert len(found["after"]) >= 3 and set(found["after"]) == {TIMEOUT_S}
    if "deepspeed" in engine:  # which clones the world's group, with the backend's half an hour
        assert set(found["before"]) != {TIMEOUT_S}


def test_no_group_of_ours_takes_the_backends_timeout() -> None:
    calls = [
        (path.name, node)
        for room in ("runtime", "training", "evaluation", "prototypes")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("new_group", "init_process_group")
    ]
    assert len(calls) >= 3
    assert not [name for name, call in calls if "timeout" not in {keyword.arg for keyword in call.keywords}]


def test_ranks_wait_for_what_the_first_one_does_as_long_as_they_were_told(tmp_path: Path) -> None:
    run_ranks("tests.distributed.main_ranks", [str(tmp_path)], 2, log_dir=tmp_path / "logs")
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["value"] == second["value"] == 7
    assert first["mistake"] == second["mistake"] == "ValueError: data.images is 'x'; expected a folder"
    assert second["late"].startswith("Fault: rank 1 waited for rank 0 to write the shards")
    assert "within 1 s" in second["late"] and second["late"].endswith("set data.images_timeout_s")
