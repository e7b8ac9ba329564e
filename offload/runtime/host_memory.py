"""Host memory of exactly the size that was asked for, registered for fast copies where a CUDA device is used.

PyTorch's pinned allocator rounds sizes up to powers of two, so a host pool may take twice the bytes that it holds.
"""

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


class Slab:
    """``bytes_`` of host memory, mapped once; registered with CUDA if ``pinned``. ``data`` is ``[bytes_]`` uint8."""

    def __init__(self, bytes_: int, *, pinned: bool, cudart: Any = None) -> None:
        self._cudart = cudart if cudart is not None else torch.cuda.cudart() if pinned else None
        try:
            self._map = mmap.mmap(-1, bytes_)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"the host tier needs {bytes_} bytes more, and the host does not have them") from error
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        if self._cudart is not None:
            address = self.data.data_ptr()
            _check("cudaHostRegister", bytes_, self._cudart.cudaHostRegister(address, bytes_, 0))
            self._registration = weakref.finalize(self, _unregister, self._cudart, address, bytes_)

    def close(self) -> None:
        """Give the registration back, which also happens when the slab goes; the memory lives as long as ``data``."""
        if self._cudart is not None:
            self._registration()


def _unregister(cudart: Any, address: int, bytes_: int) -> None:
    _check("cudaHostUnregister", bytes_, cudart.cudaHostUnregister(address))


def _check(call: str, bytes_: int, code: Any) -> None:
    if int(code):
        raise MemoryError(f"{call} of {bytes_} bytes failed with CUDA error {int(code)}")
