"""Pretrains and evaluates the arms of a comparison for several seeds, and writes what came out side by side.

    python -m audit CONFIG.yaml [key.sub=value ...]             run what is missing, then write the page
    python -m audit CONFIG.yaml --tables                        only collect what is there
    python -m audit CONFIG.yaml --slurm [SUBMIT OPTIONS ...]    print the submit commands, run nothing

Every run is `pretrain.py` and `evaluate.py` with the arm's overrides, as a process of its own. The same command again
goes on where it was stopped: finished runs are kept, a half-trained one continues from its checkpoint. Every arm's
configuration is read first, and runs of another one are refused. Writes `report/index.html`, its figures as PNG,
`results.json`, `results.csv` and `results.md` into the audit's folder.
Exit codes: 0 all runs are there, 1 some failed (their logs are named), 2 the user's mistake, 75 after SIGTERM or
SIGHUP and 130 after Ctrl-C: the runs were asked to save and have ended, and the same command goes on.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from audit.cells import ROOT, Cell, audit_directory, iterate_cells
from audit.checks import check_cells
from audit.config import AuditConfig
from evaluation.config import EvaluationConfig
from runtime.children import Children
from runtime.config import config_to_yaml, load_config
from runtime.files import write_atomically
from runtime.logging_setup import set_up_logging
from runtime.program import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from runtime.usage import asks_for_help, describe_usage

logger = logging.getLogger(__name__)

# Of slurm.submit, with their values: how an array runs. What it runs, the audit says.
_SUBMIT_OPTIONS = ("--cluster", "--nodes", "--gpus-per-node", "--partition", "--time", "--after")


def main(arguments: list[str]) -> int:
    """Returns the exit code of one audit."""
    if asks_for_help(arguments):
        print(describe_usage(__doc__, AuditConfig), end="")
        return EXIT_DONE
    if not arguments:
        raise UserError(
            "no configuration given; expected CONFIG.yaml [key.sub=value ...]; see configs/audit_*.yaml, or --help"
        )
    try:
        return _audit(*arguments)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read or written ({error.strerror}); expected files and folders of yours; set "
            "output_dir"
        ) from error


def _audit(path: str, *rest: str) -> int:
    if "--slurm" in rest:
        split = rest.index("--slurm")
        config = load_config(AuditConfig, path, rest[:split])
        check_cells(config)
        print("\n".join(submit_commands(config, rest[split + 1 :])))
        return EXIT_DONE
    only_tables = "--tables" in rest
    config = load_config(AuditConfig, path, [argument for argument in rest if argument != "--tables"])
    set_up_logging(rank=0)
    check_cells(config)
    failed: list[Cell] = []
    if not only_tables:
        with Children() as children:
            failed = run_missing(config, children)
        if children.stopped_by is not None:
            name = children.stopped_by.name
            print(f"stopped by {name}: the runs have ended; the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED if children.stopped_by == signal.SIGINT else EXIT_PREEMPTED
        for cell in failed:
            print(f"error: {cell.name} failed; read {cell.log}", file=sys.stderr)
        if failed and not any(cell.is_done for cell in iterate_cells(config, tuple(config.arms))):
            return EXIT_FAULT  # of which no page can be written
        check_cells(config)  # what has been run and measured since
    # Imported late: the programs above bring their own torch, and this one waits for them.
    from audit.write import write_audit

    print(write_audit(config))
    return EXIT_FAULT if failed else EXIT_DONE


def run_missing(config: AuditConfig, children: Children) -> list[Cell]:
    """Runs every chosen cell without results, some at once, and returns those that failed or were stopped."""
    cells = [cell for cell in iterate_cells(config, config.chosen_arms) if not cell.is_done]
    if not cells:
        return []
    cells[0].log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%d runs to do, %d at once; logs in %s", len(cells), config.processes, cells[0].log.parent)
    with ThreadPoolExecutor(config.processes) as pool:
        succeeded = list(pool.map(partial(_run_cell, children), cells))
    return [cell for cell, success in zip(cells, succeeded, strict=True) if not success]


def _run_cell(children: Children, cell: Cell) -> bool:
    started = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // cell.config.processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with cell.log.open("a") as log:
        for command in cell.commands():
            if children.stopped_by is not None:
                return False
            log.write(f"$ {shlex.join(command[1:])}\n")
            log.flush()
            code = children.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            if code != EXIT_DONE:
                level = logging.ERROR if children.stopped_by is None else logging.INFO
                logger.log(level, "%s: %s ended with code %d; see %s", cell.name, command[1], code, cell.log)
                return False
    if not cell.is_done:
        logger.error("%s: the programs ended well and left no results in %s", cell.name, cell.directory)
        return False
    logger.info("%s: done in %.0f s", cell.name, time.monotonic() - started)
    return True


def submit_commands(config: AuditConfig, options: Sequence[str]) -> list[str]:
    """Returns one `slurm.submit` command line for each arm: an array over the seeds, with its evaluation chained.

    The runs land where the audit looks for them, so `--tables` collects them when they are done. Writes the
    evaluation's configuration, overrides included, into the audit's folder: that is what the jobs read.

    Raises:
        UserError: `segment` names a second evaluation, and a job chains one, or an option is none that may be set.
    """
    _check_submit_options(options)
    if config.segment:
        raise UserError(
            f"segment is {config.segment} with --slurm; expected none, as a job is followed by one evaluation; "
            "take segment out here, and run the audit with it and without --slurm when the jobs are done"
        )
    seeds = ",".join(str(seed) for seed in config.seeds)
    folder = audit_directory(config)
    # A file of an audit need not name an encoder; every job sets its own.
    options_of_all = [*config.evaluate_overrides, f"encoder={folder}", "controls=[]"]
    evaluation = load_config(EvaluationConfig, str(ROOT / config.evaluate), options_of_all)
    path = folder / "evaluate.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, config_to_yaml(evaluation))
    chained = ["--evaluate", ",".join(config.probes), "--evaluate-config", str(path)]
    lines = []
    for arm in config.chosen_arms:
        start, overrides = config.start_of(arm)
        place = [f"run.name={arm}", f"run.output_dir={folder}"]
        command = [
            "python",
            "-m",
            "slurm.submit",
            start,
            *overrides,
            *place,
        ]
        command += ["--array", f"seeds={seeds}", *chained, *options]
        lines.append(shlex.join(command))
    return lines


def _check_submit_options(options: Sequence[str]) -> None:
    rest = iter(options)
    for option in rest:
        name, equals, _ = option.partition("=")
        is_whole = equals or name not in _SUBMIT_OPTIONS or not next(rest, "--").startswith("--")
        if not is_whole or (name not in _SUBMIT_OPTIONS and option != "--dry-run"):
            raise UserError(
                f"{option!r} stands behind --slurm; expected --dry-run, or one of {', '.join(_SUBMIT_OPTIONS)} with a "
                "value; write what is of the audit before --slurm"
            )
