"""The benchmark of the mixture runs at a toy size, its accuracy check can fail, and the report keeps verdicts."""

import json
import sys

import pytest
import torch

from benchmarks import gmm, report
from benchmarks._bars import judge
from benchmarks._timing import Timing


@pytest.mark.parametrize("name", sorted(gmm.CONTESTANTS))
def test_contestants_take_a_step(name):
    step = gmm.CONTESTANTS[name](16, 32, 8, "cpu")
    for _ in range(2):
        step()


@pytest.mark.learned
@pytest.mark.parametrize("cosine", [0.0, 0.9, 0.9999])
def test_responsibilities_are_exact_at_the_variance_floor(cosine, record_property):
    error = gmm.compute_l1_error(cosine, num_prototypes=512, dim=256, num_rows=16)
    record_property("error", error)
    assert error <= gmm.MAX_L1_ERROR


def test_the_accuracy_check_sees_rounded_products(monkeypatch):
    """bf16 operands, as a GPU's fast products would have them, fail the bar by far."""
    exact = gmm.DiagonalGmm.row_features
    monkeypatch.setattr(
        gmm.DiagonalGmm, "row_features", lambda self, rows: exact(self, rows).to(torch.bfloat16).float()
    )
    assert gmm.compute_l1_error(0.9, num_prototypes=512, dim=256, num_rows=16) > gmm.MAX_L1_ERROR


@pytest.mark.parametrize(("code", "verdict"), [(0, "pass"), (1, "FAIL")])
def test_a_report_keeps_lines_verdict_and_exit_code(code, verdict, tmp_path, monkeypatch, capsys):
    line = f"x 3.00x | {'PASS' if code == 0 else 'FAIL'} >= 2.0x"
    (tmp_path / "fake_benchmark.py").write_text(f"import sys; print({line!r}); sys.exit({code})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "COMMANDS", {"fake": "fake_benchmark"})
    monkeypatch.setattr(sys, "argv", ["report", "--out", str(tmp_path / "out")])
    assert report.main() == code
    kept = json.loads((tmp_path / "out" / "fake.json").read_text())
    assert kept["lines"] == [line]
    assert kept["exit_code"] == code
    assert f"| fake | {verdict} | x 3.00x" in (tmp_path / "out" / "report.md").read_text()


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "nonsense"])
    assert report.main() == 2
    assert "benchmark is nonsense; expected one of gmm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "device", "limits", "passed", "text"),
    [
        (1.2, "cpu", {"least": 1.3}, False, "FAIL >= 1.3x"),
        (1.3, "cpu", {"least": 1.3}, True, "PASS >= 1.3x"),
        (0.6, "cpu", {"most": 0.5, "unit": " GiB"}, False, "FAIL <= 0.5 GiB"),
        (0.5, "cpu", {"most": 0.5}, True, "PASS <= 0.5x"),
        (0.1, "cuda", {"least": 1.3}, True, "NO BAR on cuda (on cpu >= 1.3x)"),
        (2.0, "cuda", {"most": 1.5, "bar_of": "cuda"}, False, "FAIL <= 1.5x"),
        (2.0, "cpu", {"most": 1.5, "bar_of": "cuda"}, True, "NO BAR on cpu (on cuda <= 1.5x)"),
    ],
)
def test_a_bar_judges_on_its_own_device_alone(value, device, limits, passed, text):
    assert judge(value, device, **limits) == (passed, text)


@pytest.mark.parametrize(("device", "passes"), [("cpu", False), ("cuda", True)])
def test_no_bar_of_the_cpu_is_applied_to_a_gpu(device, passes, capsys):
    """On a GPU a step as slow as its peer breaks no promise: none was made there."""
    slow = Timing(1.0, 1.0, 0.0, 0)
    assert gmm.print_ratio("eager", slow, slow, 1.4, 1.0, device) is passes
    assert ("NO BAR on cuda" in capsys.readouterr().out) is passes


def test_a_benchmark_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    started = "import subprocess, sys; print('before', flush=True); subprocess.run(['sleep', '60'])"
    (tmp_path / "sleeper.py").write_text(started)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = report.run("sleeper", "sleeper", tmp_path, timeout_s=3)
    assert result["timed_out"]
    assert result["seconds"] < 30  # the pipe that the grandchild holds closes too
    assert "| sleeper | timed out | before |" in report.write_table([result])
