"""The house as it stands: files, what they import, and the rooms they are in; and its picture, docs/house.svg.

``python -m tests.house`` draws the picture; a test says when it is out of date.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "house.svg"
PACKAGES = ("seqpar", "collectives", "planner", "offload")
ABOVE = ("examples", "bench", "launch", "tests")
BELOW = ("planner", "collectives", "offload")
ROWS = (
    ("commands",),
    ("estimates", "verification"),
    ("hf",),
    ("models",),
    ("layers",),
    ("training",),
    ("crossing",),
    ("sharding",),
    ("ops",),
    BELOW,
)


@dataclass(frozen=True)
class Source:
    """A Python file of the repository; ``path`` is relative to its root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self):
        return ast.parse(self.text, self.path)

    @property
    def package(self):
        return self.path.split("/")[0]

    @property
    def module(self):
        """The dotted name that it is imported by."""
        parts = self.path.removesuffix(".py").removesuffix("/__init__").split("/")
        return ".".join(["seqpar", *parts] if parts[0] in BELOW else parts)

    @property
    def room(self):
        """The room of the design that it is in; None for the faces and everything above the house."""
        parts = self.path.split("/")
        if parts[0] in BELOW:
            return parts[0]
        return parts[1] if parts[0] == "seqpar" and len(parts) > 2 else None

    @property
    def num_lines(self):
        return len(self.text.splitlines())

    def nodes(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def at(self, node, why):
        return f"{self.path}:{node.lineno}: {why}"

    def imports(self):
        """Every module that is imported, as ``(node, dotted name)``; of ``from a import b`` both ``a`` and ``a.b``."""
        for node in self.nodes(ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        for node in self.nodes(ast.ImportFrom):
            base = self.base(node)
            yield node, base
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)
        for node in self.nodes(ast.Call):
            called = dotted(node.func).split(".")[-1]
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node, str(node.args[0].value)

    def base(self, node):
        """``a.b`` of ``from a.b import c``, also where it is written with dots."""
        if not node.level:
            return node.module or ""
        return ".".join([*self.module.split(".")[: -node.level], *filter(None, [node.module])])

    def arrows(self, modules: Mapping[str, "Source"]) -> Iterator[tuple[ast.AST, "Source"]]:
        """Every import of one of ``modules``: of ``from a import b`` the file ``a.b`` if there is one, else ``a``."""
        for node in self.nodes(ast.Import):
            yield from ((node, modules[alias.name]) for alias in node.names if alias.name in modules)
        for node in self.nodes(ast.ImportFrom):
            base = self.base(node)
            for alias in node.names:
                found = modules.get(f"{base}.{alias.name}") or modules.get(base)
                if found is not None:
                    yield node, found


def dotted(node):
    """``a.b.c`` of a chain of attributes; empty for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def read(*folders: str) -> list[Source]:
    """The sources below these folders of the repository."""
    return [Source(path, file.read_text(encoding="utf-8")) for folder in folders for path, file in files_of(folder)]


def files_of(folder: str) -> Iterator[tuple[str, Path]]:
    """With their paths in a clone, where seqpar has links to what stands below it; a source distribution has folders
    there, and nothing beside them."""
    place = ROOT / folder if (ROOT / folder).exists() else ROOT / "seqpar" / folder
    for file in sorted(place.rglob("*.py")):
        parts = file.relative_to(place).parts
        if folder != "seqpar" or parts[0] not in BELOW:
            yield "/".join((folder, *parts)), file


def graph(sources: Iterable[Source]) -> dict[Source, dict[Source, ast.AST]]:
    """Of every file the files that it imports, and where."""
    modules = {source.module: source for source in sources}
    return {
        source: {found: node for node, found in source.arrows(modules) if found is not source}
        for source in modules.values()
    }


def circles(arrows: Mapping[Source, Mapping[Source, object]]) -> list[list[Source]]:
    """Files that import each other, each circle once, by Tarjan's algorithm (without recursion)."""
    order: dict[Source, int] = {}
    low: dict[Source, int] = {}
    stack: list[Source] = []
    found: list[list[Source]] = []
    for root in arrows:
        work = [(root, iter(arrows[root]))] if root not in order else []
        if work:
            order[root] = low[root] = len(order)
            stack.append(root)
        while work:
            node, following = work[-1]
            step = next(following, None)
            if step is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    place = stack.index(node)
                    if len(stack) - place > 1:
                        found.append(stack[place:])
                    del stack[place:]
            elif step not in order:
                order[step] = low[step] = len(order)
                stack.append(step)
                work.append((step, iter(arrows[step])))
            elif step in stack:
                low[node] = min(low[node], order[step])
    return found


def between_rooms(sources: Iterable[Source]) -> dict[tuple[str, str], int]:
    """How many imports there are from one room to another."""
    counts: dict[tuple[str, str], int] = {}
    for source, seen in graph(sources).items():
        for target in seen:
            if source.room and target.room and source.room != target.room:
                counts[source.room, target.room] = counts.get((source.room, target.room), 0) + 1
    return counts


# The picture.

WIDTH, BOX, GAP, HIGH = 760, 190, 40, 46
SAYS = {
    "commands": "the seqpar command",
    "estimates": "what would it cost",
    "verification": "is it the same",
    "hf": "models of transformers",
    "models": "decoders of any pattern",
    "layers": "token mixers in families",
    "training": "decorator, loss, gradients, plans",
    "crossing": "what crosses the cuts",
    "sharding": "which tokens are mine",
    "ops": "what one device computes",
    "planner": "who shares which document",
    "collectives": "ranks, rings, scans",
    "offload": "which activations stay",
}


def picture(counts: Mapping[tuple[str, str], int]) -> str:
    """SVG: a row for each row of the design; an arrow for each import that no other way down implies already."""
    rooms = {room for pair in counts for room in pair}
    rows = [tuple(room for room in row if room in rooms) for row in ROWS]
    rows = [row for row in rows if row]
    place = {}
    for y, row in enumerate(rows):
        left = (WIDTH - len(row) * BOX - (len(row) - 1) * GAP) / 2
        place.update({room: (left + x * (BOX + GAP), 20 + y * (HIGH + 34)) for x, room in enumerate(row)})
    height = 20 + len(rows) * (HIGH + 34) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *(arrow(place[upper], place[lower], set(place.values())) for upper, lower in reduced(counts)),
        *(box(room, *place[room]) for room in place),
        f'<text x="12" y="{height - 10}" font-size="11" fill="#667">{sum(counts.values())} imports between rooms, '
        "all of them down; arrows that another way down implies are left out</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def reduced(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The arrows without which some room would no longer reach another."""
    below: dict[str, set[str]] = {}
    for upper, lower in counts:
        below.setdefault(upper, set()).add(lower)

    def reaches(start: str, goal: str, without: str) -> bool:
        ways = [room for room in below.get(start, ()) if (start, room) != (start, without)]
        seen = set(ways)
        while ways:
            room = ways.pop()
            if room == goal:
                return True
            ways += below.get(room, set()) - seen
            seen |= below.get(room, set())
        return False

    return sorted(pair for pair in counts if not reaches(*pair, without=pair[1]))


def box(room: str, x: float, y: float) -> str:
    fill = "#e8eef7" if room not in BELOW else "#f3ecdf"
    middle = x + BOX / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HIGH}" rx="6" fill="{fill}" stroke="#445"/>'
        f'<text x="{middle:g}" y="{y + 20:g}" font-size="14" text-anchor="middle" font-weight="bold">{room}</text>'
        f'<text x="{middle:g}" y="{y + 36:g}" font-size="11" text-anchor="middle" fill="#445">{SAYS[room]}</text>'
    )


