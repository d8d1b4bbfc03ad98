"""The checkpoint protocol in one process, and among threads that play the ranks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from training.checkpoints.files import (
    CheckpointError,
    list_committed,
    load_manifest,
    open_temporary,
    write_part,
)
from training.checkpoints.state_files import (
    ConsolidatedState,
    check_rng_state,
    collect_rng_state,
    collect_share,
    load_tree,
    restore_rng_state,
    save_tensors,
    save_tree,
    share_path,
)
from training.checkpoints.store import (
    CheckpointStore,
    check_checkpoint,
    find_latest_checkpoint,
    find_problems,
    save_checkpoint,
    settle_on,
)


class ThreadPeers:
    """The ranks of a run as threads: collectives through one shared list and a barrier."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        self.rank, self.world_size, self._shared = rank, world_size, shared

    def all_gather_object(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait(timeout=20)
        values = list(self._shared["values"])
        self._shared["barrier"].wait(timeout=20)
        return values

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def agree_any(self, flag: bool) -> bool:
        return any(self.all_gather_object(flag))


ALONE = ThreadPeers(0, 1, {})


def on_ranks(world_size: int, work: Any) -> list[Any]:
    """Runs `work(process)` on every rank and returns what each returned or raised."""
    shared = {"values": [None] * world_size, "barrier": threading.Barrier(world_size)}
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadPeers(rank, world_size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def writer(value: float, rank: int = 0):
    def write(directory: Path) -> None:
        save_tensors(directory / f"part-{rank}.safetensors", {"weight": torch.full((64,), value)})
        (directory / "notes").mkdir()
        (directory / "notes" / f"rank-{rank}.json").write_text(json.dumps({"value": value}))

    return write


def save(root: Path, step: int, **options: Any):
    return save_checkpoint(root, step, writer(float(step)), ALONE, **options)


def test_a_save_is_committed_listed_and_found(tmp_path: Path) -> None:
    outcome = save(tmp_path / "checkpoints", 7, facts={"config": "abc"})
    assert outcome.path == tmp_path / "checkpoints" / "step-00000007"
    manifest = load_manifest(outcome.path)
    assert [entry["path"] for entry in manifest["files"]] == ["notes/rank-0.json", "part-0.safetensors"]
    assert manifest["facts"] == {"config": "abc"} and manifest["step"] == 7
    assert find_latest_checkpoint(tmp_path / "checkpoints", ALONE) == outcome.path


def test_a_copy_under_the_name_of_another_step_is_neither_deleted_nor_taken_for_that_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    for copy in (5, 30, 40):
        shutil.copytree(tmp_path / "step-00000010", tmp_path / f"step-{copy:08d}")
    assert (
        find_latest_checkpoint(tmp_path, ALONE) == tmp_path / "step-00000010"
    )  # marks the newer copies rejected
    save(tmp_path, 20, keep_last=2)
    assert (tmp_path / "step-00000010").exists(), "copies do not count among the kept"
    assert save(tmp_path, 30, keep_last=1).path == tmp_path / "step-00000030"
    assert load_manifest(tmp_path / "step-00000030")["step"] == 30
    names = sorted(path.name for path in tmp_path.iterdir())
    aside = names.pop(2)
    assert names == ["step-00000005", "step-00000030", "step-00000040"]
    assert aside.startswith("step-00000030-copy-") and aside in caplog.text
    assert json.loads((tmp_path / aside / "MANIFEST.json").read_text())["step"] == 10


def test_all_ranks_write_side_by_side(tmp_path: Path) -> None:
    outcomes = on_ranks(3, lambda peers: save_checkpoint(tmp_path, 5, writer(1.0, peers.rank), peers))
    assert len({outcome.path for outcome in outcomes}) == 1
    assert len(load_manifest(outcomes[0].path)["files"]) == 6
    assert {e["rank"] for e in load_manifest(outcomes[0].path)["files"]} == {0, 1, 2}
    assert on_ranks(2, lambda peers: find_latest_checkpoint(tmp_path, peers)) == [outcomes[0].path] * 2


def test_ranks_that_disagree_on_the_step_stop(tmp_path: Path) -> None:
    results = on_ranks(2, lambda peers: save_checkpoint(tmp_path, 5 + peers.rank, writer(1.0), peers))
    assert all(isinstance(result, RuntimeError) for result in results)


def test_two_ranks_cannot_write_the_same_file(tmp_path: Path) -> None:
    outcomes = on_ranks(2, lambda peers: save_checkpoint(tmp_path, 5, writer(1.0, 0), peers))
    assert "both wrote" in outcomes[0].error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_full_disk_on_any_rank_keeps_the_old_and_goes_on(tmp_path: Path, bad_rank: int, caplog) -> None:
    old = on_ranks(2, lambda peers: save_checkpoint(tmp_path, 10, writer(1.0, peers.rank), peers))[0].path

    def work(peers: ThreadPeers):
        def write(directory: Path) -> None:
            (directory / f"half-{peers.rank}").write_bytes(b"x" * 100)
            if peers.rank == bad_rank:
                raise OSError(errno.ENOSPC, "No space left on device")

        return save_checkpoint(tmp_path, 20, write, peers, keep_last=1)

    with caplog.at_level(logging.ERROR):
        outcomes = on_ranks(2, work)
    assert [outcome.path for outcome in outcomes] == [None, None]
    assert f"rank {bad_rank}" in outcomes[0].error and "No space left" in outcomes[1].error
    assert "the run goes on" in caplog.text
    assert sorted(tmp_path.iterdir()) == [old]
    retried = on_ranks(2, lambda peers: save_checkpoint(tmp_path, 20, writer(2.0, peers.rank), peers))
    assert retried[0].path is not None


def test_a_bug_in_a_writer_stops_all_ranks(tmp_path: Path) -> None:
    def work(peers: ThreadPeers):
        def write(directory: Path) -> None:
            if peers.rank == 1:
                raise KeyError("no such moment")

        return save_checkpoint(tmp_path, 20, write, peers)

    results = on_ranks(2, work)
    assert all(isinstance(result, RuntimeError) and "rank 1" in str(result) for result in results)
    assert list(tmp_path.iterdir()) == []


def test_pruning_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, keep_last=2, keep_every=30)
    assert [path.name[-2:] for path in list_committed(tmp_path)] == ["70", "60", "30"]


def test_pruning_keeps_the_best_whatever_its_age_and_the_earlier_of_equals(tmp_path: Path) -> None:
    record = {10: 0.3, 20: 0.6, 30: 0.6, 40: 0.5, 50: 0.7}
    kept = []
    for step in range(10, 60, 5):
        scores = {past: value for past, value in record.items() if past <= step}
        store = CheckpointStore(tmp_path, ALONE, keep_last=1, read_scores=lambda found=scores: found)
        store.save(step, writer(1.0, 0))
        kept.append([path.name[-2:] for path in list_committed(tmp_path)])
    assert kept[4] == ["30", "20"] and kept[7] == ["45", "20"], "20 is as good as 30 and was first"
    assert kept[8] == ["50"] and kept[9] == ["55", "50"]
    # What was scored and was never saved takes nobody's place.
    store = CheckpointStore(tmp_path, ALONE, keep_last=1, read_scores=lambda: {57: 0.9, 50: 0.7})
    store.save(60, writer(1.0, 0))
    assert [path.name[-2:] for path in list_committed(tmp_path)] == ["60", "50"]


def test_pruning_does_not_count_a_rejected_checkpoint(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    flip_bit(tmp_path / "step-00000020" / "part-0.safetensors", 300)
    settle_on(find_latest_checkpoint(tmp_path, ALONE))
    save(tmp_path, 25)
    assert [path.name[-2:] for path in list_committed(tmp_path)] == ["25", "10"]


def test_a_rejected_checkpoint_is_replaced_by_the_same_step(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    flip_bit(tmp_path / "step-00000020" / "part-0.safetensors", 300)
    settle_on(find_latest_checkpoint(tmp_path, ALONE))
    save(tmp_path, 20)
    assert find_latest_checkpoint(tmp_path, ALONE).name == "step-00000020"


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_bit_flip_is_detected_names_its_file_and_falls_back(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 10)
    save(tmp_path, 20)
    files = sorted(path for path in (tmp_path / "step-00000020").rglob("*") if path.is_file())
    generator = random.Random(0)
    for _ in range(300):
        path = generator.choice(files)
        bit = generator.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        with pytest.raises(CheckpointError, match=path.name):
            check_checkpoint(tmp_path / "step-00000020", ALONE)
        assert find_latest_checkpoint(tmp_path, ALONE) == tmp_path / "step-00000010"
        flip_bit(path, bit)
    assert find_latest_checkpoint(tmp_path, ALONE) == tmp_path / "step-00000020"


@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "remove", "remove manifest", "remove commit", "extra"]
)
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    newest = tmp_path / "step-00000020"
    victim = newest / "part-0.safetensors"
    match damage:
        case "truncate":
            victim.write_bytes(victim.read_bytes()[:-1])
        case "empty":
            victim.write_bytes(b"")
        case "remove":
            victim.unlink()
        case "extra":
            (newest / "planted.pkl").write_bytes(b"")
        case _:
            (newest / {"remove manifest": "MANIFEST.json", "remove commit": "COMMIT"}[damage]).unlink()
    assert find_latest_checkpoint(tmp_path, ALONE).name == "step-00000010"


def test_stale_leftovers_and_pointers_are_ignored_and_cleaned(tmp_path: Path, caplog) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-00000020.tmp").mkdir()
    (tmp_path / "step-00000020.tmp" / "half").write_bytes(b"x")
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / "latest").write_text("step-00000030")
    with caplog.at_level(logging.WARNING):
        assert find_latest_checkpoint(tmp_path, ALONE).name == "step-00000010"
    assert "step-00000020.tmp" in caplog.text and "step-00000030" in caplog.text
    save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000020"]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert find_latest_checkpoint(tmp_path / "absent", ALONE) is None


