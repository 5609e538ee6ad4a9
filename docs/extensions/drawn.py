"""```{picture} NAME``` is a figure that the function NAME of pictures.py draws; the text under it is the caption."""

import os
from pathlib import Path

from docutils.parsers.rst.directives.images import Figure
from sphinx.util.docutils import SphinxDirective

SOURCE = Path(__file__).parents[1] / "pictures.py"


def draw(name: str, path: Path) -> None:
    """Draws a picture, unless it is newer than the code of all pictures."""
    if path.exists() and path.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pictures

    getattr(pictures, name)()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, metadata={"Date": None})
    plt.close("all")


class Picture(Figure, SphinxDirective):
    def run(self):
        name = self.arguments[0]
        draw(name, SOURCE.parent / "_build" / "pictures" / f"{name}.svg")
        self.arguments[0] = f"/_build/pictures/{name}.svg"
        self.env.note_dependency(os.fspath(SOURCE))
        return super().run()


def setup(app):
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
