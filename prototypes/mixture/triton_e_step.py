# mypy: disable-error-code=no-untyped-def
"""The E-step of many components and few rows as a Triton kernel: the logits are never written.

Imported only where the kernel is used: the package needs torch alone. Under `TRITON_INTERPRET=1`, set before triton
is imported, the same code runs on the CPU.

Two launches. `_scan`: each program takes a block of rows and a range of the components, walks the range tile by tile
and keeps, per row, the running maximum of the logits, the sum of their exponentials and the m largest. `_combine`:
one program per row brings the ranges together. Split over the components, 128 rows keep a whole GPU busy; the table of
natural parameters is read once per block of rows. Running sums of exponentials: Milakov & Gimelshein 2018.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import triton
import triton.language as tl

from .sparse import TopLogits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Product = Literal["fp32", "bf16x3"]

_ROWS = 64
_COMPONENTS = 64
_FEATURES = 32
_WARPS = 4
_PROGRAMS_PER_PROCESSOR = 2
_PROCESSORS_OF_THE_INTERPRETER = 3
"""Any number above 1: a row's components are split there too."""

_NOTHING = tl.constexpr(-(2**63))
"""Below the key of every logit, with room for a number of slots."""
_ALL_BITS = tl.constexpr(2**31 - 1)
_TILES = {
    "ROWS": _ROWS,
    "COMPONENTS": _COMPONENTS,
    "FEATURES": _FEATURES,
    "IS_INTERPRETED": triton.knobs.runtime.interpret,
    "num_warps": _WARPS,
}


def scan_components(
    features: Float[Tensor, "N F"],
    theta: Float[Tensor, "K F"],
    offset: Float[Tensor, " K"],
    beta: float,
    num_kept: int,
    product: Product = "bf16x3",
) -> TopLogits:
    """Returns the m largest of the logits t_ik = beta f(h_i) . theta_k + offset_k of each row, by falling logit.

    Of equal logits the lower index comes first, and is kept. fp32 sums throughout; no gradient, no host wait, not
    collective. "fp32" multiplies as written; "bf16x3" takes hi.hi + hi.lo + lo.hi of operands cut into two bfloat16
    parts, which tensor cores can do: of every product at most 3 * 2^-17 of its size is lost.

    Args:
        features: f of the shifted rows, fp32, contiguous.
        theta: natural parameters, fp32, contiguous.
        offset: beta (b_k + log pi_k) less the penalty of balanced responsibilities, fp32.
        beta: inverse temperature.
        num_kept: m, a power of two; at most 128 and K.
        product: how the products are taken.
    """
    num_rows, num_features = features.shape
    num_components = len(theta)
    if num_kept & (num_kept - 1) or not 2 <= num_kept <= min(num_components, 128):
        raise ValueError(
            f"num_kept is {num_kept}; expected a power of two of 2 to 128 and at most K; pass another"
        )
    top = TopLogits(
        torch.empty(num_rows, num_kept, dtype=torch.int64, device=features.device),
        features.new_empty(num_rows, num_kept),
        features.new_empty(num_rows),
        features.new_empty(num_rows),
    )
    if num_rows == 0:
        return top
    row_blocks = triton.cdiv(num_rows, _ROWS)
    num_splits, share = _split(num_components, row_blocks, features.device)
    keys = torch.empty(num_rows, num_splits, num_kept, dtype=torch.int64, device=features.device)
    largest, total = features.new_empty(2, num_rows, num_splits).unbind()
    _scan[row_blocks, num_splits](
        *(features, theta, offset, keys, largest, total, beta),
        *(num_rows, num_components, num_features, share, num_splits),
        KEPT=num_kept,
        IS_BF16X3=product == "bf16x3",
        **_TILES,
    )
    _combine[num_rows,](
        keys,
        largest,
        total,
        *top,
        num_splits,
        KEPT=num_kept,
        SPLITS=triton.next_power_of_2(num_splits),
    )
    return top


