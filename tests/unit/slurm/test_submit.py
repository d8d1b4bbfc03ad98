"""Submit without a Slurm: what it prints, what it freezes, what it refuses. The real one: tests/slurm."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import ConfigError, config_to_yaml, load_config
from runtime.program import UserError
from slurm.config import ClusterConfig
from slurm.jobs import CHECKOUT, expand_array, snapshot_code
from slurm.submit import main
from training.config import PretrainConfig

CONFIG = "configs/pretrain_vit-mini_fashion-mnist_full.yaml"


@pytest.fixture(autouse=True)
def no_cluster_answers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Slurm this machine has is not asked."""
    folder = tmp_path_factory.mktemp("no-cluster")
    for name in ("sinfo", "sbatch", "squeue"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "splits": {"train": {}, "test": {}}}))
    return folder


@pytest.fixture
def arguments(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.delenv("SLURM_SUBMIT_CLUSTER", raising=False)
    return [CONFIG, f"data.shards={shards}", f"run.output_dir={tmp_path / 'runs'}", "run.name=trial"]


def run_submit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "slurm.submit", *arguments], cwd=CHECKOUT, capture_output=True, text=True
    )


def options_of(script: str) -> dict[str, str]:
    """Returns the `#SBATCH --name=value` lines of the first script."""
    head = script.split("# A rendezvous left over")[0]
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([\w-]+)(=(.*))?$", head, re.M)}


