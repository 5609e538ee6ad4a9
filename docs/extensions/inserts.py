"""Text that code writes.

A page says `<!-- insert: costs.low_bit -->`, or `<!-- insert: coming_from.table(torch) -->` with an argument, where the
Markdown belongs that this function of a module in docs returns.
"""

import importlib
import re

INSERT = re.compile(r"^<!-- insert: (\w+)\.(\w+)(?:\((\w+)\))? -->$", re.M)


def insert(place: re.Match) -> str:
    """What stands at a place."""
    module, function, argument = place.groups()
    return getattr(importlib.import_module(module), function)(*([argument] if argument else []))


def on_read(app, docname, source):
    """Puts the text of all places of a page in."""
    source[0] = INSERT.sub(insert, source[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
