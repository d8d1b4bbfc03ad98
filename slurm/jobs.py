"""What is submitted: the runs of an array, the frozen copy of the code, and the batch scripts filled in.

outputs/NAME/slurm/001/
    code/               the checkout as it was; what git ignores (datasets, outputs, .venv) is linked
    NAME.yaml           resolved configuration, one for each run of an array
    NAME.eval.yaml      configuration of the evaluation that follows, where one was asked for
    pretrain.sbatch     the batch script, filled in
    evaluate.sbatch
    JOB.log             the jobs' output
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import EvaluationConfig
from runtime.config import ConfigError, parse_override
from runtime.provenance import find_commit
from slurm.config import ClusterConfig
from slurm.quoting import directive, log_pattern, quote, quote_all
from training.config import PretrainConfig

CHECKOUT = Path(__file__).resolve().parent.parent
JOB_RECORD = "slurm_jobs.txt"  # in every run directory: ids of the jobs that train it
_NOT_COPIED = (".git", ".github", ".ci", "docs", "tests")
_CODE = (".py", ".yaml", ".json", ".sbatch", ".toml", ".txt", ".md")


@dataclass(frozen=True)
class Arm:
    """One run of a submission; a submission without an array has one.

    Attributes:
        config: its configuration, `run.name` being its own.
        evaluation: configuration of the evaluation after it, or None.
    """

    config: PretrainConfig
    evaluation: EvaluationConfig | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory, absolute."""
        return Path(self.config.run.output_dir).absolute() / self.config.run.name


