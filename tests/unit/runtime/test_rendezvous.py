"""Where ranks meet: launchers, Slurm's steps and shells, node lists, ports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.rendezvous import find_rendezvous, first_host

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[007-010]",
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
}

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"}


def port_of(**environment: str) -> int:
    return int(find_rendezvous(STEP | environment)["MASTER_PORT"])


def test_without_a_launcher_this_is_one_process() -> None:
    found = find_rendezvous({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_torchrun_is_taken_as_it_is() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert find_rendezvous(environment | STEP) == environment
    assert find_rendezvous(environment | STEP, has_terminal=True) == environment


def test_a_step_of_srun_is_a_launch() -> None:
    found = find_rendezvous(STEP)
    assert {key: found[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
    }
    # A step of fewer tasks than its job: the job's number is not the step's.
    assert find_rendezvous(STEP | {"SLURM_STEP_NUM_TASKS": "6"})["WORLD_SIZE"] == "6"


ALONE = {
    "only counted": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),
    "salloc": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, True),
    "salloc with an interactive step": (STEP | {"SLURM_STEP_ID": "4294967290"}, True),
    "a batch script without srun": (STEP | {"SLURM_STEP_ID": "4294967291"}, False),
    "a batch script of older Slurm": ({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}, False),
    "srun --pty": (STEP, True),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_allocation_is_no_launch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    environment, has_terminal = ALONE[name]
    found = find_rendezvous(environment, has_terminal)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert "SLURM_NTASKS" in caplog.text and "srun python" in caplog.text


def test_one_task_is_alone_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    one = STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_rendezvous(one)["WORLD_SIZE"] == "1" and not caplog.text


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0"}, "RANK"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected a number from 1 on"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is '5'; expected a number from 0 to 1"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1'"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '99"),
        (TWO | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        (TWO | {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; expected a number from 1 to 65535"),
        (TWO | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        (STEP | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({key: text for key, text in STEP.items() if key != "SLURM_JOB_NODELIST"}, "node list is ''"),
    ],
)
def test_half_a_rendezvous_is_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        find_rendezvous(environment)


def test_ports_differ_by_step_and_job_and_are_not_the_systems_own() -> None:
    ports = {
        port_of(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in range(700) for step in range(16)
    }
    assert len(ports) == 700 * 16
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    assert max(ports) < 32768 and min(ports) >= 1024
    if ephemeral.exists() and int(ephemeral.read_text().split()[0]) >= 32768:
        assert max(ports) < int(ephemeral.read_text().split()[0])
    assert port_of() == port_of(SLURM_PROCID="0", SLURM_LOCALID="0"), "every rank finds the same one"
    assert port_of(SLURM_STEP_RESV_PORTS="12001-12008") == 12001
    assert port_of(MASTER_PORT="7") == 7


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-005,9],x", "gpu003"),
        ("a-b[7]", "a-b7"),
        ("r1[2,4]c", "r12c"),
        ("rack1n[1-2]m[01-04]", "rack1n1m01"),
        ("a[1,3]b[02,04-05]c[7]d,e[1-2]", "a1b02c7d"),
        ("login.site.org,b", "login.site.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "[", "a[", "a[1", "a[1-]", "a]", "a[x-y]", "a b"])
def test_what_is_no_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        first_host(nodes)


NUMBERS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=3)
PART = st.tuples(st.from_regex(r"[a-z][a-z0-9.-]{0,4}[a-z]", fullmatch=True), NUMBERS | st.none())


@given(
    hosts=st.lists(st.lists(PART, min_size=1, max_size=3), min_size=1, max_size=3), width=st.integers(1, 4)
)
def test_first_host_is_the_first_of_all_that_are_written(hosts: list, width: int) -> None:
    """Against a writer that knows the first host of every list it writes."""
    written, firsts = [], []
    for parts in hosts:
        text, first = "", ""
        for name, numbers in parts:
            text, first = text + name, first + name
            if numbers:
                pieces = [
                    f"{low:0{width}d}" + (f"-{low + more:0{width}d}" if more else "") for low, more in numbers
                ]
                text, first = f"{text}[{','.join(pieces)}]", f"{first}{numbers[0][0]:0{width}d}"
        written.append(text)
        firsts.append(first)
    assert first_host(",".join(written)) == firsts[0]
    assert not re.search(r"[\[\],]", firsts[0])
