"""The Triton kernel finds what torch finds: in Triton's interpreter, on the CPU."""

import importlib.util
import logging
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks.gmm import MAX_L1_ERROR
from prototypes.mixture.kernel import (
    KEPT,
    choose_kernel,
    compute_l1_difference,
    find_obstacle,
    require_kernel,
)
from prototypes.mixture.sparse import TopLogits, find_top_logits, keep_largest, make_logit_blocks
from prototypes.statistics import Collectives
from tests.helpers.triton_cases import PRODUCTS, SHAPES, TRAINED
from tests.unit.prototypes.building import MIXTURES
from tests.unit.prototypes.lockstep import Lockstep

pytestmark = pytest.mark.timeout(900)  # a busy machine: the interpreter takes a hundred times a kernel's time
ROOT = Path(__file__).resolve().parents[4]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)
# Of |f| |theta|: the rounding of fp32 sums, and what the two bfloat16 parts of a number leave out.
RELATIVE_ERROR = {"fp32": 2e-6, "bf16x3": 3e-5}


@needs_triton
@pytest.mark.parametrize("is_bf16x3", [False, True])
def test_the_scan_compiles_for_an_h100(is_bf16x3):
    """Without one, and as the tests import it: what checks shapes must leave a kernel alone."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prototypes.mixture.triton_e_step import _TILES, _scan

    constants = {name: value for name, value in _TILES.items() if name.isupper()}
    constants |= {"KEPT": KEPT, "IS_BF16X3": is_bf16x3, "IS_INTERPRETED": False}
    types = dict.fromkeys(("features", "theta", "offset", "largest", "total"), "*fp32")
    types |= {"keys": "*i64", "beta": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in _scan.arg_names
    }
    source = ASTSource(fn=_scan, signature=signature, constexprs=constants)
    made = compile_kernel(source, target=GPUTarget("cuda", 90, 32))
    assert "mma" in made.asm["ptx"] if is_bf16x3 else "fma.rn.f32" in made.asm["ptx"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One child for all cases: of its ten seconds most are the imports of torch and triton."""
    out = tmp_path_factory.mktemp("triton") / "found.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.helpers.triton_cases", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def of_case(found, case, product):
    inputs, top = found[case, product]
    return inputs, TopLogits(*top)


def exact_logits(features, theta, offset, beta, kept):
    del kept
    return beta * (features.double() @ theta.double().T) + offset.double()


def with_torch(features, theta, offset, beta, kept):
    blocks = make_logit_blocks(len(features), len(theta), features.device)
    blocks.flatten(1)[:, : len(theta)] = beta * (features @ theta.T) + offset
    return find_top_logits(blocks, 0.0, largest=kept, fixed=True)


def spread(top, num_components):
    sparse = keep_largest(top, 0.0)
    return torch.zeros(len(top.component), num_components).scatter_add_(1, sparse.component, sparse.gamma)


@needs_triton
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("case", SHAPES)
def test_largest_logits_and_normaliser_are_those_of_float64(found, case, product):
    inputs, top = of_case(found, case, product)
    exact = exact_logits(*inputs)
    kept = inputs[-1]
    assert top.component.shape == top.logit.shape == (len(exact), kept)
    if len(exact) == 0:
        return
    lengths = [torch.linalg.vector_norm(part.double(), dim=1).max() for part in inputs[:2]]
    tolerance = float(RELATIVE_ERROR[product] * (lengths[0] * lengths[1] + inputs[2].abs().max()))
    expected, index = exact.topk(kept, dim=1)
    torch.testing.assert_close(top.logit + top.maximum[:, None], expected.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        top.log_normaliser + top.maximum, exact.logsumexp(1).float(), rtol=0, atol=tolerance
    )
    # Logits closer than the error may change places: what was kept is right where each is what it claims to be.
    torch.testing.assert_close(exact.gather(1, top.component), expected, rtol=0, atol=2 * tolerance)
    assert all(len(set(row)) == kept for row in top.component.tolist())
    assert (top.logit.diff(dim=1) <= 0).all()
    assert (top.logit[:, 0] == 0).all()
    assert index.shape == top.component.shape


