"""The console for the examples' tables."""

from rich.console import Console


def terminal(width: int = 110) -> Console:
    """Returns a console, `width` wide if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
