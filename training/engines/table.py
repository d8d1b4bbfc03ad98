"""Which features work on which engine: one table, read at start and printed in docs/engines.md.

A combination that is not in the table is refused before step 0, in one line that says why.
"""

from __future__ import annotations

from torch import nn

from models.vit import has_compiled_blocks

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")

# Feature: {engine: reason why not}. An engine that is absent supports the feature.
_CUT_NORMS = "LARS needs the norm of whole tensors and this engine cuts them"
_CUT_GRAPHS = "its hooks gather and free parameters inside the block's graph"
UNSUPPORTED: dict[str, dict[str, str]] = {
    "optimizer lars": dict.fromkeys(("zero1", "zero2", "zero3", "fsdp2"), _CUT_NORMS),
    "BatchNorm": {"fsdp2": "its mixed precision and its units know no BatchNorm buffers"},
    "compile_blocks": {"zero3": _CUT_GRAPHS},
}

REMEDIES = {
    "optimizer lars": "set engine.deepspeed_config=ds_configs/zero0_fp32.json",
    "BatchNorm": "set engine.name=deepspeed",
    "compile_blocks": "set model.compile_blocks=false",
}


def check_combination(engine: str, optimizer: str, student: nn.Module) -> None:
    """Returns if `engine` can train `student` with `optimizer`.

    Args:
        engine: one of `ENGINES`.
        optimizer: `adamw` or `lars`.
        student: looked at for BatchNorm and for compiled blocks.

    Raises:
        ValueError: it cannot; the message names feature, engine, reason and remedy.
    """
    features = [f"optimizer {optimizer}"]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules()):
        features.append("BatchNorm")
    if has_compiled_blocks(student):
        features.append("compile_blocks")
    for feature in features:
        reason = UNSUPPORTED.get(feature, {}).get(engine)
        if reason is not None:
            supported = ", ".join(name for name in ENGINES if name not in UNSUPPORTED[feature])
            raise ValueError(
                f"{feature} is not supported by {engine}; expected one of {supported}, because {reason}; "
                f"{REMEDIES[feature]}"
            )
