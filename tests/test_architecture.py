"""The design's rules, read from the syntax tree: who imports whom, how large a room may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "models", "prototypes", "data", "training", "evaluation", "report", "audit", "runtime", "slurm", "benchmarks",
    "examples",
)  # fmt: skip

# room or program -> the rooms of ours that it may import besides itself
MAY_IMPORT = {
    "models": set(),
    "prototypes": set(),
    "data": set(),
    "runtime": set(),
    "training": {"models", "prototypes", "data", "runtime"},
    "evaluation": {"models", "prototypes", "data", "runtime"},
    "report": {"evaluation", "data", "runtime"},
    "audit": {"report", "training", "evaluation", "data", "runtime"},
    "slurm": {"runtime", "training", "evaluation"},
    "benchmarks": set(ROOMS),
    "examples": {"prototypes"},
    "pretrain": {"training", "evaluation", "runtime", "data"},
    "evaluate": {"evaluation", "report", "runtime"},
}
# room -> its floors from the top: a file imports from its own floor and from those below. A name is a file or a
# sub-room; config files stand below everything, wherever they lie.
FLOORS = {
    "models": (("student_teacher",), ("released_weights", "vit", "heads", "predictor", "patches")),
    "prototypes": (
        ("build",),
        ("families",),
        ("clustering",),
        ("mixture",),
        ("learned", "coupling"),
        ("objectives",),
        ("diagnostics", "alarms"),
        ("estimator",),
        ("statistics", "random_numbers"),
    ),
    "data": (
        ("make_shards", "verify_shards", "show_crops"),
        ("datasets",),
        ("writing",),
        ("stream",),
        ("views",),
        ("members", "local_errors"),
        ("shards", "usage"),
    ),
    "training": (
        ("build", "dry_run"),
        ("trainer", "export", "evaluation_job"),
        ("initialisation", "run_directory", "health", "cost", "onnx_file"),
        ("checkpoints",),
        ("step",),
        ("accumulation", "drift"),
        ("figures",),
        ("prototype_sets",),
        ("engines", "patches"),
        (
            "guards",
            "metrics",
            "event_files",
            "feed",
            "throughput",
            "schedules",
            "run_length",
            "config_difference",
            "unread",
        ),
    ),
    "evaluation": (
        ("harness", "cache", "embed"),
        ("probes",),
        ("features",),
        ("encoders",),
        ("results", "confidence"),
        ("tensor_files",),
    ),
    "report": (
        ("__main__",),
        ("write",),
        ("sections",),
        ("comparison", "confusion", "curves", "page", "panels", "segmentation"),
        ("runs",),
        ("charts", "tables"),
    ),
    "audit": (("__main__",), ("run",), ("checks", "write"), ("cells", "charts")),
}
# package -> the only modules that may import it
ONLY_IN = {
    "deepspeed": ("training.engines.deepspeed",),
    "torch.distributed": (
        "runtime.distributed",
        "training.engines.synchronization",
        "training.checkpoints.store",
        "training.engines.deepspeed",
        "training.engines.fsdp",
    ),
    "omegaconf": ("runtime.config",),
    "wandb": ("training.metrics",),
    # Imported where it is used and nowhere on the way there: the package needs torch alone.
    "triton": ("prototypes.mixture.triton_e_step",),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
DRAWERS = {"utils", "misc", "common", "helpers"}
SHADOWING = {"logging", "types", "profile"}


def modules():
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    paths += [ROOT / "pretrain.py", ROOT / "evaluate.py"]
    return [
        (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), path.read_text())
        for path in paths
    ]


def imported_names(name, tree):
    """Every dotted name that a module imports: what it imports from, and the names themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def floor_of(name):
    """The floor of a module in its room, counted from the top; None where the room has none, or does not know it."""
    room, *inside = name.split(".")
    if room not in FLOORS or not inside:
        return None
    if inside[-1] == "config" or (len(inside) > 1 and inside[1] == "config"):
        return len(FLOORS[room])
    return next((i for i, floor in enumerate(FLOORS[room]) if inside[0] in floor), None)


