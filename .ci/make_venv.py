"""`python .ci/make_venv.py FOLDER TORCH`: what the lock says, torch, and this repository, in an environment of its own.

Everything but torch comes with the hashes of requirements.lock. torch's builds differ from machine to machine: where
the Python that runs this has one that fits pyproject.toml, that one is used; elsewhere version TORCH is installed.
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: str, torch: str) -> None:
    here = torch_here()
    own = here is None
    print(f"{folder}: torch {torch}, to be installed" if own else f"{folder}: torch {here}, which {sys.executable} has")
    subprocess.run(
        [sys.executable, "-m", "venv", *([] if own else ["--system-site-packages"]), folder],
        check=True,
    )
    lock = blocks((ROOT / "requirements.lock").read_text())
    if not own and version("triton"):
        del lock["triton"]  # the one here belongs to the torch here
    locked(folder, {"pip": lock.pop("pip")})
    locked(folder, lock)
    if own:
        pip(folder, f"torch=={torch}")
    pip(folder, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def torch_here() -> str | None:
    """The version of torch that this Python has and a virtual environment of it sees, if it fits; else None."""
    import tomllib  # below the check that Python is new enough to have it

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (re.fullmatch(r"torch>=([\d.]+)", line) for line in project["dependencies"] if line.startswith("torch"))
    assert bound is not None, "pyproject.toml must say torch>=X.Y"
    found = version("torch")
    if sys.prefix != sys.base_prefix or found is None or release(found) < release(bound[1]):
        return None
    return found


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(text: str) -> list[int]:
    """2.13.0+cpu: [2, 13, 0]."""
    return [int(part) for part in re.match(r"[\d.]*\d", text)[0].split(".")]  # type: ignore[index]


def blocks(lock: str) -> dict[str, str]:
    """The lines of each package, by its name."""
    found = re.findall(r"^[a-z0-9].*(?:\n[ ].*)*", lock, re.MULTILINE)
    return {re.split("[=<> ;]", block)[0]: block for block in found}


def locked(folder: str, lock: dict[str, str]) -> None:
    pip(folder, "--require-hashes", "--no-deps", "--requirement", "/dev/stdin", said="\n".join(lock.values()))


def pip(folder: str, *words: str, said: str = "") -> None:
    command = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, input=said, text=True, check=True)


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - one line instead of a traceback
        sys.exit(f"seqpar needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")
    main(*sys.argv[1:])