def test_dry_run_prints_a_script_that_bash_reads_and_changes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chosen = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--partition",
        "gpu",
        "--time",
        "8:00:00",
        "--after",
        "77",
    ]
    assert main([*arguments, *chosen, "--dry-run"]) == 0
    script = capsys.readouterr().out
    options = options_of(script)
    assert options["nodes"] == "2"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["partition"] == "gpu"
    assert options["time"] == "8:00:00"
    assert options["signal"] == "USR2@300"
    assert options["dependency"] == "afterok:77"
    assert {"requeue", "open-mode", "output", "job-name"} <= options.keys()
    # sbatch stops reading options at the first command: all of them stand before it.
    assert "#SBATCH" not in script.split("unset RANK")[1]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert ">>>" not in script and "<<<" not in script.replace('<<< "$job_now"', "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("template", ["pretrain", "evaluate"])
def test_templates_work_by_hand(template: str) -> None:
    text = (CHECKOUT / "slurm" / f"{template}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True)
    assert done.returncode == 2, "without a configuration it must stop before srun"
    assert done.stderr.startswith("error: no configuration")
    assert not re.search(r"^\s*(env|printenv)\b", text, re.M), "an environment in a log shows secrets"
    assert "mpi" not in text.lower() and "ssh" not in text


def test_evaluation_follows_with_the_runs_own_data(
    arguments: list[str], shards: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*arguments, "--evaluate", "knn,linear,long_tail", "--dry-run"]) == 0
    scripts = capsys.readouterr().out.split("#!/bin/bash")
    assert len(scripts) == 3
    assert "evaluate.py" in scripts[2] and "trial.eval.yaml" in scripts[2]
    assert options_of(scripts[2])["nodes"] == "1"


def test_cluster_description_reaches_the_script(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkout" / "slurm"
    shutil.copytree(CHECKOUT / "slurm", place)
    shutil.copytree(CHECKOUT / "ds_configs", tmp_path / "checkout" / "ds_configs")
    (place / "clusters" / "mine.yaml").write_text(
        "account: vision\ngpu_option: gres\ncpus_per_task: 14\nsetup: ['module load cuda/12.8']\n"
        "environment: {NCCL_SOCKET_IFNAME: 'ib0 ib1'}\nsrun_options: ['--container-image=a b.sqsh']\n"
        "sbatch_options: ['--constraint=h100']\npython: python3.11\nsignal: USR1\nwarn_before_end_s: 600\n"
    )
    for module in ("submit", "jobs", "checks"):
        monkeypatch.setattr(f"slurm.{module}.CHECKOUT", tmp_path / "checkout")
    assert main([*arguments, "--cluster", "mine", "--dry-run"]) == 0
    script = capsys.readouterr().out
    options = options_of(script)
    assert options["account"] == "vision"
    assert options["gres"] == "gpu:4" and "gpus-per-node" not in options
    assert options["cpus-per-task"] == "14"
    assert options["constraint"] == "h100"
    assert options["signal"] == "USR1@600"
    assert "module load cuda/12.8\nexport NCCL_SOCKET_IFNAME='ib0 ib1'\n" in script
    assert "srun_options=('--container-image=a b.sqsh')" in script
    assert "export PYTHON=python3.11\n" in script


def test_array_has_one_name_and_one_configuration_per_value(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    asked = ["--array", "seeds=3,5", "--array", "prototypes.mode=full,joint"]
    assert main([*arguments, *asked, "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert options_of(script)["array"] == "0-3"
    assert "%A_%a.log" in options_of(script)["output"]
    found = re.findall(r"^ +(\d)\) set -- \S*/(trial\S+)\.yaml ;;$", script, re.M)
    assert [name for _, name in found] == [
        "trial-seed3-mode-full",
        "trial-seed3-mode-joint",
        "trial-seed5-mode-full",
        "trial-seed5-mode-joint",
    ]


def test_expand_array() -> None:
    assert expand_array([]) == [("", [])]
    assert expand_array(["seeds=0,1"]) == [("-seed0", ["run.seed=0"]), ("-seed1", ["run.seed=1"])]
    assert expand_array(["optim.lr=1e-3"]) == [("-lr-1e-3", ["optim.lr=1e-3"])]
    for wrong in ("seeds", "=1", "seeds=", "seeds=1,,2", "seeds=1,1"):
        with pytest.raises(ConfigError, match="seeds=0,1,2"):
            expand_array([wrong])
    for wrong in (
        "run.seed=0,00",
        "optim.lr=1e-3,0.001",
        "optim.lr=1,1.0",
        "seeds=1,0x1",
        "model.name=a,'a'",
    ):
        with pytest.raises(ConfigError, match="expected key=value,value with different values"):
            expand_array([wrong])
    for twice in (["seeds=0", "run.seed=1"], ["optim.lr=1", "optim.lr=2"], ["run.name=a,b"]):
        with pytest.raises(ConfigError, match="expected keys once each, and neither"):
            expand_array(twice)
    with pytest.raises(ConfigError, match="expected values that differ as directory names"):
        expand_array(["model.name=a/b,a:b"])


REFUSALS = {
    "unknown key": (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    "wrong type": (["optim.lr=fast"], "optim.lr"),
    "missing data": (["data.shards=/nowhere"], "data.shards is '/nowhere'"),
    "missing split": (["data.split=trian"], "split is 'trian'; expected one of test, train; set data.split"),
    "missing test split": (
        ["evaluation.test_split=val", "--evaluate", "knn"],
        "split is 'val'; expected one of test, train; set evaluation.test_split",
    ),
    "batch": (["batch.global_batch_size=30", "--gpus-per-node", "4"], "set batch.global_batch_size"),
    "lanes": (["data.num_lanes=6", "--gpus-per-node", "4"], "set data.num_lanes"),
    "loader processes": (
        ["data.num_workers=20", "--gpus-per-node", "4"],
        "at least 80 = world size x 20 workers; set data.num_workers to at most 16, or data.num_lanes before",
    ),
    "no such cluster": (["--cluster", "nowhere"], "expected one of example"),
    "no such cluster either": (["--cluster", "../clusters/example"], "expected one of example"),
    "home unexpanded": (["run.output_dir=~/runs"], "no shell expands ~ here; set run.output_dir with $HOME"),
    "no such engine file": (["engine.deepspeed_config=ds_configs/x.json"], "set engine.deepspeed_config"),
    "time": (["--time", "tomorrow"], "set time"),
    "no limit": (["--time", "0"], "not 0, which Slurm takes for unlimited; set time"),
    "no limit in other words": (["--time", "00:00:00"], "not 0, which Slurm takes for unlimited; set time"),
    "no time to warn": (["--time", "5"], "longer than warn_before_end_s 300"),
    "partition": (["--partition", "gpu\n#SBATCH --wrap=x"], "set partition"),
    "partition of two words": (["--partition", "gpu --wrap=x"], "set partition"),
    "job": (["--after", "77\ntouch x"], "expected a job's number"),
    "run name of two lines": (['run.name="a\\ntouch x\\nb"'], "set run.name"),
    "run name too long": (["run.name=" + "a" * 300], "of 300 bytes; expected at most 200; set run.name"),
    "nodes": (["--nodes", "0"], "nodes is 0; expected 1 <= nodes"),
    "nodes no number": (["--nodes", "two"], "--nodes"),
    "unknown option": (["--gpu", "2"], "--gpu"),
    "probe": (["--evaluate", "knn,linaer"], "probes is [knn, linaer]"),
    "climbing path": (["data.shards=../shards"], "data.shards is '../shards'; expected an absolute path"),
    "array": (["--array", "seeds=0,0"], "--array is 'seeds=0,0'"),
    "array key": (["--array", "run.sead=0,1"], "unknown key run.sead"),
    "dry run of pretrain": (["run.dry_run=true"], "run.dry_run"),
    "no resume": (["run.resume=false"], "run.resume is false; expected true"),
    "gpu wanted": (["run.device=cuda", "--gpus-per-node", "0"], "set --gpus-per-node"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_one_line(name: str, arguments: list[str], tmp_path: Path) -> None:
    added, expected = REFUSALS[name]
    done = run_submit(*arguments, *added, "--dry-run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "runs").exists()


def test_unwritable_run_directory_is_refused(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run_submit(*arguments, f"run.output_dir={tmp_path / 'file' / 'runs'}", "--dry-run")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1


def test_missing_shard_is_refused(arguments: list[str], shards: Path) -> None:
    listed = [{"name": f"train-{index:06d}.tar"} for index in range(3)]
    manifest = {"schema": 1, "splits": {"train": {"shards": listed}, "test": {}}}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    (shards / "train-000001.tar").touch()
    expected = "lacks 2 of the 3 shards of split 'train', train-000000.tar first"
    with pytest.raises(UserError, match=expected):
        main([*arguments, "--dry-run"])
    for shard in listed:
        (shards / shard["name"]).touch()
    assert main([*arguments, "--dry-run"]) == 0
    some = f"data.shards={shards}/train-{{000000..000001}}.tar"
    assert main([*arguments, some, "--dry-run"]) == 0, "a brace list of shards is data too"


def test_run_directory_of_another_configuration_is_refused(arguments: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "trial"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config_to_yaml(load_config(PretrainConfig, CONFIG, arguments[1:])))
    assert main([*arguments, "checkpoint.every_steps=7", "--dry-run"]) == 0, (
        "a resumed run may save more often"
    )
    with pytest.raises(UserError, match=r"optim.epochs is 3.0, but run directory .* was made with"):
        main([*arguments, "optim.epochs=3", "--dry-run"])


def test_the_checkout_is_no_place_for_runs(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="the checkout itself; expected a folder of its own"):
        main([*arguments, "run.output_dir=.", "--dry-run"])


@pytest.fixture
def stand_in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that write down how they were called; sbatch refuses what a file `refuse` names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = folder / "calls"
    body = f"""#!/bin/bash
echo "$(basename $0) $*" >> {calls}
if [[ -s {folder}/refuse && "$*" == *"$(cat {folder}/refuse)"* ]]; then
    echo "sbatch: error: no such thing" >&2
    exit 1
fi
[[ "$*" == *--parsable* ]] && echo 41 || true
"""
    for name in ("sbatch", "scancel", "sinfo", "squeue"):
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_refused_evaluation_leaves_nothing_in_the_queue(
    stand_in_slurm: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (stand_in_slurm / "refuse").write_text("--dependency=afterok:41")
    with pytest.raises(UserError, match="sbatch refused the job: no such thing"):
        main([*arguments, "--evaluate", "knn"])
    assert "scancel 41\n" in (stand_in_slurm / "calls").read_text()
    assert not list((tmp_path / "runs").glob("trial/slurm/*"))
    (stand_in_slurm / "refuse").write_text("")
    assert main([*arguments, "--evaluate", "knn"]) == 0
    printed = capsys.readouterr().out
    for said in (
        "submitted job 41",
        "41.log",
        "squeue -j 41",
        "scancel 41",
        "resume  the same command",
        "then",
    ):
        assert said in printed
    assert (tmp_path / "runs/trial/slurm_jobs.txt").read_text() == "41\n"


def test_no_place_to_write_is_one_line_and_leaves_nothing(
    stand_in_slurm: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What access rights do not show: a quota, a read-only mount, a full disk."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", "code/pretrain.py")

    monkeypatch.setattr("slurm.submit.snapshot_code", full)
    with pytest.raises(UserError, match=r"code/pretrain.py cannot be written \(No space left on device\)"):
        main(arguments)
    assert not list((tmp_path / "runs").glob("trial/slurm/*"))
    assert "sbatch" not in (stand_in_slurm / "calls").read_text(), "nothing was queued"


def test_a_configuration_with_a_base_is_frozen_whole(
    stand_in_slurm: Path, arguments: list[str], tmp_path: Path
) -> None:
    """What the job reads days later names no file that may have changed meanwhile."""
    (tmp_path / "mine.yaml").write_text(f"base: {CHECKOUT / CONFIG}\noptim:\n  epochs: 7\n")
    assert main([str(tmp_path / "mine.yaml"), *arguments[1:]]) == 0
    (frozen,) = (tmp_path / "runs/trial/slurm/001").glob("*.yaml")
    assert not re.search("^base:", frozen.read_text(), re.M)
    expected = load_config(PretrainConfig, CONFIG, [*arguments[1:], "optim.epochs=7"])
    assert load_config(PretrainConfig, str(frozen)) == expected


PARTITIONS = "main* 2-00:00:00\\ngpu 1:00:00\\nlong infinite\\n"


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        (["--partition", "gpu", "--time", "1:00:01"], "MaxTime (gpu 1:00:00)"),
        (["--partition", "gpu", "--time", "60"], None),
        (["--partition", "gpu,long", "--time", "9-0"], None),
        (["--time", "2-00:01"], "MaxTime (main 2-00:00:00)"),
        (["--time", "48:00:00"], None),
        (["--partition", "gpuu"], "expected one of gpu, long, main; set --partition; did you mean gpu?"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "real"])
def test_more_time_than_the_partition_gives_is_refused(
    asked: list[str], refusal: str | None, dry: list[str], arguments: list[str], stand_in_slurm: Path
) -> None:
    """Slurm itself takes such a job, and never starts it."""
    (stand_in_slurm / "sinfo").write_text(f"#!/bin/bash\nprintf '{PARTITIONS}'\n")
    if refusal is None:
        assert main([*arguments, *asked, *dry]) == 0
    else:
        with pytest.raises(UserError, match=re.escape(refusal)):
            main([*arguments, *asked, *dry])


def test_a_dry_run_asks_sbatch_where_there_is_one(arguments: list[str], stand_in_slurm: Path) -> None:
    assert main([*arguments, "--evaluate", "knn", "--dry-run"]) == 0
    assert (stand_in_slurm / "calls").read_text().count("sbatch --test-only\n") == 2
    (stand_in_slurm / "refuse").write_text("--test-only")
    with pytest.raises(UserError, match="sbatch refused the job: no such thing"):
        main([*arguments, "--dry-run"])


def test_without_slurm_a_submission_is_refused_before_anything_is_written(
    arguments: list[str], tmp_path: Path
) -> None:
    environment = {**os.environ, "PATH": "/nonexistent"}
    command = [sys.executable, "-m", "slurm.submit", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch is not on PATH") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_submit_loads_no_torch() -> None:
    program = "import sys, slurm.submit; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT).returncode == 0


def test_snapshot_copies_code_and_links_data(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in (
        "pretrain.py",
        "models/vit.py",
        "tests/test_x.py",
        "datasets/a.tar",
        "outputs/run/x.py",
        "new.py",
        "method/new.py",
        "imagenet/manifest.json",
        "imagenet/train-000000.tar",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    (checkout / ".gitignore").write_text("/datasets/\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "pretrain.py", "models", "tests"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    (checkout / "models/vit.py").write_text("edited")
    target = tmp_path / "frozen"
    snapshot_code(target, checkout / "outputs", checkout)
    assert (target / "pretrain.py").read_text() == "pretrain.py"
    assert (target / "models/vit.py").read_text() == "edited", "a job runs what was there, committed or not"
    assert (target / "new.py").is_file()
    assert not (target / "method").is_symlink() and (target / "method" / "new.py").is_file()
    assert (target / "imagenet").is_symlink(), "images that git was not told to ignore are not copied"
    assert not (target / "tests").exists()
    assert (target / "datasets").is_symlink() and (target / "outputs").is_symlink()
    assert (target / "COMMIT_ID").read_text().strip()
    (checkout / "pretrain.py").write_text("changed after submission")
    assert (target / "pretrain.py").read_text() == "pretrain.py"


def test_snapshot_is_a_copy_also_where_runs_are_written_above_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "pretrain.py").write_text("")
    assert snapshot_code(tmp_path / "run" / "code", tmp_path, checkout) == 1
    assert not (tmp_path / "run" / "code" / "pretrain.py").is_symlink()


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "slurm" / "clusters").glob("*.yaml")), ids=lambda p: p.stem
)
def test_cluster_files_load(path: Path) -> None:
    assert load_config(ClusterConfig, str(path)).world_size >= 1


def test_resolved_configuration_loads_again(arguments: list[str]) -> None:
    from runtime.config import config_hash, config_to_yaml

    config = load_config(PretrainConfig, arguments[0], arguments[1:])
    copy = Path(arguments[1].split("=")[1]).parent / "again.yaml"
    copy.write_text(config_to_yaml(config))
    assert config_hash(load_config(PretrainConfig, str(copy))) == config_hash(config)


def documented_submissions() -> list[list[str]]:
    """Returns the arguments of every `python -m slurm.submit` in docs/slurm.md, inline ones included."""
    text = (CHECKOUT / "docs" / "slurm.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python -m slurm.submit (.*)$|`python -m slurm.submit ([^`]*)`", text, re.M)
    return [shlex.split((block or inline).split("#")[0]) for block, inline in lines]


def test_every_recipe_in_the_documentation_fits_its_nodes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(CHECKOUT)
    place = [f"data.shards={shards}", "evaluation.test_split=test", f"run.output_dir={tmp_path / 'runs'}"]
    recipes = [line for line in documented_submissions() if (CHECKOUT / line[0]).is_file()]
    table = re.findall(r"^\| `pretrain_.*$", (CHECKOUT / "docs" / "slurm.md").read_text(), re.M)
    for row in table:
        options = shlex.split(row.rsplit("`", 2)[1])
        recipes += [[f"configs/{name}.yaml", *options] for name in re.findall(r"`(pretrain_\S+)`", row)]
    assert len(table) >= 5 and len(recipes) >= 9
    for recipe in recipes:
        options = [word for word in recipe if word != "--dry-run"]
        assert main([options[0], *place, *options[1:], "--gpus-per-node", "8", "--dry-run"]) == 0, recipe
        assert "evaluate.py" in capsys.readouterr().out or "--evaluate" not in options


def test_every_command_line_in_the_documentation_is_understood() -> None:
    from slurm.submit import _parse

    lines = documented_submissions()
    assert len(lines) >= 5
    for line in lines:
        assert _parse(line).config.startswith("configs/")