def find_circles(sources):
    """Returns the circles of files that import each other; `sources`: module name to its text."""
    arrows = {
        name: {imported for imported in imported_names(name, ast.parse(text)) if imported in sources} - {name}
        for name, text in sources.items()
    }
    free = set()
    while found := {name for name, targets in arrows.items() if name not in free and targets <= free}:
        free |= found
    # What is left stands on a circle, or imports one; the former alone are reached from themselves.
    return {name for name in arrows.keys() - free if name in _reached(name, arrows)}


def _reached(start, arrows):
    reached, frontier = set(), [start]
    while frontier:
        for target in arrows[frontier.pop()] - reached:
            reached.add(target)
            frontier.append(target)
    return reached


def find_violations(name, source):
    """Returns the rules that one module breaks, in words."""
    tree = ast.parse(source)
    room = name.split(".")[0]
    found = []
    imports = list(imported_names(name, tree))
    for imported in imports:
        target = imported.split(".")[0]
        if target in MAY_IMPORT and target != room and target not in MAY_IMPORT[room]:
            found.append(
                f"{name} imports {imported}: {room} may import {sorted(MAY_IMPORT[room]) or 'nothing of ours'}"
            )
        below, above = floor_of(name), floor_of(imported)
        if target == room and None not in (below, above) and above < below:
            found.append(f"{name} imports {imported}, which stands on a higher floor of {room}")
        for package, owners in ONLY_IN.items():
            if (imported == package or imported.startswith(package + ".")) and name not in owners:
                found.append(f"{name} imports {package}: only {', '.join(owners)} may")
        is_config = name.endswith("config")
        if (
            is_config
            and room != "runtime"
            and target in ("torch", "numpy", "timm", "torchvision", "transformers")
        ):
            found.append(f"{name} imports {imported}: config modules import no torch")
        if (
            room == "evaluation"
            and target == "prototypes"
            and not imported.startswith("prototypes.diagnostics")
        ):
            found.append(f"{name} imports {imported}: evaluation may use prototypes.diagnostics only")
        if (
            room == "slurm"
            and target in ("training", "evaluation")
            and not imported.startswith(f"{target}.config")
        ):
            found.append(f"{name} imports {imported}: slurm may use config classes only")
        is_objective = imported.startswith("prototypes.objectives") and "interface" not in imported
        if room == "training" and is_objective:
            found.append(
                f"{name} imports {imported}: training knows the interface of objectives, no objective"
            )
        if target == "tests":
            found.append(f"{name} imports {imported}: tests wrap what is tested, which knows nothing of them")
    if room in FLOORS and floor_of(name) is None and not name.endswith("__init__"):
        found.append(f"{name} stands on no floor of {room}; FLOORS names its neighbours")
    if source.count("\n") > MAX_FILE_LINES:
        found.append(f"{name} has {source.count(chr(10))} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}.{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    leaf = name.split(".")[-1]
    if leaf in DRAWERS | SHADOWING:
        found.append(f"{name}: {leaf}.py is a drawer or shadows the standard library")
    return found


@pytest.mark.parametrize(("name", "source"), modules(), ids=[name for name, _ in modules()])
def test_module_keeps_the_rules(name, source):
    assert find_violations(name, source) == []


@pytest.mark.parametrize("room", FLOORS)
def test_every_name_of_a_floor_is_there(room):
    names = [name for floor in FLOORS[room] for name in floor]
    assert [n for n in names if not ((ROOT / room / n).is_dir() or (ROOT / room / f"{n}.py").is_file())] == []


def test_no_files_import_each_other_in_a_circle():
    assert find_circles(dict(modules())) == set()


def test_a_planted_circle_is_found():
    sources = {
        "a.one": "from a import two",
        "a.two": "def f():\n    from a.three import x",
        "a.three": "from .one import y",
        "a.four": "import a.one",
        "a.five": "",
    }
    assert find_circles(sources) == {"a.one", "a.two", "a.three"}


PLANTED = {
    "models and prototypes are strangers": (
        "models.vit",
        "from prototypes.families.gmm_diag import DiagonalGmm",
    ),
    "prototypes know no encoder": ("prototypes.learned", "import models.vit"),
    "data knows no rank": ("data.stream.pipeline", "from runtime.distributed import start"),
    "training knows no objective": ("training.step", "from prototypes.objectives.carp import carp_loss"),
    "a step's objective has an interface": ("training.step", "from prototypes.objectives import carp"),
    "no tests in production": ("training.trainer", "from tests.faults.injection import reach"),
    "training knows no evaluation": ("training.trainer", "from evaluation.probes.knn import build_knn_probe"),
    "evaluation uses diagnostics only": (
        "evaluation.probes.knn",
        "from prototypes.families.gmm_diag import DiagonalGmm",
    ),
    "slurm uses config classes only": ("slurm.submit", "from training.trainer import Trainer"),
    "an example shows prototypes alone": ("examples.decoupled", "from training.step import TrainingStep"),
    "deepspeed has one door": ("training.trainer", "import deepspeed"),
    "torch.distributed has few doors": ("prototypes.learned", "import torch.distributed as dist"),
    "from torch import distributed counts": ("models.vit", "from torch import distributed"),
    "omegaconf has one door": ("training.config", "from omegaconf import OmegaConf"),
    "wandb has one door": ("training.trainer", "def f():\n    import wandb"),
    "evaluation knows no report": ("evaluation.harness", "from report.charts import draw_audit"),
    "a report knows no audit": ("report.write", "import audit.run"),
    "views know no stream": ("data.views.decoding", "from data.stream.reader import ShardReader"),
    "a mixture knows no family": ("prototypes.mixture.model", "from ..families import vmf"),
    "objectives know no mixture": ("prototypes.objectives.carp", "from ..mixture.model import Mixture"),
    "engines know no step": ("training.engines.fsdp", "from training.step import TrainingStep"),
    "features know no probe": ("evaluation.features.extract", "import evaluation.probes.knn"),
    "a config imports nothing above": ("prototypes.mixture.config", "from ..estimator import Role"),
    "every file has a floor": ("data.somewhere", ""),
    "config modules import no torch": ("models.config", "import torch"),
    "files stay short": ("models.vit", "x = 1\n" * (MAX_FILE_LINES + 1)),
    "functions stay short": ("models.vit", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    "no drawers": ("models.utils", "x = 1"),
    "no shadows": ("runtime.logging", "x = 1"),
}


@pytest.mark.parametrize(("name", "source"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_violation_is_found(name, source):
    assert find_violations(name, source)


@pytest.mark.parametrize("name", ["step", "accumulation", "trainer"])
def test_a_step_names_no_objective(name):
    text = (ROOT / "training" / f"{name}.py").read_text().lower()
    assert [word for word in ("carp", "partition", "entropy", "consistency") if word in text] == (
        ["entropy"] if name == "accumulation" else []
    )


def test_nothing_tracked_names_a_machine():
    import subprocess

    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("needs git and a checkout")
    # Spelled in parts, so that this file does not name them itself.
    forbidden = ["/" + "root/", "/" + "work/", "../" + "shared", "/" + "home/"]
    for name in listing.stdout.split("\n"):
        path = ROOT / name
        if not name or not path.is_file() or path.suffix in (".png", ".jpg"):
            continue
        text = path.read_text(errors="ignore")
        assert not [word for word in forbidden if word in text], name


def test_fixed_top_level_exists():
    for name in (
        "README.md",
        "requirements.txt",
        "pretrain.py",
        "evaluate.py",
        "models",
        "data",
        "ds_configs",
        "slurm",
    ):
        assert (ROOT / name).exists(), name
