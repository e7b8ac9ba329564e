"""A dry run of memory as tables, and as a picture of where a layer's buffers lie over time."""

from typing import TYPE_CHECKING

from seqpar.estimates.memory import DryRun, large_transients
from seqpar.offload.placement.place_plot import picture
from seqpar.offload.planning import swap_report

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_GIB = 2**30
_BAR = 40


def render(found: DryRun) -> "RenderableType":
    """What rich prints: what fills a device, then every strategy, then the fractions of the chosen one."""
    from rich.console import Group

    chosen = "" if found.chosen is None else found.chosen.strategy
    return Group(_header(found), _categories(found), swap_report.render(found.compared, chosen))


def _header(found: DryRun) -> "RenderableType":
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    layer, layers = found.skeletal_bytes / _GIB, found.decoder.layers
    grid.add_row("saved", f"{layer:,.4g} GiB a layer, {layer * layers:,.5g} GiB in all, over {found.devices} devices")
    if found.chosen is not None:
        plan = found.chosen
        device, memory = plan.device_peak_bytes / _GIB, found.gpu.memory_bytes / _GIB
        grid.add_row("device", f"{device:,.1f} of {memory:,.1f} GiB")
        grid.add_row("host", f"{plan.host_peak_bytes / _GIB:,.1f} GiB for each device")
        grid.add_row("step", f"{plan.step_seconds:,.4g} s, of which {plan.exposed_seconds:,.4g} s wait for copies and "
                             f"{plan.recompute_seconds:,.4g} s compute again; MFU {found.mfu:.1%}")  # fmt: skip
    grid.add_row("limited by", Text(found.limit))
    found_by = f"{found.addresses.stage}, {found.addresses.status}"
    grid.add_row("addresses", f"transients of a layer in {found.addresses.peak / _GIB:,.2f} GiB, "
                              f"{found.addresses.gap:.1%} above what is alive at once ({found_by})")  # fmt: skip
    what = f"{found.decoder.name}, {found.tokens:,} tokens over {found.devices} {found.gpu.name}"
    return Panel(grid, title=Text(what), title_align="left", expand=False)


def _categories(found: DryRun) -> "Table":
    from rich import box
    from rich.table import Table

    total = sum(found.categories.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("one device at its peak")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    for name, bytes_ in found.categories.items():
        share = bytes_ / total
        table.add_row(name, f"{bytes_ / _GIB:,.2f}", f"{share:.1%}", "█" * round(_BAR * share))
    return table


def draw(found: DryRun, format_: str) -> bytes:
    """A picture of the transients of one layer at their addresses, over the events of its forward and backward pass."""
    buffers = [each.buffer for each in large_transients(found.layer)]
    what = f"a layer of {found.decoder.name}, {found.tokens:,} tokens over {found.devices} devices: "
    return picture(buffers, found.addresses, format_, what=what)