def arrow(upper: tuple[float, float], lower: tuple[float, float], boxes: set[tuple[float, float]]) -> str:
    """Down from box to box; past boxes between, along their side."""
    free = not any(left == upper[0] == lower[0] and upper[1] < top < lower[1] for left, top in boxes)
    x, y, to_x, to_y = upper[0] + BOX / 2, upper[1] + HIGH, lower[0] + BOX / 2, lower[1] - 2
    if to_y - y < 60 or (free and x == to_x):
        bend = (to_y - y) / 2
        path = f"M{x:g} {y:g} C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"
    elif x == to_x:
        side, out = x + BOX / 2, 20 + (to_y - y) / 12
        start, end = y - HIGH / 2, to_y + HIGH / 2
        path = f"M{side:g} {start:g} C{side + out:g} {start:g} {side + out:g} {end:g} {side + 2:g} {end:g}"
    elif lower[0] == (WIDTH - BOX) / 2:
        side = to_x + (BOX / 2 + 2) * (1 if x > to_x else -1)
        path = f"M{x:g} {y:g} V{to_y + HIGH / 2:g} H{side:g}"
    else:
        side = x + BOX / 2 * (1 if to_x > x else -1)
        path = f"M{side:g} {y - HIGH / 2:g} H{to_x:g} V{to_y:g}"
    return f'<path d="{path}" fill="none" stroke="#667" stroke-width="1.3" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture(between_rooms(read(*PACKAGES))), encoding="utf-8")
    print(f"drawn: {PICTURE.relative_to(ROOT)}", file=sys.stderr)
