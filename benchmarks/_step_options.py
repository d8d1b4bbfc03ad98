"""What a program says of the step that it measures; `_step_contestants.build_config` reads it. Imports no torch."""

from __future__ import annotations

import argparse

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
MODEL_NAMES = ("tiny", "vits", "vitl")
OBJECTIVES = ("carp", "ibot")


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Adds all that decides a step but its engine, mode and batch, of which one program has one and another many."""
    parser.add_argument("--model", choices=MODEL_NAMES, default="tiny", help="size of the encoder")
    parser.add_argument("--objective", choices=OBJECTIVES, default="carp", help="what the encoder minimises")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder")
    parser.add_argument("--local-crops", type=int, help="number of local crops")
    parser.add_argument("--workers", type=int, default=0, help="loader processes a rank; 0 loads in the step")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute blocks")
    parser.add_argument("--compile", action="store_true", help="compile blocks where the engine allows it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
