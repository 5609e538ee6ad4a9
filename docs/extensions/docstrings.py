"""Docstrings, which are Google sections around Markdown, as the reStructuredText that Sphinx reads.

- `name` is code, and a link where it is public (links.py).
- A paragraph that begins with an equation shows it as a formula, on a line of its own.
- "References: ..." is a list, and arXiv:1802.05957 a link.
- A Markdown table is a table.
"""

import inspect
import re

from flax import nnx

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
DOCTEST = re.compile(r"\s*>>> ")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|Yields):$")
EQUATION = re.compile(r"(?:With |Let |argmin |minimize )?[^`.;]{0,60}?\S (?:=|←|≈|<=) \S")
WORDS = re.compile(r"[A-Za-z]{3,}(?![\w(\[])")


def escape(text: str) -> str:
    """Plain text in reStructuredText, with code as literals and arXiv numbers as links."""
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`"
            # A literal must end where a word ends.
            if i + 1 < len(parts) and re.match(r"[^\s.,:;!?)\]}'\"/-]", parts[i + 1] or " "):
                parts[i] += "\\ "
        else:
            part = re.sub(r"([\\*|])", r"\\\1", part)
            part = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", part)
            parts[i] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", part)
    return "".join(parts)


def set_formula(text: str) -> str:
    """An equation in reStructuredText: w_ij and 2^b with lower and raised letters, primes, and code as it is."""
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"(\w|\))'", r"\1′", part).replace("<=", "≤").replace(">=", "≥")
            pieces = re.split(r"(_(?:\w+|\([^)]*\))|\^(?:\w+|\([^)]*\)))", part)
            parts[i] = "".join(
                escape(piece)
                if j % 2 == 0
                else rf"\ :{'sub' if piece[0] == '_' else 'sup'}:`{piece[1:].strip('()')}`\ "
                for j, piece in enumerate(pieces)
            )
        else:
            parts[i] = f"`{part}`"
    return "".join(parts)


def first_sentence(text: str) -> tuple[str, str]:
    """Splits a text behind its first sentence."""
    match = re.search(r"(?<=[^.][.:]) (?=[A-Z`μσ])", text)
    return (text[: match.start()], text[match.end() :]) if match else (text, "")


def is_equation(sentence: str) -> bool:
    """Whether a sentence begins with an equation: at most a word, names or a call before its sign."""
    if not (head := EQUATION.match(sentence)):
        return False
    before = re.split(r" (?:=|←|≈|<=) ", head[0])[0].removeprefix("With ").removeprefix("Let ")
    words = WORDS.findall(before)
    short = len(words) <= 1 or words == before.split(", ") or re.match(r"\w+\(", before)
    return bool(short) and not before.startswith(("A ", "where "))


def paragraph(lines: list[str]) -> list[str]:
    indent = re.match(r"\s*", lines[0])[0]
    text = " ".join(line.strip() for line in lines)
    if text.startswith("References: "):
        entries = [escape(entry.strip().rstrip(".")) for entry in text.removeprefix("References: ").split(";")]
        return [f"{indent}.. rubric:: References", "", *(f"{indent}- {entry}" for entry in entries)]
    if len(lines) > 1 and lines[1].strip().startswith("| ---"):
        return table(lines)
    sentence, rest = first_sentence(text)
    if not indent and is_equation(sentence):
        shown = [".. container:: equation", "", f"   {set_formula(sentence)}"]
        return [*shown, "", escape(rest)] if rest else shown
    return [indent + escape(text)]


def table(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    rows = [row for row in rows if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
    shown = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        shown += [f"   {'* -' if i == 0 else '  -'} {escape(cell)}" for i, cell in enumerate(row)]
    return shown


ENTRY = re.compile(r"(\s+\*{0,2}[\w.]+(?:, [\w.]+)*: |\s*- )")


def convert(lines: list[str]) -> list[str]:
    """The lines of a docstring with all that is not code converted."""
    new: list[str] = []
    block: list[str] = []  # of lines that belong together: a paragraph, an item of a list, an entry of a section
    in_code = False

    def flush():
        if not block:
            return
        if entry := ENTRY.match(block[0]):
            text = " ".join([block[0][entry.end() :], *(line.strip() for line in block[1:])])
            new.append(entry[0] + escape(text))
        else:
            new.extend(paragraph(block))
        block.clear()

    last = ""  # the last line that is not indented
    for i, line in enumerate(lines):
        last = line if re.match(r"\S", line) else last
        if in_code:
            in_code = bool(line.strip())
            new.append(line)
            continue
        if line.startswith("    ") and not SECTION.match(last):  # a block of code
            if not lines[i - 1].strip():
                new.extend([f".. code-block:: {'python' if line.isascii() else 'text'}", ""])
            new.append(line)
            continue
        starts_code = DOCTEST.match(line)
        if starts_code or not line.strip() or SECTION.match(line) or ENTRY.match(line):
            flush()
        if starts_code:
            new.extend([""] if new and new[-1].strip() else [])
            in_code = True
        if ENTRY.match(line) or not (starts_code or not line.strip() or SECTION.match(line)):
            block.append(line)
        else:
            new.append(line)
    flush()
    return new


def process(app, what, name, obj, options, lines):
    lines[:] = convert(lines)


def skip(app, what, name, obj, skipped, options):
    """Leaves out what a class has from elsewhere: defaults of fields, and the entries of named tuples."""
    home = getattr(obj, "__module__", None) or "jaxweights"
    return True if home.partition(".")[0] != "jaxweights" and what == "class" else None


def signature(app, what, name, obj, options, arguments, returns):
    """The arguments of a Flax module as its author wrote them."""
    if not (arguments and inspect.isclass(obj)):
        return None
    if issubclass(obj, nnx.Module):
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        arguments = str(inspect.Signature(plain))
    arguments = re.sub(r"(?:, )?parent=<.*?>, name=None", "", arguments)
    arguments = re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"jnp.\1", arguments)
    return re.sub(r"<function (\w+)[^>]*>", r"\1", arguments), returns


def setup(app):
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", process, priority=400)  # napoleon comes at 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
