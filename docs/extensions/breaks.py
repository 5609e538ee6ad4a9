"""Code in a line of text breaks where a part of it ends: phones and tables are narrow."""

import re
from html import escape

from docutils import nodes

BREAK = re.compile(r"(?<=\w{4})(?=\.[A-Za-z])|(?<=[A-Za-z0-9][=/_(])(?=[A-Za-z0-9])|(?<=,)(?=\S)")


def literal(writer, node):
    if node.get("language") or "kbd" in node["classes"]:
        return type(writer).visit_literal(writer, node)
    text = "<wbr>".join(escape(part, quote=False) for part in BREAK.split(node.astext()))
    writer.body.append(writer.starttag(node, "code", "", CLASS="docutils literal notranslate") + text + "</code>")
    raise nodes.SkipNode


def depart(writer, node):
    type(writer).depart_literal(writer, node)


def setup(app):
    app.add_node(nodes.literal, override=True, html=(literal, depart))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
