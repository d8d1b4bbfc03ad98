"""Instruction sets and threads that a setting of `make test-isa` asks for are the ones under which tests run."""

import os

import pytest
import torch
from threadpoolctl import threadpool_info

from tests.helpers import isa_matrix


@pytest.mark.learned
def test_what_was_asked_for_is_in_force(record_property, capfd):
    convolution, image = torch.nn.Conv2d(3, 8, 3), torch.randn(2, 3, 16, 16)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON), torch.no_grad():
        convolution(image)
    lines = capfd.readouterr().out.splitlines()
    onednn = next(
        (line.split("isa:")[1].split(" and ")[0] for line in lines if "cpu,isa:" in line), "unknown"
    )
    blas = {found["architecture"] for found in threadpool_info() if found["internal_api"] == "openblas"}
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    said = f"{threads} threads, torch {capability}, oneDNN {onednn}, OpenBLAS {'/'.join(sorted(blas))}"
    record_property(isa_matrix.IN_FORCE, said)
    assert threads == int(os.environ["OMP_NUM_THREADS"])
    if asked := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert capability.lower() == asked
    if asked := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        assert onednn in ("unknown", f"Intel {asked}")
    if asked := os.environ.get("OPENBLAS_CORETYPE"):
        assert blas == {asked}


def test_the_matrix_reports_failures_ranges_and_settings(tmp_path, monkeypatch, capsys):
    """A planted test fails under one setting alone: the matrix names it, and fails."""
    (tmp_path / "test_planted.py").write_text(
        "import os\nimport pytest\n\n\n@pytest.mark.learned\ndef test_planted(record_property):\n"
        "    threads = int(os.environ['OMP_NUM_THREADS'])\n    record_property('threads', threads)\n"
        "    assert threads < 4\n"
    )
    monkeypatch.setattr(isa_matrix, "SETTINGS", {n: {"OMP_NUM_THREADS": n} for n in ("1", "4")})
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-c {tmp_path / 'pytest.ini'}")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    learned: a\n    slow: b\n")
    assert isa_matrix.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith(("1 ", "4 "))] == [
        ["1", "1", "0"],
        ["4", "0", "1"],
    ]
    assert lines[-1] == "4: test_planted::test_planted"
    assert any(line.split() == ["1", "4", "test_planted::test_planted", "threads"] for line in lines)
