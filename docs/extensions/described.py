"""A picture that a notebook draws is described by the paragraph that follows its cell."""

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform


class Described(SphinxPostTransform):
    default_priority = 10  # after myst-nb has chosen among the forms of an output

    def run(self, **kwargs):
        paragraph = ""
        for node in reversed(list(self.document.findall(lambda n: isinstance(n, nodes.paragraph | nodes.image)))):
            if isinstance(node, nodes.paragraph):
                paragraph = node.astext()
            elif not node.get("alt"):
                node["alt"] = paragraph or "A picture drawn by the code above"


def setup(app):
    app.add_post_transform(Described)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
