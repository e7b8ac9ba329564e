"""Figures in a README: what stands between two markers is replaced by what was measured last."""

from collections.abc import Sequence
from pathlib import Path


def put(path: Path, name: str, text: str) -> None:
    """Write ``text`` between ``<!-- name -->`` and ``<!-- /name -->``; raises ``ValueError`` where these are not."""
    before, begin, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise ValueError(f"{path} has no place for {name}: write <!-- {name} --> and <!-- /{name} --> where it belongs")
    path.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers to the right."""
    lines = [heads, ["---" if index == 0 else "---:" for index in range(len(heads))], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
