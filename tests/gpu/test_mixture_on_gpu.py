"""The mixture on a GPU: the Triton E-step beside torch's, and steps that do not wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from prototypes.mixture.kernel import KEPT, MAX_L1_ERROR
from tests.helpers.gpu_waits import counted_waits
from tests.unit.prototypes.building import MIXTURES, build, clustered_rows, make_config, take_step

NUM_PROTOTYPES, DIM = 4096, 64
MAX_WAITS = 2


@contextmanager
def forbidden_waits() -> Iterator[None]:
    """What waits for the GPU inside raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("product", ["fp32", "bf16x3"])
@pytest.mark.parametrize("num_rows", [1, 128, 200])
def test_the_kernel_finds_what_torch_finds_and_waits_for_nothing(num_rows: int, product: str) -> None:
    from prototypes.mixture.triton_e_step import scan_components

    generator = torch.Generator("cuda").manual_seed(0)
    features, theta = (
        torch.randn(n, 2 * DIM, device="cuda", generator=generator) for n in (num_rows, NUM_PROTOTYPES + 37)
    )
    offset = torch.randn(NUM_PROTOTYPES + 37, device="cuda", generator=generator)
    scan_components(features, theta, offset, 0.7, KEPT, product)  # compiles
    with forbidden_waits():
        top = scan_components(features, theta, offset, 0.7, KEPT, product)
    exact = 0.7 * (features.double() @ theta.double().T) + offset
    torch.testing.assert_close(top.maximum.double(), exact.amax(1), rtol=0, atol=2e-2)
    gamma = (top.logit - top.log_normaliser[:, None]).exp()
    error = (gamma - exact.softmax(1).gather(1, top.component)).abs().sum(1).max()
    assert error <= MAX_L1_ERROR
    kept = exact.softmax(1).topk(KEPT, dim=1).values.sum(1)
    torch.testing.assert_close(gamma.sum(1).double(), kept, rtol=0, atol=MAX_L1_ERROR)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_moves_with_triton_as_with_torch(family: str) -> None:
    found = []
    for kernel in ("torch", "triton"):
        config = make_config(NUM_PROTOTYPES, DIM, estimator=family, size=512, kernel=kernel)
        estimator = build(config, device="cuda")
        for seed in range(6):
            take_step(estimator, clustered_rows(128, DIM, num_clusters=64, seed=seed).cuda())
        found.append(estimator.prototypes("teacher").clone())
    torch.testing.assert_close(*found, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_sparse_step_waits_at_most_twice(kernel: str) -> None:
    estimator = build(make_config(NUM_PROTOTYPES, DIM, size=512, kernel=kernel), device="cuda")
    rows = clustered_rows(128, DIM, num_clusters=64).cuda()
    for _ in range(5):
        take_step(estimator, rows)
    with counted_waits() as waits:
        take_step(estimator, rows)
    assert len(waits) <= MAX_WAITS, waits
