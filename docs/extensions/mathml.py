"""Formulas as MathML, which browsers typeset by themselves: no script, no fonts and no network."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def formula(node: nodes.Element, block: bool) -> str:
    # docutils sets letters of \mathcal and the like in the plane that browsers expect, and d for display.
    return tex2mathml(node.astext(), as_block=block)


def inline(writer, node):
    writer.body.append(formula(node, block=False))
    raise nodes.SkipNode


def block(writer, node):
    writer.body.append(f'<div class="formula">{formula(node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
