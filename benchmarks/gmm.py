"""Speed and accuracy of one online EM step beside its peers: python -m benchmarks.gmm [--large] [--device cuda].

Contestants: `ours`; `eager`, the same GEMM form with a fresh tensor for every intermediate; `broadcast`, the
[N, K, P] form; `sklearn`, GaussianMixture's E and M step in fp32; `shrunk`, ours with the default shrinkage, where the
natural parameters of all components move; `before`, ours of the last commit whose steps move every component, unpacked
from git. Exit code 1 if a figure misses its bar. On a GPU: K = 65,536 and 262,144 beside the eager form and the floor
of the bytes, a goal; the CPU's bars are not applied.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from runtime.usage import HelpFormatter, positive

SMALL = (128, 2048, 256)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gmm", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="also K = 65,536")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of all contestants")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    for name, value in zip("NKD", SMALL, strict=True):
        parser.add_argument(f"--{name}", type=positive, default=value, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

import numpy as np
import torch

from benchmarks._bars import judge
from benchmarks._ceiling import Ceiling, measure
from benchmarks._checkout import unpack_commit
from benchmarks._timing import Timing, compare, describe_noise, serve
from prototypes.build import build_estimator
from prototypes.config import PartitionConfig, PrototypesConfig
from prototypes.families.gmm_diag import DiagonalGmm
from prototypes.mixture.config import AnnealingConfig, GmmConfig, VarianceConfig
from prototypes.mixture.publication import Publication

MAX_L1_ERROR = 5e-3
MAX_EXTRA_GIB = 0.15
COMMIT_BEFORE = "01653f3"
"""Last commit whose steps move every component."""
FLOOR_GOAL = 1.5
LARGE = (128, 65536, 256)
HUGE = (128, 262144, 256)
_FORGETTING = 0.95
_NUM_BATCHES = 8
_LATE_STEP = 1000


def main() -> int:
    """Runs the comparison, prints one line per ratio, returns the exit code."""
    arguments = parse(sys.argv[1:])
    if arguments.contestant:
        torch.manual_seed(0)
        build = CONTESTANTS[arguments.contestant]
        serve(build(arguments.N, arguments.K, arguments.D, arguments.device), arguments.device)
        return 0
    ceiling = measure(arguments.device)
    print(ceiling, "|", describe_device(arguments.device), "|", describe_noise())
    passed = report_accuracy(arguments.device)
    if arguments.device != "cpu":
        for shape in (LARGE, HUGE):
            passed &= report(shape, ceiling, {"eager": 1.4}, arguments)
        return 0 if passed else 1
    passed &= report(SMALL, ceiling, {"broadcast": 20.0, "sklearn": 1.3}, arguments)
    if arguments.large:
        with tempfile.TemporaryDirectory() as directory:
            checkout = unpack_commit(COMMIT_BEFORE, Path(directory))
            before = {"before": 2.0} if checkout else {}
            if not checkout:
                print(f"  before: not run, commit {COMMIT_BEFORE} is not in this checkout")
            passed &= report(LARGE, ceiling, {"eager": 1.4, **before}, arguments, checkout)
    return 0 if passed else 1


def describe_device(device: str) -> str:
    """Returns what the figures were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def report(
    shape: tuple[int, int, int],
    ceiling: Ceiling,
    floors: dict[str, float],
    arguments: argparse.Namespace,
    checkout: Path | None = None,
) -> bool:
    """Prints times, ratios to peers and the distance to the machine's floor; returns whether all pass."""
    command = [f"--{name}={value}" for name, value in zip("NKD", shape, strict=True)]
    command.append(f"--device={arguments.device}")
    timings = compare(
        "benchmarks.gmm",
        ["ours", "shrunk", *floors],
        command,
        num_rounds=arguments.rounds,
        checkouts={"before": (checkout, "ours")} if checkout else None,
    )
    ours = timings["ours"]
    floor_s = compute_floor(shape, ceiling)
    sizes = " ".join(f"{name}={value}" for name, value in zip("NKD", shape, strict=True))
    goal = f", goal <= {FLOOR_GOAL}x" if arguments.device != "cpu" else ""
    print(
        f"gmm {sizes} | ours min {1e3 * ours.minimum:.2f} median {1e3 * ours.median:.2f} ms "
        f"({ours.minimum / floor_s:.1f}x floor {1e3 * floor_s:.2f} ms{goal})"
    )
    shrunk = timings["shrunk"]
    print(
        f"  with the default shrinkage min {1e3 * shrunk.minimum:.2f} median {1e3 * shrunk.median:.2f} ms | "
        f"{shrunk.minimum / ours.minimum:.2f}x of ours"
    )
    passed = True
    for name, least in floors.items():
        passed &= print_ratio(name, timings[name], ours, least, floor_s, arguments.device)
    if shape == LARGE:
        extra = ours.extra_bytes / 2**30
        verdict = judge(extra, arguments.device, most=MAX_EXTRA_GIB, unit=" GiB")
        passed &= verdict.passed
        print(f"  peak beside tables and natural parameters {extra:.2f} GiB | {verdict.text}")
    return passed