def _split(num_components: int, row_blocks: int, device: torch.device) -> tuple[int, int]:
    """Returns how many ranges the components are cut into and how many each holds: whole tiles, none empty."""
    processors = _PROCESSORS_OF_THE_INTERPRETER
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_tiles = triton.cdiv(num_components, _COMPONENTS)
    wanted = max(1, _PROGRAMS_PER_PROCESSOR * processors // row_blocks)
    tiles_each = triton.cdiv(num_tiles, min(wanted, num_tiles))
    return triton.cdiv(num_tiles, tiles_each), tiles_each * _COMPONENTS


@triton.jit
def _scan(
    features,
    theta,
    offset,
    keys,
    largest,
    total,
    beta,
    num_rows,
    num_components,
    num_features,
    share,
    num_splits,
    ROWS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    FEATURES: tl.constexpr,
    KEPT: tl.constexpr,
    IS_BF16X3: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    is_row = rows < num_rows
    stop = tl.minimum((split + 1) * share, num_components)
    slots = tl.arange(0, KEPT)
    best = tl.zeros([ROWS, KEPT], tl.int64) + (slots[None].to(tl.int64) + _NOTHING)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for first in range(split * share, stop, COMPONENTS):
        components = first + tl.arange(0, COMPONENTS)
        is_component = components < stop
        acc = tl.zeros([ROWS, COMPONENTS], tl.float32)
        for start in range(0, num_features, FEATURES):
            columns = start + tl.arange(0, FEATURES)
            is_column = columns < num_features
            row_tile = tl.load(
                features + rows[:, None] * num_features + columns[None],
                mask=is_row[:, None] & is_column[None],
                other=0.0,
            )
            # int64: K F may pass 2^31
            theta_tile = tl.load(
                theta + components[None].to(tl.int64) * num_features + columns[:, None],
                mask=is_component[None] & is_column[:, None],
                other=0.0,
            )
            acc = _add_product(row_tile, theta_tile, acc, IS_BF16X3, IS_INTERPRETED)
        shift = tl.load(offset + components, mask=is_component, other=float("-inf"))
        logits = acc * beta + shift[None]
        higher = tl.maximum(peak, tl.max(logits, 1))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        peak = higher
        found = tl.where(is_component[None], _pack(logits, components[None]), _NOTHING)
        best = _take_largest(best, found)
    place = rows * num_splits + split
    tl.store(largest + place, peak, mask=is_row)
    tl.store(total + place, mass, mask=is_row)
    tl.store(keys + place[:, None] * KEPT + slots[None], best, mask=is_row[:, None])


@triton.jit
def _take_largest(best, found):
    """The largest keys of both, row by row; the sooner the tiles bring nothing new, the shorter the loop."""
    lowest, candidate = tl.min(best, 1), tl.max(found, 1)
    while tl.max((candidate > lowest).to(tl.int32), 0) > 0:
        is_replaced = (best == lowest[:, None]) & (candidate > lowest)[:, None]
        best = tl.where(is_replaced, candidate[:, None], best)
        found = tl.where(found == candidate[:, None], _NOTHING, found)
        lowest, candidate = tl.min(best, 1), tl.max(found, 1)
    return best


@triton.jit
def _combine(
    keys,
    largest,
    total,
    index,
    logit,
    log_normaliser,
    maximum,
    num_splits,
    KEPT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    is_split = splits < num_splits
    peaks = tl.load(largest + row * num_splits + splits, mask=is_split, other=float("-inf"))
    masses = tl.load(total + row * num_splits + splits, mask=is_split, other=0.0)
    peak = tl.max(peaks, 0)
    tl.store(maximum + row, peak)
    tl.store(log_normaliser + row, tl.log(tl.sum(masses * tl.exp(peaks - peak), 0)))
    slots = tl.arange(0, SPLITS * KEPT)
    found = tl.load(keys + row * num_splits * KEPT + slots, mask=slots < num_splits * KEPT, other=_NOTHING)
    for slot in range(KEPT):
        best = tl.max(found, 0)
        found = tl.where(found == best, _NOTHING, found)
        value = _order((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        tl.store(index + row * KEPT + slot, (best & _ALL_BITS) ^ _ALL_BITS)
        tl.store(logit + row * KEPT + slot, value - peak)


@triton.jit
def _add_product(row_tile, theta_tile, acc, IS_BF16X3: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    if not IS_BF16X3:
        return tl.dot(row_tile, theta_tile, acc, input_precision="ieee")
    row_high, row_low = _cut(row_tile, IS_INTERPRETED)
    theta_high, theta_low = _cut(theta_tile, IS_INTERPRETED)
    # The small terms first: they would be rounded away beside a large sum.
    acc = tl.dot(row_low, theta_high, acc)
    acc = tl.dot(row_high, theta_low, acc)
    return tl.dot(row_high, theta_high, acc)


@triton.jit
def _cut(values, IS_INTERPRETED: tl.constexpr):
    high = values.to(tl.bfloat16)
    low = (values - high.to(tl.float32)).to(tl.bfloat16)
    if IS_INTERPRETED:  # it multiplies the bit patterns of bfloat16; the fp32 numbers have the same products
        return high.to(tl.float32), low.to(tl.float32)
    return high, low


@triton.jit
def _pack(logits, components):
    """One int64 whose order is that of the logits and, where they are equal, the reverse of the index."""
    order = _order(logits.to(tl.int32, bitcast=True)).to(tl.int64)
    return (order << 32) | (components ^ _ALL_BITS).to(tl.int64)


@triton.jit
def _order(bits):
    """The bits of an fp32 as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & _ALL_BITS)
