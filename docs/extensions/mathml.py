"""Formulas as MathML, which browsers typeset by themselves: no script, no fonts and no network."""

import re
from html import escape

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


def formula(node: nodes.Element, block: bool) -> str:
    # docutils sets letters of \mathcal and the like in the plane that browsers expect, and d for display.
    try:
        text = tex2mathml(node.astext(), as_block=block)
    except MathError as e:
        logging.getLogger(__name__).warning(f"a formula cannot be typeset: {e}", location=node)
        return f"<code>{escape(node.astext())}</code>"
    # Browsers stretch the bars of a norm to the highest letter, and the last one, with its index, not at all.
    text = re.sub(r"<mo[^>]*>‖", '<mo stretchy="false">‖', text)
    # In most fonts ⊤ is as high as the letter that it raises.
    return text.replace("<mi>⊤</mi>", '<mi mathvariant="normal">T</mi>')


def inline(writer, node):
    writer.body.append(formula(node, block=False))
    raise nodes.SkipNode


def block(writer, node):
    writer.body.append(f'<div class="formula">{formula(node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