def print_ratio(name: str, peer: Timing, ours: Timing, least: float, floor_s: float, device: str) -> bool:
    """Prints one peer's line and returns whether its ratio of minima passes."""
    ratio = peer.minimum / ours.minimum
    verdict = judge(ratio, device, least=least)
    reach = peer.minimum / floor_s
    remark = f" (a step at the floor would reach {reach:.2f}x)" if reach < least else ""
    print(
        f"  {name} min {1e3 * peer.minimum:.2f} median {1e3 * peer.median:.2f} ms | {ratio:.2f}x of minima, "
        f"{peer.median / ours.median:.2f}x of medians | {verdict.text}{remark}"
    )
    return verdict.passed


def compute_floor(shape: tuple[int, int, int], ceiling: Ceiling) -> float:
    """Returns the least seconds of a sparse step: the product of its E-step, or the natural parameters read once."""
    num_rows, num_prototypes, dim = shape
    return ceiling.seconds(num_prototypes * 2 * dim * 4, 4 * num_rows * num_prototypes * dim)


# ------------------------------------------------------------------------------------------- contestants


def build_ours(
    num_rows: int, num_prototypes: int, dim: int, device: str, shrinkage: float = 0.0
) -> Callable[[], object]:
    """Our estimator past its first steps, tables and natural parameters allocated; batches differ from step to step."""
    beta = AnnealingConfig(schedule="constant", guard=None)
    config = PrototypesConfig(
        num_prototypes=num_prototypes,
        dim=dim,
        partition=PartitionConfig(size=num_prototypes // 4),
        gmm=GmmConfig(beta=beta, variance=VarianceConfig(shrinkage=shrinkage)),
    )
    estimator = build_estimator(
        config, seed=0, num_observations_per_epoch=2_560_000, total_steps=1000, device=device
    )
    assert isinstance(estimator, DiagonalGmm)
    batches = torch.randn(_NUM_BATCHES, num_rows, dim, device=device)
    # In its first steps the running mean moves, and with it all natural parameters.
    estimator.step = _LATE_STEP

    def step() -> None:
        estimator.commit(estimator.observe(batches[estimator.step % _NUM_BATCHES]))
        estimator.accept()

    for _ in range(_NUM_BATCHES):
        step()
    # What a step needs beside tables and natural parameters is made anew, and counts as extra memory.
    estimator._publication, estimator._blocks = Publication(), None
    return step


def build_shrunk(num_rows: int, num_prototypes: int, dim: int, device: str) -> Callable[[], object]:
    """The same with the default shrinkage."""
    return build_ours(num_rows, num_prototypes, dim, device, VarianceConfig().shrinkage)


class _PlainMixture:
    """State of the peers that are written here."""

    def __init__(self, num_rows: int, num_prototypes: int, dim: int, device: str) -> None:
        self.rows = torch.nn.functional.normalize(torch.randn(num_rows, dim, device=device), dim=1)
        self.means = torch.nn.functional.normalize(torch.randn(num_prototypes, dim, device=device), dim=1)
        self.variances = torch.full((num_prototypes, dim), 1.0 / dim, device=device)
        self.counts = torch.ones(num_prototypes, device=device)
        self.weights = torch.full((num_prototypes,), 1.0 / num_prototypes, device=device)

    def m_step(self, mass: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """M-step with a fresh tensor per intermediate; returns unit means."""
        kept = _FORGETTING**mass
        gain = (1 - kept) / (1 - _FORGETTING)
        counts = kept * self.counts + gain
        rate = (gain / counts)[:, None]
        safe = mass.clamp_min(1e-6)[:, None]
        mean, square = first / safe, second / safe
        shift = mean - self.means
        new_variances = (1 - rate) * self.variances + rate * (square - mean**2) + rate * (1 - rate) * shift**2
        self.means = self.means + rate * shift
        self.variances = new_variances.clamp_min(0.05 / self.means.shape[1])
        self.counts = counts
        self.weights = 0.99 * self.weights + 0.01 * mass / mass.sum()
        return torch.nn.functional.normalize(self.means, dim=1)


def build_eager(num_rows: int, num_prototypes: int, dim: int, device: str) -> Callable[[], object]:
    """GEMM form, nothing in place, nothing in chunks."""
    mixture = _PlainMixture(num_rows, num_prototypes, dim, device)

    def step() -> torch.Tensor:
        h, mu, var = mixture.rows, mixture.means, mixture.variances
        features = torch.cat([h, h * h], dim=1)
        theta = torch.cat([mu / var, -0.5 / var], dim=1)
        bias = mixture.weights.log() - 0.5 * (mu * mu / var + (2 * torch.pi * var).log()).sum(1)
        gamma = torch.softmax(features @ theta.T + bias, dim=1)
        moments = gamma.T @ features
        return mixture.m_step(gamma.sum(0), moments[:, :dim], moments[:, dim:])

    return torch.no_grad()(step)


def build_broadcast(num_rows: int, num_prototypes: int, dim: int, device: str) -> Callable[[], object]:
    """The equations as they are printed: [N, K, P] differences."""
    mixture = _PlainMixture(num_rows, num_prototypes, dim, device)

    def step() -> torch.Tensor:
        h, mu, var = mixture.rows, mixture.means, mixture.variances
        difference = h[:, None, :] - mu[None]
        log_rho = mixture.weights.log() - 0.5 * (difference**2 / var + (2 * torch.pi * var).log()).sum(-1)
        gamma = torch.softmax(log_rho, dim=1)
        first = (gamma[..., None] * h[:, None, :]).sum(0)
        second = (gamma[..., None] * (h * h)[:, None, :]).sum(0)
        return mixture.m_step(gamma.sum(0), first, second)

    return torch.no_grad()(step)


def build_sklearn(num_rows: int, num_prototypes: int, dim: int, device: str) -> Callable[[], object]:
    """scikit-learn's E and M step, single precision."""
    from sklearn.mixture import GaussianMixture

    mixture = _PlainMixture(num_rows, num_prototypes, dim, device)
    model = GaussianMixture(num_prototypes, covariance_type="diag")
    model.weights_, model.means_ = mixture.weights.numpy(), mixture.means.numpy()
    model.covariances_ = mixture.variances.numpy()
    model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_)
    rows = mixture.rows.numpy()

    def step() -> None:
        _, log_responsibilities = model._e_step(rows)
        model._m_step(rows, log_responsibilities)

    return step


CONTESTANTS: dict[str, Callable[[int, int, int, str], Callable[[], object]]] = {
    "ours": build_ours,
    "shrunk": build_shrunk,
    "eager": build_eager,
    "broadcast": build_broadcast,
    "sklearn": build_sklearn,
}


# ------------------------------------------------------------------------------------------- accuracy


def report_accuracy(device: str) -> bool:
    """Prints the L1 error of the responsibilities against fp64 at the variance floor; returns whether all pass."""
    passed = True
    for cosine in (0.0, 0.9, 0.9999):
        error = compute_l1_error(cosine, device=device)
        passed &= error <= MAX_L1_ERROR
        verdict = "PASS" if error <= MAX_L1_ERROR else "FAIL"
        print(f"  L1(gamma) {error:.1e} at mean cosine {cosine} | {verdict} <= {MAX_L1_ERROR:.0e}")
    return passed


def compute_l1_error(
    cosine: float, num_prototypes: int = 2048, dim: int = 256, num_rows: int = 128, device: str = "cpu"
) -> float:
    """Returns the largest L1 error of a row's responsibilities, with every variance at the floor."""
    estimator, rows = place_at_the_variance_floor(cosine, num_prototypes, dim, num_rows)
    seen = estimator.preprocess(rows).double()
    responsibilities = estimator.to(device).responsibilities(rows.to(device)).cpu().double()
    estimator.cpu()
    exact = torch.stack(
        [
            -0.5 * ((row - estimator.means.double()) ** 2 / estimator.variances.double()).sum(1)
            - 0.5 * estimator.variances.double().log().sum(1)
            for row in seen
        ]
    ).softmax(1)
    return float((responsibilities - exact).abs().sum(1).max())


def place_at_the_variance_floor(
    cosine: float, num_prototypes: int, dim: int, num_rows: int
) -> tuple[DiagonalGmm, torch.Tensor]:
    """Returns a mixture whose variances are all at the floor, and rows [num_rows, dim].

    Rows lie between pairs of means, so that several components compete for each.
    """
    generator = torch.Generator().manual_seed(0)
    floor = 0.05
    config = PrototypesConfig(
        num_prototypes=num_prototypes,
        dim=dim,
        partition=PartitionConfig(size=min(512, num_prototypes)),
        gmm=GmmConfig(variance=VarianceConfig(floor=floor, shrinkage=0.0)),
    )
    estimator = build_estimator(config, seed=0, num_observations_per_epoch=1000, total_steps=10)
    assert isinstance(estimator, DiagonalGmm)
    direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    noise = torch.nn.functional.normalize(torch.randn(num_prototypes, dim, generator=generator), dim=1)
    means = torch.nn.functional.normalize(cosine**0.5 * direction + (1 - cosine) ** 0.5 * noise, dim=1)
    estimator.means.copy_(means)
    centred = means - means.mean(0)
    estimator.row_mean.copy_(means.mean(0))
    estimator.row_covariance.copy_(centred.T @ centred / num_prototypes)
    estimator.variances.copy_(floor * estimator.row_covariance.diagonal().expand_as(means))
    partner = means[torch.randperm(num_prototypes, generator=generator)[:num_rows]]
    rows = torch.nn.functional.normalize(means[:num_rows] + partner, dim=1)
    return estimator, rows


if __name__ == "__main__":
    sys.exit(main())
