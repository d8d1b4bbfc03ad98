"""Evaluates a frozen encoder with the probes that a YAML file names.

    python evaluate.py configs/eval_fashion_mnist.yaml encoder=outputs/RUN probes=[prototypes,knn] [key.sub=value ...]
    accelerate launch --num_processes 2 evaluate.py ...        (or torchrun; one process needs no launcher)

`encoder` is a run directory, a checkpoint, an exported folder, `timm:NAME`, `hf:NAME`, `local-dir:PATH`,
`random-init:RUN[:SEED]` or `raw-pixels`. Results go to `RUN/results/{probe}.json`. See docs/evaluation.md.
Exit codes: 0 done, 1 a fault, 2 the user's mistake (one line), 130 Ctrl-C.
"""

from __future__ import annotations

import sys

from runtime.program import UserError, run_program


def main(arguments: list[str]) -> int:
    """Returns the exit code of one evaluation."""
    # Inside `run_program`, so that Ctrl-C is one line from here on.
    from runtime.requirements import ENCODER_PACKAGES, require_packages

    require_packages(*ENCODER_PACKAGES, "webdataset", "accelerate")
    from evaluation.config import EvaluationConfig
    from runtime.config import load_config
    from runtime.usage import asks_for_help, describe_usage

    if asks_for_help(arguments):
        print(describe_usage(__doc__, EvaluationConfig), end="")
        return 0
    if not arguments:
        raise UserError(
            "no configuration given; expected CONFIG.yaml [encoder=SPEC] [key.sub=value ...]; see configs/eval_*.yaml, "
            "or --help"
        )
    config = load_config(EvaluationConfig, arguments[0], arguments[1:])
    # Imported once the configuration is known to be right: torch takes seconds.
    from evaluation.harness import evaluate
    from report.charts import draw_audits
    from report.tables import summarise
    from runtime.logging_setup import set_up_logging

    set_up_logging(rank=0)
    written = evaluate(config)
    if written:
        draw_audits(written)
        print(summarise(written))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
