"""Counts what a program asks of its device: kernels, and results that the CPU waits for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
_aten = torch.ops.aten
# They make or describe memory and launch nothing.
_NO_KERNEL = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.detach.default,
    _aten._local_scalar_dense.default,
    _aten.lift_fresh.default,
    _aten.set_.source_Storage_storage_offset,
}
# Their result, or its size, is not known before the device has computed it.
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


class DeviceCounter(TorchDispatchMode):
    """Counts kernels and waits of everything that runs inside, on whatever device it runs.

    On a CPU nothing waits, but the same program would on a GPU: reading a scalar, a shape that depends on values
    (`nonzero`, a boolean mask as index), a copy between CPU and GPU that is not asynchronous.

    Attributes:
        kernels: number of operations by name that compute or copy; views and allocations are none.
        waits: number of waits by the place that caused them, "file:line function".
        vendor_waits: the same of those inside DeepSpeed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.vendor_waits: Counter[str] = Counter()

    def __enter__(self) -> Any:
        # Reads memory without an operation, after a copy to the CPU where it is a GPU's.
        original = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self._count_wait()
            return original(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        del torch.Tensor.tolist
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WAITS or _is_masked(func, args) or _is_blocking_copy(func, args, kwargs):
            self._count_wait()
        if not func.is_view and func not in _NO_KERNEL:
            self.kernels[str(func)] += 1
        return func(*args, **kwargs)

    def _count_wait(self) -> None:
        place, is_vendor = _find_place()
        (self.vendor_waits if is_vendor else self.waits)[place] += 1


def _is_masked(func: Any, args: Any) -> bool:
    if func not in _INDEXING:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _is_blocking_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation moves data between CPU and GPU while the CPU stands by."""
    if func is _aten._to_copy.default:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        non_blocking = kwargs.get("non_blocking", False)
    elif func is _aten.copy_.default:
        source, target = args[1].device, args[0].device
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    else:
        return False
    return source.type != target.type and not non_blocking


def _find_place() -> tuple[str, bool]:
    """Returns the innermost frame of this repository or of DeepSpeed, and whether it is DeepSpeed's."""
    frame = sys._getframe(3)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}", True
        if path.startswith(f"{ROOT}/") and not path.startswith(str(ROOT / "tests")) and ".venv" not in path:
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}", False
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere", False


def largest_tensor(body: Callable[[], object]) -> int:
    """Returns the elements of the largest tensor that an operation gives while `body` runs, backward included."""
    biggest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, torch.Tensor):
                    biggest = max(biggest, value.numel())
            return result

    with Watch():
        body()
    return biggest
