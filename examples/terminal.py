"""The terminal that the examples print their tables to."""

from rich.console import Console


def terminal(width: int = 110) -> Console:
    """A console, `width` wide where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
