"""One private Slurm for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.private_cluster import PrivateCluster, missing_programs

KILL_WAIT_S = 10


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateCluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs Slurm and munge (apt-get install slurm-wlm munge), missing: {', '.join(missing)}")
    with PrivateCluster(kill_wait_s=KILL_WAIT_S) as private:
        yield private
