"""Files that a command writes: whole or not at all, and tried before the work that they are to hold."""

import errno
import os
import secrets
import stat
from pathlib import Path


def write(path: str | Path, content: bytes | str) -> None:
    """Write a file beside and rename it: who reads ``path`` sees the old content or the new, never half of either.

    Links are followed, the mode of an older file is kept, and what is no file (a pipe, /dev/stdout) is written to as it
    is. Raises ``ValueError`` with one line; then the older file is as it was, and nothing is left beside it.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        target = os.path.realpath(path)
        if os.path.lexists(target) and not os.path.isfile(target):
            Path(target).write_bytes(data)
            return
        beside, descriptor = _open_beside(target)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except (OSError, ValueError) as error:
        raise _cannot(path, error) from error


def try_to_write(path: str | Path) -> None:
    """Raise the ``ValueError`` that ``write`` would raise for this name, before the work; nothing is changed."""
    try:
        target = os.path.realpath(path)
        if os.path.lexists(target) and not os.path.isfile(target):
            if stat.S_ISDIR(os.stat(target).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return
        beside, descriptor = _open_beside(target)
        os.close(descriptor)
        os.unlink(beside)
    except (OSError, ValueError) as error:
        raise _cannot(path, error) from error


def _open_beside(target: str) -> tuple[str, int]:
    """A new file in the folder of the target, with the mode that the target has or would get."""
    mode = stat.S_IMODE(os.stat(target).st_mode) if _is_there(target) else None
    beside = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    if mode is not None:
        os.fchmod(descriptor, mode)
    return beside, descriptor


def _is_there(target: str) -> bool:
    try:
        os.stat(target)  # and not os.path.exists: a name that is too long is a fault
    except FileNotFoundError:
        return False
    return True


def _cannot(path: str | Path, error: Exception) -> ValueError:
    name = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    return ValueError(f"cannot write {name}: {getattr(error, 'strerror', None) or error}")
