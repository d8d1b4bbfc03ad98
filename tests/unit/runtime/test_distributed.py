import pytest

from runtime.distributed import find_rendezvous, first_host


def test_without_a_launcher_this_is_one_process():
    found = find_rendezvous({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_torchrun_is_taken_as_it_is():
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert find_rendezvous(environment | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == environment


def test_slurm_is_mapped():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "gpu[007-010]",
        "SLURM_JOB_ID": "123",
    }
    found = find_rendezvous(environment)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "20123",
    }


def test_half_a_rendezvous_is_refused():
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        find_rendezvous({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK"):
        find_rendezvous({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[003-005,9],x", "gpu003"), ("a-b[7]", "a-b7"), ("r1[2,4]c", "r12c")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first