def test_background_saves_publish_at_a_step_boundary(tmp_path: Path) -> None:
    gate = threading.Event()
    store = CheckpointStore(tmp_path, ALONE, asynchronous=True)

    def write(directory: Path) -> None:
        gate.wait(timeout=10)
        writer(1.0)(directory)

    assert store.save(10, write) is None
    assert store.poll() is None and list_committed(tmp_path) == []
    gate.set()
    assert store.finish().path == tmp_path / "step-00000010"
    assert store.poll() is None and store.finish() is None


def test_a_background_failure_is_reported_and_the_next_save_works(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, asynchronous=True)

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.save(10, full)
    assert "No space left" in store.finish().error
    store.save(20, writer(1.0))
    assert store.finish().path is not None


def test_trees_come_back_with_types_keys_and_bits(tmp_path: Path) -> None:
    tree = {
        "state": {0: {"exp_avg": torch.randn(3, 4), "step": torch.tensor(3.0)}, 1: {}},
        "betas": (0.9, 0.999),
        "names": ["a", None, True, 1, float("inf")],
        "half": torch.randn(5).bfloat16(),
        "numbers": np.arange(4, dtype=np.uint32),
    }
    save_tree(tmp_path, "tree", tree)
    loaded = load_tree(tmp_path, "tree")
    assert loaded["betas"] == (0.9, 0.999) and loaded["names"] == tree["names"]
    assert list(loaded["state"]) == [0, 1]
    assert torch.equal(loaded["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert loaded["half"].dtype == torch.bfloat16 and torch.equal(loaded["half"], tree["half"])
    assert loaded["numbers"].dtype == np.uint32 and (loaded["numbers"] == tree["numbers"]).all()
    with pytest.raises(TypeError, match="hook"):
        save_tree(tmp_path, "bad", {"hook": print})


def test_random_states_come_back(tmp_path: Path) -> None:
    save_tree(tmp_path, "rng", collect_rng_state())
    expected = (random.random(), np.random.rand(), torch.rand(3))
    restore_rng_state(load_tree(tmp_path, "rng"))
    again = (random.random(), np.random.rand(), torch.rand(3))
    assert expected[:2] == again[:2] and torch.equal(expected[2], again[2])
    with pytest.raises(CheckpointError, match="torch_cpu"):
        broken = collect_rng_state()
        del broken["torch_cpu"]
        restore_rng_state(broken)


@pytest.mark.parametrize(
    ("on_gpu", "state", "said"),
    [
        (True, {}, "written on a CPU and goes on on a GPU"),
        (False, {"torch_cuda": torch.zeros(16, dtype=torch.uint8)}, "written on a GPU and goes on on a CPU"),
        (True, {"torch_cuda": torch.zeros(16, dtype=torch.uint8)}, ""),
        (False, {}, ""),
    ],
)
def test_a_run_moves_between_cpu_and_gpu_with_a_word(
    on_gpu: bool,
    state: dict[str, torch.Tensor],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = collect_rng_state()
    assert "torch_cuda" not in saved, "a run on the CPU asks no GPU, visible or not"
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    restore_rng_state({**saved, **state})
    assert len(restored) == int(on_gpu and bool(state))
    assert len(caplog.records) == int(bool(said)) and said in caplog.text


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_of_all_ranks_make_the_whole_state(tmp_path: Path, world_size: int) -> None:
    state = {f"tensor{i}": torch.randn(i + 1, 3) for i in range(7)}
    for rank in range(world_size):
        share = collect_share(state.items(), rank, world_size)
        save_tensors(share_path(tmp_path, rank, world_size), share)
    loaded = ConsolidatedState(tmp_path)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    if world_size > 1:
        share_path(tmp_path, 1, world_size).unlink()
        with pytest.raises(CheckpointError, match="state files"):
            ConsolidatedState(tmp_path)


def snapshot_of(root: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with its content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def write_committed(checkpoint: Path, manifest: str) -> None:
    """Puts another manifest into a checkpoint, and its right hash into COMMIT."""
    (checkpoint / "MANIFEST.json").write_text(manifest)
    (checkpoint / "COMMIT").write_text(hashlib.sha256(manifest.encode()).hexdigest() + "\n")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FILE = {"path": "part-0.safetensors", "bytes": 1, "sha256": "0" * 64, "rank": 0}
MANIFESTS = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries({"schema": st.just(1), "step": st.just(20)}, optional={"facts": JSON_VALUES}),
    st.fixed_dictionaries(
        {
            "schema": st.just(1) | JSON_VALUES,
            "step": st.just(20) | JSON_VALUES,
            "facts": st.just({}),
            "files": JSON_VALUES
            | st.lists(
                JSON_VALUES
                | st.fixed_dictionaries(
                    {
                        name: st.just(value) | JSON_VALUES | st.just("../../etc/passwd")
                        for name, value in FILE.items()
                    }
                ),
                max_size=2,
            ),
        }
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifest=MANIFESTS)
@example(manifest={"schema": 1, "step": 20})
@example(manifest=[])
@example(manifest=None)
@example(manifest={"schema": 2, "step": 20, "facts": {}, "files": [FILE]})
def test_a_manifest_of_any_shape_with_a_right_hash_is_passed_over(
    two_checkpoints: Path, manifest: Any
) -> None:
    write_committed(two_checkpoints / "step-00000020", json.dumps(manifest))
    assert find_problems(two_checkpoints / "step-00000020", ALONE)
    assert find_latest_checkpoint(two_checkpoints, ALONE) == two_checkpoints / "step-00000010"


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    for step in (10, 20):
        save(tmp_path, step)
    return tmp_path


def test_a_manifest_that_is_nested_too_deeply_is_passed_over(two_checkpoints: Path) -> None:
    write_committed(two_checkpoints / "step-00000020", "[" * 100_000 + "]" * 100_000)
    assert find_latest_checkpoint(two_checkpoints, ALONE) == two_checkpoints / "step-00000010"


@pytest.mark.parametrize("reason", ["schema", "bytes", "commit", "transient"])
def test_checkpoints_of_which_none_is_usable_are_an_error_that_touches_nothing(
    two_checkpoints: Path, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for checkpoint in list_committed(two_checkpoints):
        if reason == "schema":
            write_committed(checkpoint, json.dumps(load_manifest(checkpoint) | {"schema": 2}))
        elif reason == "bytes":
            flip_bit(checkpoint / "part-0.safetensors", 300)
        elif reason == "commit":
            (checkpoint / "COMMIT").unlink()
    if reason == "transient":

        def fail(path: Path) -> str:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("training.checkpoints.files.sha256_of", fail)
    before = snapshot_of(two_checkpoints)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoint\(s\) and none can be used.*nothing was"):
        find_latest_checkpoint(two_checkpoints, ALONE)
    lines = [record.getMessage() for record in caplog.records if "passing over" in record.getMessage()]
    assert [re.search(r"step-\d+", line)[0] for line in lines] == ["step-00000020", "step-00000010"]
    assert snapshot_of(two_checkpoints) == before
    monkeypatch.undo()
    if reason == "transient":
        assert find_latest_checkpoint(two_checkpoints, ALONE) == two_checkpoints / "step-00000020"


def test_a_directory_that_cannot_be_listed_is_an_error_on_all_ranks(
    two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(root: Path) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("training.checkpoints.store.list_checkpoints", fail)
    results = on_ranks(2, lambda peers: find_latest_checkpoint(two_checkpoints, peers))
    assert all(isinstance(result, CheckpointError) and "Stale" in str(result) for result in results)


def test_looking_for_a_checkpoint_writes_nothing(two_checkpoints: Path) -> None:
    """An export or an evaluation beside a running training looks too."""
    flip_bit(two_checkpoints / "step-00000020" / "part-0.safetensors", 300)
    before = snapshot_of(two_checkpoints)
    found = find_latest_checkpoint(two_checkpoints, ALONE)
    assert snapshot_of(two_checkpoints) == before
    settle_on(found)
    assert (two_checkpoints / "step-00000020" / "REJECTED").exists()


FOREIGN = (
    "step-00000010-best",
    "step-000000010",
    "step-10",
    "step-00000010.tmp.old",
    "step-00000010.bak",
    "step-best",
    "my-step-00000010",
    "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0661\u0660",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_only_directories_that_a_save_made_are_loaded_or_deleted(tmp_path: Path, name: str) -> None:
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / name)
    elsewhere = tmp_path.with_name(tmp_path.name + "-elsewhere")
    shutil.copytree(tmp_path / "step-00000010", elsewhere)
    (tmp_path / "step-00000011").symlink_to(elsewhere)
    before = snapshot_of(tmp_path / name)
    for step in (20, 30, 40):
        save(tmp_path, step, keep_last=1)
    assert snapshot_of(tmp_path / name) == before
    assert (tmp_path / "step-00000011" / "COMMIT").is_file(), "a link and what it points to stay"
    assert [path.name for path in list_committed(tmp_path)] == ["step-00000040"]


def test_a_ninth_digit_is_a_step_only_where_it_is_needed(tmp_path: Path) -> None:
    save(tmp_path, 80)
    (tmp_path / "step-00000080").rename(tmp_path / "step-000000080")
    assert find_latest_checkpoint(tmp_path, ALONE) is None
    save(tmp_path, 100_000_000)
    save(tmp_path, 99_999_999)
    assert find_latest_checkpoint(tmp_path, ALONE).name == "step-100000000"


def test_a_rank_of_a_killed_start_does_not_write_into_the_next_starts_save(tmp_path: Path) -> None:
    _, temporary, key = open_temporary(tmp_path, 10, 1)
    again = open_temporary(tmp_path, 10, 1)
    with pytest.raises(OSError, match="No such file"):
        write_part(temporary, 0, key, lambda directory: (directory / "late").write_text("x"))
    assert write_part(again[1], 0, again[2], writer(1.0)).entries


def test_the_store_knows_its_newest_whole_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE, asynchronous=True, newest_step=5)

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.save(10, full)
    assert (store.newest_step, store.pending_step) == (5, 10)
    store.save(20, writer(1.0))  # completes the first, which failed
    assert (store.newest_step, store.pending_step) == (5, 20)
    store.finish()
    assert (store.newest_step, store.pending_step) == (20, None)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dict", "list", "tuple", "tensor", "array", "dtype", "x"]), inner, max_size=2
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
@example(tree={"dict": [["python", {"dict": []}]]})
def test_a_tree_of_any_json_shape_is_loaded_or_refused(tmp_path: Path, tree: Any) -> None:
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    with contextlib.suppress(CheckpointError):
        check_rng_state(load_tree(tmp_path, "tree"))
