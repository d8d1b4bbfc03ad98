"""The check of a GPU goes on where it was stopped, repeats nothing finished and says where its figures belong."""

import json
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PART_LIMIT_S, PARTS, ROOT, Part, describe, find_places, main

FAKE = """
import pathlib, sys
count = pathlib.Path(sys.argv[1])
runs = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(runs))
print("x 3.00x |", sys.argv[2])
print(sys.argv[4:] and sys.argv[4], file=sys.stderr)
sys.exit(0 if runs > 1 and sys.argv[3] == "once" else int(sys.argv[3] if sys.argv[3] != "once" else 3))
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Puts parts in the place of the real ones, each a program that counts its runs; returns their counts."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def put(**parts):
        made = {
            name: Part("cuda only", f"fake_part {tmp_path / name}.count {end}", ("docs/engines.md",))
            for name, end in parts.items()
        }
        monkeypatch.setattr(gpu_check, "PARTS", made)
        return lambda name: int((tmp_path / f"{name}.count").read_text())

    return put


def check(tmp_path, *arguments):
    return main(["--tiny", "--out", str(tmp_path / "out"), *arguments])


def test_a_finished_part_is_not_run_again_and_a_failed_one_is(fakes, tmp_path, capsys):
    runs = fakes(good="'PASS >= 2x' 0", flaky="'-' once broken", missed="'FAIL >= 4x' 1")
    assert check(tmp_path) == 1
    page = (tmp_path / "out/gpu_check.md").read_text()
    assert "A rehearsal" in page
    assert "| pass | x 3.00x / PASS >= 2x |" in page
    assert "FAIL, exit code 3 | stderr: broken |" in page
    assert check(tmp_path) == 0
    assert [runs(name) for name in ("good", "flaky", "missed")] == [1, 2, 1]
    assert "good: has a record" in capsys.readouterr().out
    records = json.loads((tmp_path / "out/gpu_check.json").read_text())
    assert records["good"]["lines"] == ["x 3.00x | PASS >= 2x"]
    assert {"commit", "torch", "device", "load_before", "command"} <= records["good"].keys()


def test_parts_can_be_chosen_and_another_command_is_another_part(fakes, tmp_path):
    runs = fakes(good="PASS 0", other="PASS 0")
    assert check(tmp_path, "--parts", "other") == 0
    assert "Without a record: good." in (tmp_path / "out/gpu_check.md").read_text()
    fakes(good="PASS 0", other="PASS 0 changed")
    assert check(tmp_path) == 0
    assert (runs("good"), runs("other")) == (1, 2)


def test_a_batch_too_large_for_the_gpu_is_a_finding(fakes, tmp_path):
    runs = fakes(large="'-' 1 torch.OutOfMemoryError:")
    assert check(tmp_path) == check(tmp_path) == 0
    assert runs("large") == 1
    assert "| out of memory |" in (tmp_path / "out/gpu_check.md").read_text()


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hang.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "PARTS", {"hang": Part("", "hang", ())})
    monkeypatch.setattr(gpu_check, "PART_LIMIT_S", 2.0)
    assert check(tmp_path) == 1
    assert "| timed out | begun |" in (tmp_path / "out/gpu_check.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_it_stops_what_it_runs(number, tmp_path):
    program = (
        # A job that a shell has put into the background ignores SIGINT, and so would its children.
        "import pathlib, signal, sys; from benchmarks import report\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "report.run('sleeper', 'sleeper', pathlib.Path(sys.argv[1]))"
    )
    (tmp_path / "sleeper.py").write_text(
        "import os, subprocess\nprint(os.getpid(), flush=True)\nsubprocess.run(['sleep', '60'])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "sleeper.json").exists()  # no record: it is run again


def is_alive(pid):
    try:
        status = (gpu_check.Path("/proc") / str(pid) / "stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_without_a_gpu_only_a_rehearsal_is_run(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == "error: device is cpu; expected a CUDA GPU; set --tiny for a rehearsal\n"
    )
    assert main(["--parts", "nonsense"]) == 2
    assert "part is nonsense; expected one of ceilings" in capsys.readouterr().err


def test_every_part_names_files_and_every_gpu_test_is_in_one():
    for part in PARTS.values():
        assert all((ROOT / place).is_file() for place in part.places)
    commands = " ".join(part.command for part in PARTS.values())
    assert all(f"tests/gpu/{path.name}" in commands for path in (ROOT / "tests/gpu").glob("test_*.py"))
    for kind in ("gmm", "loss", "loader", "profile", "ceilings"):
        assert kind in PARTS
    batches = {name for name in PARTS if name.startswith("step-2x10-batch")}
    assert len(batches) >= 4 and any(name.startswith("step-2x8") for name in PARTS)
    assert all("--workers" in PARTS[name].command for name in PARTS if name.startswith("step-"))
    assert PART_LIMIT_S <= 8 * 60
    assert all(
        "{device}" in part.command for name, part in PARTS.items() if name.startswith(("gmm", "loss", "step"))
    )


def test_lines_that_wait_for_a_figure_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("fast\n**No figure here was measured on a GPU yet**\n")
    for name in ("estimator", "engines", "data", "slurm"):
        (tmp_path / f"docs/{name}.md").write_text(
            "**Not run**: anything\nrun on a CPU\n" if name == "estimator" else ""
        )
    record = {"device": "X", "torch": "2", "commit": None, "seconds": 1.0, "lines": [], "error": None}
    record |= {"exit_code": 0, "timed_out": False, "out_of_memory": False}
    assert find_places({"gmm": record}, tmp_path) == {
        "README.md:2": ("**No figure here was measured on a GPU yet**", ["all"]),
        "docs/estimator.md:1": ("**Not run**: anything", ["gmm"]),
    }
    assert find_places({}, tmp_path) == {}
    page = describe({"gmm": record}, tmp_path, is_tiny=False)
    assert "- docs/estimator.md:1 (gmm): **Not run**: anything" in page
    assert "rehearsal" not in page and "On X, torch 2, commit no commit." in page


def test_the_documents_have_such_lines_until_somebody_measures():
    """Once every figure is there, this test goes with the last line."""
    assert {place.split(":")[0] for place in find_places(dict.fromkeys(PARTS), ROOT)} >= {
        "README.md",
        "docs/estimator.md",
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)  # more than a test may take, whoever else uses the machine: its parts have limits
def test_the_rehearsal_runs_every_part(tmp_path):
    """Minutes: three processes of every benchmark, and a training step of six kinds."""
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu_check.md").read_text()
    assert "Without a record: none." in page
    assert "bf16 GEMM" in page and "images/s" in page and "skipped in" in page
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
