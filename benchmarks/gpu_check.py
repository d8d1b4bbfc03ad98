"""All that this project measures on a GPU, in parts that are never repeated: python -m benchmarks.gpu_check [--tiny].

    python -m benchmarks.gpu_check                     # under an hour on one GPU; `make gpu-check` does the same
    python -m benchmarks.gpu_check --parts gmm loss    # these alone
    python -m benchmarks.gpu_check --tiny              # a rehearsal with toy sizes, on a CPU too

Every part takes eight minutes at most and leaves a record, OUT/PART.json. A part that has a record of the same command
on the same device is not run again; one that failed or was stopped is. After each, gpu_check.json and gpu_check.md hold
all there is: ceilings, figures, verdicts, and the lines of documents and configurations that say "not run" and that
the figures belong to. No bar that was agreed on a CPU is applied to a GPU. Exit code 1 if a part failed; a batch too
large for the GPU's memory is a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import describe_verdict, replace_file, run
from runtime.usage import HelpFormatter

ROOT = Path(__file__).resolve().parent.parent
PART_LIMIT_S = 480.0
_TEST_SUMMARY = r"^(FAILED|ERROR|SKIPPED)\b|\b(passed|failed|skipped|errors?)\b.* in "


class Part(NamedTuple):
    """One program of the check.

    Attributes:
        command: module and arguments; {device} and {out} are filled in.
        tiny: the same as a rehearsal.
        places: files whose lines about what was not run speak of these figures.
        shown: pattern of the lines that the table shows.
    """

    command: str
    tiny: str
    places: tuple[str, ...]
    shown: str = r"^(?!\[\d{4}-)"  # but for DeepSpeed's log


def list_parts() -> dict[str, Part]:
    """Returns the parts by name: every file of tests/gpu, then every benchmark."""
    ceilings = "benchmarks._ceiling --device {device}"
    parts = {"ceilings": Part(ceilings, ceilings, ("docs/estimator.md",))}
    for path in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        command = f"pytest -q -ra {path.relative_to(ROOT)}"
        name = path.stem.removeprefix("test_").removesuffix("_on_gpu")
        parts[f"tests-{name}"] = Part(command, command, ("docs/engines.md",), _TEST_SUMMARY)
    parts["gmm"] = Part(
        "benchmarks.gmm --device {device}",
        "benchmarks.gmm --device {device} --rounds 1",
        ("docs/estimator.md",),
    )
    parts["loss"] = Part(
        "benchmarks.loss --device {device}",
        "benchmarks.loss --device {device} --K 2048 --rounds 1",
        ("docs/estimator.md",),
    )
    workers = min(16, max(1, (os.cpu_count() or 1) - 2))  # with none the step would wait for its own images
    for crops, batch, options in (
        (10, 64, ""), (10, 64, " --compile"), (8, 64, ""), (10, 32, ""), (10, 96, ""), (10, 128, ""),
    ):  # fmt: skip
        name = f"step-2x{crops}-batch{batch}{options.replace(' --', '-')}"
        shared = "benchmarks.step --device {device} --ranks 1 --engines zero1"
        large = f"{shared} --model vitl --precision bf16 --workers {workers}"
        parts[name] = Part(
            f"{large} --local-crops {crops} --batch {batch}{options}",
            f"{shared} --model tiny --local-crops {crops // 4} --batch {batch // 16} --rounds 1 --steps 1",
            ("docs/engines.md", "docs/slurm.md", "configs/pretrain_vitl16_imagenet_full.yaml"),
        )
    profile = "benchmarks.step_profile --device {device}"
    parts["profile"] = Part(
        f"{profile} --model vitl --precision bf16 --workers {workers} --batch 64 --compile",
        f"{profile} --batch 4 --steps 1",
        ("docs/engines.md",),
    )
    loader = "benchmarks.loader --memory-samples 0 --work {out}/loader --out {out}/loader-figures.json"
    parts["loader"] = Part(
        f"{loader} --rounds 2 --seconds 4",
        f"{loader} --rounds 1 --seconds 0.1 --num-images 32",
        ("docs/data.md",),
    )
    return parts


PARTS = list_parts()


def main(arguments: list[str] | None = None) -> int:
    """Runs what has no record yet, writes and prints; returns the exit code."""
    options = _parse(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        print(
            f"error: part is {unknown[0]}; expected one of {', '.join(PARTS)}; set --parts", file=sys.stderr
        )
        return 2
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("error: device is cpu; expected a CUDA GPU; set --tiny for a rehearsal", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    out = Path(options.out or ("outputs/gpu_check_tiny" if options.tiny else "outputs/gpu_check"))
    out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(options.parts or PARTS, 1):
        command = (PARTS[part].tiny if options.tiny else PARTS[part].command).format(
            device=device, out=shlex.quote(str(out))
        )
        if is_finished(out / f"{part}.json", command, name, is_tiny=options.tiny):
            print(f"[{number}] {part}: has a record")
            continue
        print(f"[{number}] {part}: python -m {command}", flush=True)
        run(part, command, out, device=device, timeout_s=PART_LIMIT_S)
        write(out, is_tiny=options.tiny)
    records = write(out, is_tiny=options.tiny)
    print((out / "gpu_check.md").read_text())
    wanted = options.parts or PARTS
    return 0 if all(has_passed(records[part], is_tiny=options.tiny) for part in wanted) else 1


def is_finished(path: Path, command: str, device: str, *, is_tiny: bool) -> bool:
    """Whether a record is of this command on this device, and the program came to a good end."""
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    same = record["command"] == f"python -m {command}" and record["device"] == device
    return same and has_passed(record, is_tiny=is_tiny)


def has_passed(record: Mapping[str, Any], *, is_tiny: bool) -> bool:
    """Whether a program ended well, or was too large for the GPU; bars mean nothing in a rehearsal."""
    has_missed_a_bar = record["exit_code"] == 1 and any("FAIL " in line for line in record["lines"])
    return record["exit_code"] == 0 or record["out_of_memory"] or (is_tiny and has_missed_a_bar)


def write(out: Path, *, is_tiny: bool) -> dict[str, Any]:
    """Writes gpu_check.json and gpu_check.md of all records; returns the records by part."""
    records = {
        part: json.loads((out / f"{part}.json").read_text())
        for part in PARTS
        if (out / f"{part}.json").is_file()
    }
    replace_file(out / "gpu_check.json", json.dumps(records, indent=1) + "\n")
    replace_file(out / "gpu_check.md", describe(records, ROOT, is_tiny=is_tiny))
    return records


def describe(records: Mapping[str, Mapping[str, Any]], root: Path, *, is_tiny: bool) -> str:
    """Returns the Markdown page: where it was measured, one table, and the lines that the figures belong to."""
    ceilings = next(iter(records.get("ceilings", {}).get("lines", [])), "ceilings: not measured")
    places = sorted(
        {(r["device"], r["torch"], (r["commit"] or "no commit")[:12]) for r in records.values()}, key=str
    )
    warning = ["A rehearsal: figures and verdicts mean nothing.", ""] if is_tiny else []
    lines = [
        "# GPU check",
        "",
        *warning,
        *("On {}, torch {}, commit {}.".format(*place) for place in places),
        "",
    ]
    lines += [f"{ceilings[0].upper()}{ceilings[1:]}.", ""]
    lines += ["| part | seconds | verdict | what was measured |", "|---|---|---|---|"]
    for part, record in records.items():
        shown = [line.strip() for line in record["lines"] if re.search(PARTS[part].shown, line)]
        shown += [f"stderr: {record['error']}"] if record["error"] else []
        for line in shown:
            text = line.replace("|", "/")
            lines.append(f"| {part} | {record['seconds']:.0f} | {describe_verdict(record, line)} | {text} |")
    missing = [part for part in PARTS if part not in records]
    lines += [
        "",
        f"Without a record: {', '.join(missing) or 'none'}.",
        "",
        "## Lines that these figures belong to",
    ]
    found = [
        f"- {place} ({', '.join(parts)}): {text}"
        for place, (text, parts) in find_places(records, root).items()
    ]
    return "\n".join([*lines, "", *(found or ["none"])]) + "\n"


PLACEHOLDER = re.compile(
    r"not (yet )?(been )?(run|measured|compared|verified)\b|\bunverified\b|\bnothing\b.*\b(run|measured)\b|"
    r"\bno figure\b.*\bmeasured\b",
    re.IGNORECASE,
)
"""What a line says whose figure is still to come."""


def find_places(records: Mapping[str, object], root: Path) -> dict[str, tuple[str, list[str]]]:
    """Returns, by "file:line", the lines that say that something was not run, and the kinds of parts that ran it."""
    parts_of: dict[str, list[str]] = {"README.md": ["all"]} if records else {}
    for part in records:
        for place in PARTS[part].places:
            kind = part.split("-")[0]
            if kind not in parts_of.setdefault(place, []):
                parts_of[place].append(kind)
    found = {}
    for place, parts in parts_of.items():
        for number, line in enumerate((root / place).read_text().splitlines(), 1):
            if PLACEHOLDER.search(line):
                found[f"{place}:{number}"] = (line.strip(), parts)
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", default=[], metavar="PART", help=f"of {', '.join(PARTS)}; all by default"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes: shows that everything runs, measures nothing"
    )
    parser.add_argument(
        "--out", default="", help="folder of the records [outputs/gpu_check, or outputs/gpu_check_tiny]"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
