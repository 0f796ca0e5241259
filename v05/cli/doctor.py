"""`v05 doctor`: versions, devices, and which backend runs each op and why the others do not."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from v05 import doctor as report
from v05.kernels import wins


def doctor() -> None:
    """Show versions, devices, and which backend runs each op and why the others do not."""
    console = Console()
    for title, rows in (("Versions", report.versions()), ("Devices", report.devices())):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows.items():
            table.add_row(*row)
        console.print(table)
    table = Table(title="Backends", title_justify="left")
    for name in ("op", "tensors", "runs"):
        table.add_column(name, no_wrap=True)
    table.add_column("does not run, because")
    backends = report.backends()
    for line in backends:
        reasons = [f"{name}: {reason}" for name, reason in line.reasons.items() if reason is not None]
        table.add_row(line.op, line.device, line.chosen, "\n".join(reasons))
    console.print(table)
    if "cuda" not in {line.device for line in backends}:
        console.print("No GPU is visible to torch: the cuda and triton backends need one.")
    measured = len(wins.recorded())
    what = "1 measurement decides" if measured == 1 else f"{measured} measurements decide"
    console.print(f"GPU backends: {what}; elsewhere cuda comes first, then triton.")