def expand_array(specifications: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns (suffix of the run's name, overrides) of every run of an array: the product of its keys' values.

    Args:
        specifications: such as `seeds=0,1,2` (short for `run.seed`) or `prototypes.mode=full,joint`.

    Raises:
        ConfigError: no key, no value, a value or a key twice, or a key that names the run's place.
    """
    axes: list[list[tuple[str, str]]] = []
    keys: list[str] = []
    for text in specifications:
        key, _, values = text.partition("=")
        items = [item.strip() for item in values.split(",")]
        # 0 and 00 are one run: what counts is what the run is told.
        told = [parse_override(f"{key}={item}") or item for item in items]
        if not key or not all(items) or any(value in told[:place] for place, value in enumerate(told)):
            raise ConfigError(
                f"--array is {text!r}; expected key=value,value with different values; pass --array seeds=0,1,2"
            )
        keys.append("run.seed" if key == "seeds" else key)
        if keys[-1] in keys[:-1] or keys[-1] in ("run.name", "run.output_dir"):
            raise ConfigError(
                f"--array is {text!r}; expected keys once each, and neither run.name nor run.output_dir: every run of "
                "an array gets a name of its own; pass one --array KEY=V,V for each key"
            )
        label = "-seed" if keys[-1] == "run.seed" else f"-{key.rsplit('.', 1)[-1]}-"
        names = [re.sub(r"[^\w.-]+", "_", label + item) for item in items]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"--array is {text!r}; expected values that differ as directory names, not {', '.join(names)}; "
                "submit these runs one by one with run.name"
            )
        axes.append([(name, f"{keys[-1]}={item}") for name, item in zip(names, items, strict=True)])
    return [
        ("".join(suffix for suffix, _ in combination), [override for _, override in combination])
        for combination in itertools.product(*axes)
    ]


def snapshot_code(target: Path, output_dir: Path, checkout: Path = CHECKOUT) -> int:
    """Copies what git knows of the checkout, edits and new code included, and links everything else.

    A job that waits for days then runs the code it was submitted with, while relative paths such as `datasets/`
    and `outputs/` mean what they mean in the checkout.

    Args:
        target: folder to make.
        output_dir: where runs are written; below the checkout it is never copied, also where git does not
            ignore it.
        checkout: root of the project.

    Returns:
        Number of files copied.
    """
    # Where runs are written above the checkout, everything would be "below output_dir".
    runs = output_dir if output_dir.is_relative_to(checkout) else target
    files = [
        path
        for path in _project_files(checkout)
        if path.parts[0] not in _NOT_COPIED and not (checkout / path).is_relative_to(runs)
    ]
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(checkout / path, target / path)
    copied = {path.parts[0] for path in files}
    for entry in sorted(checkout.iterdir()):
        is_hidden = entry.name.startswith(".") and entry.name != ".venv"
        if entry.name not in copied and entry.name not in _NOT_COPIED and not is_hidden:
            (target / entry.name).symlink_to(entry)
    (target / "COMMIT_ID").write_text(find_commit() + "\n")
    return len(files)


def _project_files(checkout: Path) -> list[Path]:
    try:
        tracked = _list_files(checkout, "--cached")
        new = _list_files(checkout, "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        # An unpacked archive: everything that is source or settings.
        heavy = ("datasets", "outputs", "wandb", ".venv")
        found = (path.relative_to(checkout) for path in checkout.rglob("*") if path.suffix in _CODE)
        return sorted(path for path in found if path.parts[0] not in heavy and (checkout / path).is_file())
    rooms = {path.parts[0] for path in tracked if len(path.parts) > 1}
    foreign = {
        path.parts[0]
        for path in new
        if len(path.parts) > 1 and path.parts[0] not in rooms and path.suffix not in _CODE
    }
    # New code is part of what was submitted; images that nobody told git to ignore are not, and are linked.
    added = (path for path in new if path.suffix in _CODE and path.parts[0] not in foreign)
    return sorted(path for path in (*tracked, *added) if (checkout / path).is_file())


def _list_files(checkout: Path, *which: str) -> list[Path]:
    command = ["git", "-C", str(checkout), "ls-files", *which, "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name]


def render_pretrain(
    cluster: ClusterConfig, arms: Sequence[Arm], submission: Path, dependency: str | None = None
) -> str:
    """Returns the text of the pretraining job: `slurm/pretrain.sbatch` with its three blocks filled in."""
    options = [
        *_resources(
            cluster, nodes=cluster.nodes, tasks=cluster.processes_per_node, gpus=cluster.gpus_per_node
        ),
        f"--time={cluster.time}",
        f"--signal={cluster.signal}@{cluster.warn_before_end_s}",
        *_bookkeeping(
            arms, submission, arms[0].config.run.name if len(arms) == 1 else submission.parents[1].name
        ),
    ]
    if dependency:
        options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    limits = [
        f"export MAX_RESTARTS={cluster.max_restarts}",
        f"export MIN_UPTIME_S={cluster.min_uptime_s}",
    ]
    calls = [[str(submission / f"{arm.config.run.name}.yaml".replace("/", "_"))] for arm in arms]
    return _fill("pretrain.sbatch", options, [*_site(cluster), *limits], _arguments(submission, calls))


def render_evaluate(cluster: ClusterConfig, arms: Sequence[Arm], submission: Path) -> str:
    """Returns the text of the evaluation job; `submit` adds its dependency on the command line."""
    name = "eval-" + submission.parents[1].name
    options = [
        *_resources(cluster, nodes=1, tasks=1, gpus=min(cluster.gpus_per_node, 1)),
        f"--time={cluster.time}",
        *_bookkeeping(arms, submission, name),
        "--kill-on-invalid-dep=yes",
    ]
    calls = [[str(submission / f"{arm.config.run.name}.eval.yaml".replace("/", "_"))] for arm in arms]
    return _fill("evaluate.sbatch", options, _site(cluster), _arguments(submission, calls))


def _resources(cluster: ClusterConfig, *, nodes: int, tasks: int, gpus: int) -> list[str]:
    named = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    options += [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cluster.cpus_per_task}"]
    if gpus:
        options.append(f"--gres=gpu:{gpus}" if cluster.gpu_option == "gres" else f"--gpus-per-node={gpus}")
    if cluster.memory_per_cpu is not None:
        options.append(f"--mem-per-cpu={cluster.memory_per_cpu}")
    return [*options, *cluster.sbatch_options]


def _bookkeeping(arms: Sequence[Arm], submission: Path, name: str) -> list[str]:
    log = "%j.log" if len(arms) == 1 else "%A_%a.log"
    options = [
        f"--job-name={name}",
        "--requeue",
        "--open-mode=append",
        f"--output={log_pattern(submission, log)}",
    ]
    return options if len(arms) == 1 else [*options, f"--array=0-{len(arms) - 1}"]


def _site(cluster: ClusterConfig) -> list[str]:
    lines = list(cluster.setup)
    lines += [f"export {name}={quote(value)}" for name, value in cluster.environment.items()]
    if cluster.srun_options:
        lines.append(f"srun_options=({quote_all(cluster.srun_options)})")
    return [*lines, f"export PYTHON={quote(str(cluster.python))}"]


def _arguments(submission: Path, calls: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"cd {quote(str(submission / 'code'))} || exit 1"]
    if len(calls) == 1:
        return [*lines, f"set -- {quote_all(calls[0])}"]
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    lines += [f"    {index}) set -- {quote_all(call)} ;;" for index, call in enumerate(calls)]
    return [*lines, "esac"]


def _fill(template: str, options: Sequence[str], site: Sequence[str], arguments: Sequence[str]) -> str:
    text = (CHECKOUT / "slurm" / template).read_text()
    blocks = {
        "options": [directive(option) for option in options],
        "site": site,
        "arguments": arguments,
    }
    for name, lines in blocks.items():
        before, rest = text.split(f"# >>> {name}\n")
        _, after = rest.split(f"# <<< {name}\n")
        text = before + "".join(line + "\n" for line in lines) + after
    # The usage lines of the template speak of what was just filled in.
    head, _, body = text.partition("\n")
    kept = itertools.dropwhile(
        lambda line: line.startswith("#") and not line.startswith("#SBATCH"), body.splitlines()
    )
    return "\n".join([head, "# Written by python -m slurm.submit.", *kept]) + "\n"
