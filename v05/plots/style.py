"""What all pictures share: their colours, and axes without a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = ("#0b6e99", "#d9730d", "#6f42a8", "#448361", "#c14c8a", "#9b6b43", "#5f6b7a", "#cb912f")
INK: Final = "#24292f"
GRID: Final = "#e6e8eb"


def colour(number: int) -> str:
    """Return the colour of what comes at this place; they begin again after the last."""
    return COLOURS[number % len(COLOURS)]


def open_up(*panels: Axes) -> None:
    """Take the frame away at the top and on the right."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