@needs_triton
@pytest.mark.parametrize("product", PRODUCTS)
def test_of_equal_logits_the_lower_index_comes_first(found, product):
    """So does torch's dense path choose the winner of a row; which of two equal ones is left out changes no mass."""
    inputs, top = of_case(found, "ties", product)
    exact = exact_logits(*inputs).float()
    expected = exact.sort(dim=1, descending=True, stable=True)
    assert torch.equal(top.component, expected.indices[:, :8])
    assert torch.equal(top.logit + top.maximum[:, None], expected.values[:, :8])
    assert torch.equal(keep_largest(top, 1e-4).winner, exact.argmax(1))
    dropped = [keep_largest(found, 1e-4).dropped for found in (top, with_torch(*inputs))]
    torch.testing.assert_close(*dropped, rtol=0, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_family_gets_the_responsibilities_of_torch(found, family, product):
    inputs, top = of_case(found, family, product)
    reference = with_torch(*inputs)
    torch.testing.assert_close(
        keep_largest(top, 1e-5).dropped, keep_largest(reference, 1e-5).dropped, rtol=0, atol=1e-3
    )
    difference = (spread(top, 64) - spread(reference, 64)).abs().sum(1).max()
    assert difference <= {"fp32": 1e-4, "bf16x3": 1e-3}[product]


@needs_triton
@pytest.mark.learned
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cosine", [0.0, 0.9])
def test_responsibilities_are_exact_at_the_variance_floor(found, cosine, product, record_property):
    inputs, top = of_case(found, f"floor_{cosine}", product)
    exact = exact_logits(*inputs).softmax(1)
    # What is left out is in the normaliser and in the dropped mass, not in the error of the product.
    error = (
        ((top.logit - top.log_normaliser[:, None]).exp() - exact.gather(1, top.component)).abs().sum(1).max()
    )
    record_property("error", error)
    assert error <= MAX_L1_ERROR
    features, theta, offset, beta, _ = inputs
    rounded = beta * (features.bfloat16().float() @ theta.bfloat16().float().T) + offset
    assert (rounded.softmax(1) - exact).abs().sum(
        1
    ).max() > MAX_L1_ERROR  # one bfloat16 part alone is not enough


@needs_triton
@pytest.mark.parametrize("case", TRAINED)
def test_a_mixture_moves_as_it_does_with_torch(found, case):
    expected, _, was_dense = found[case, "torch"]
    state, kernel, is_dense = found[case, "triton"]
    assert kernel == "triton"
    assert not was_dense and not is_dense  # the steps were sparse: the kernel was at work
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-3, msg=name)


@needs_triton
def test_a_timing_chooses_and_the_state_keeps_it(found):
    """In the interpreter the kernel is thousands of times slower than torch."""
    assert found["auto"][1] == "torch"


# ------------------------------------------------------------------------------------------- which one is used


def top_of(logits):
    blocks = make_logit_blocks(*logits.shape, logits.device)
    blocks.flatten(1)[:, : logits.shape[1]] = logits
    return find_top_logits(blocks, 0.0, largest=8, fixed=True)


def choose(torch_ms, triton_ms, shift=0.0, collectives=None):
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    other = logits + shift * torch.arange(40) / 40
    paths = {"torch": lambda: top_of(logits), "triton": lambda: top_of(other)}
    clock = {paths["torch"]: torch_ms, paths["triton"]: triton_ms}
    return choose_kernel(paths, collectives or Collectives(), clock.__getitem__)


@pytest.mark.parametrize(
    ("torch_ms", "triton_ms", "shift", "chosen", "words"),
    [
        (2.0, 0.5, 0.0, "triton", "triton is 4.00x faster"),
        (0.5, 2.0, 0.0, "torch", "torch is 4.00x faster"),
        (2.0, 0.5, 0.1, "torch", "so triton is not used"),
    ],
)
def test_the_faster_path_is_used_if_it_is_exact(torch_ms, triton_ms, shift, chosen, words, caplog):
    with caplog.at_level(logging.INFO):
        assert choose(torch_ms, triton_ms, shift) == chosen
    assert f"E-step kernel: {chosen};" in caplog.text
    assert words in caplog.text


def test_all_ranks_choose_alike():
    """The first rank alone would take triton, the second torch: together they are faster with triton."""
    ranks = Lockstep(2)
    times = [(2.0, 0.5), (1.0, 1.5)]

    def body(rank):
        return choose(
            *times[rank], collectives=Collectives(rank, 2, ranks.reduce_sum(rank), ranks.gather(rank))
        )

    assert ranks.run(body) == ["triton", "triton"]


def test_without_rows_nothing_differs():
    empty = top_of(torch.zeros(0, 40))
    assert float(compute_l1_difference(empty, empty)) == 0


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for kernel in ("auto", "torch"):
        require_kernel(kernel, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"prototypes.gmm.kernel is triton and .*; set prototypes.gmm.kernel=auto"
    ):
        require_kernel("triton", torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        require_kernel("triton", torch.device("cuda"))


def test_a_gpu_without_a_compiler_keeps_to_torch(monkeypatch, tmp_path):
    """A slim image has none: "auto" must find that out before Triton raises, and "triton" says what is missing."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for name in ("TRITON_INTERPRET", "CC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_obstacle(gpu) == "no C compiler is found (CC, gcc or clang)"
    with pytest.raises(ValueError, match=r"gmm.kernel is triton and no C compiler is found .*kernel=auto"):
        require_kernel("triton", gpu)
    compiler = tmp_path / "clang"
    compiler.touch(mode=0o755)
    assert find_obstacle(gpu) is None
    (tmp_path / "Python.h").unlink()
    assert find_obstacle(gpu) == f"Python's headers are not in {tmp_path}"
