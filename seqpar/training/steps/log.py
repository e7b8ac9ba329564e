"""What a run tells as it goes: a line of JSON for every step, and a line for people."""

import json
import math
import os
import resource
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Progress:
    """What one step did. ``tokens`` of all sequences; ``tokens_per_rank`` that the fullest rank held; ``bytes_sent`` by
    this rank; ``mfu``: the share of ``peak_flops`` that ``flops`` of the step are in ``seconds``."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    tokens_per_rank: int
    seconds: float
    bytes_sent: int
    memory_bytes: int
    flops: float = 0.0
    peak_flops: float = 0.0
    note: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """None where no peak is known."""
        return self.flops / self.seconds / self.peak_flops if self.peak_flops else None

    def row(self) -> dict[str, Any]:
        """For the log."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "mfu": self.mfu}

    def line(self) -> str:
        """For people."""
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%} of {self.peak_flops / 1e12:,.0f} TFLOP/s"
        return (
            f"step {self.step:>6}  loss {self.loss:.4f}  norm {self.gradient_norm:.3g}  rate {self.learning_rate:.2e}  "
            f"{self.tokens:,} tokens  {self.tokens_per_second:,.0f}/s  {self.tokens_per_rank:,} a rank  "
            f"sent {self.bytes_sent / 1e6:,.2f} MB  memory {self.memory_bytes / 2**30:,.2f} GiB{mfu}"
            + (f"  {self.note}" if self.note else "")
        )


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on a GPU, or on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Log:
    """JSON lines, one for each step, in a file that a run which is resumed goes on with.

    ``after``: the step that the run resumes from (0: a new run). Lines of later steps, which come again, and a line
    that was cut off are taken away, so that every step has one line. Each line is whole once ``write`` returns, as far
    as the system is concerned. Raises ``ValueError`` if the file cannot be written, or is none of ours.
    """

    def __init__(self, path: str | Path, after: int = 0) -> None:
        self._path = Path(path)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if stat.S_ISREG(os.fstat(self._file).st_mode):  # and no pipe or terminal
                os.ftruncate(self._file, self._kept(after))
                os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None

    def write(self, row: Mapping[str, Any]) -> None:
        """One line; numbers that are not finite are null, since JSON has none. Raises ``ValueError`` on a full disk."""
        plain = {name: None if _is_odd(value) else value for name, value in row.items()}
        line = memoryview((json.dumps(plain) + "\n").encode())
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise ValueError(f"cannot write {self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def _kept(self, after: int) -> int:
        """How many bytes hold whole lines of steps up to ``after``."""
        size = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{self._path}: is no log of a run: line {line[:80]!r}") from None
                if step > after:
                    break
                size += len(line)
        return size


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
