"""The benchmark of the mixture runs at a toy size, its accuracy check can fail, and the report keeps verdicts."""

import json
import sys

import pytest
import torch

from benchmarks import gmm, report


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
