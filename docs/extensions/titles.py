"""Says in the browser's tab, and in what the search finds, which of several pages of one name it is."""

from docutils import nodes
from sphinx.transforms import SphinxTransform

FOLDERS = {"reference": "reference", "measurements": "measured"}


class Titles(SphinxTransform):
    default_priority = 500

    def apply(self, **kwargs):
        folder, _, name = self.env.docname.partition("/")
        if folder in FOLDERS and name not in ("", "index"):
            title = next(self.document.findall(nodes.title))
            self.document["title"] = f"{title.astext()} ({FOLDERS[folder]})"


def setup(app):
    app.add_transform(Titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
