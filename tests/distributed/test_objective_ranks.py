"""The losses of two gloo ranks equal the originals' of the whole batch, rows split between the ranks."""

import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.references import Recording


def test_two_ranks_equal_the_originals_on_the_whole_batch(tmp_path):
    run_ranks("tests.distributed.objective_ranks", [str(tmp_path)], 2, log_dir=tmp_path / "logs")
    ranks = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    assert len(ranks[0]) == 5
    for name, first in ranks[0].items():
        saved = Recording(name)
        for key, value in first.items():
            mean = (value + ranks[1][name][key]) / 2
            torch.testing.assert_close(
                mean,
                saved[key],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text, name=name, key=key: f"{name}.{key}: {text}",
            )
            scale = float(saved[key].abs().max())
            assert float((mean - saved[key]).abs().max()) <= 1e-4 * scale, (name, key)
            if "centre_" in key:
                assert torch.equal(value, ranks[1][name][key]), (name, key, "ranks differ")
