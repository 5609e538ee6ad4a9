"""Code that is a public name links to the reference: `jw.SpectralNorm(target=4)`, and in docstrings `share`."""

import functools
import inspect
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.ext.intersphinx import missing_reference
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import jaxweights as jw

CODE = re.compile(r"([\w.]+)(?:\(.*\))?")
SHORT = {"nn.": "flax.linen.", "nnx.": "flax.nnx.", "jnp.": "jax.numpy."}


@functools.cache
def places() -> dict[str, str]:
    """{name as people write it: the name under which the reference has it}: submodules go before the package."""
    parts = [("jaxweights", jw), *((f"jaxweights.{n}", m) for n in jw.__all__ if inspect.ismodule(m := getattr(jw, n)))]
    found, homes = {}, {}
    for home, part in reversed(parts):
        for name in part.__all__:
            value = getattr(part, name)
            if inspect.ismodule(value):
                found[f"{home}.{name}"] = f"{home}.{name}"
            else:
                key = id(value) if callable(value) else f"{home}.{name}"
                found[f"{home}.{name}"] = homes.setdefault(key, f"{home}.{name}")
    return found


@functools.cache
def unmistakable() -> dict[str, str]:
    """The names without their module that are not the names of arguments, too: docstrings write them so."""
    arguments = set()
    for place in set(places().values()):
        value = functools.reduce(getattr, place.split(".")[1:], jw)
        if inspect.isfunction(value) or inspect.isclass(value):
            try:
                arguments |= set(inspect.signature(value).parameters)
            except (TypeError, ValueError):
                continue
    short = {}
    for name, place in places().items():
        for form in (name.removeprefix("jaxweights."), name.rpartition(".")[2]):
            if form not in arguments and "." in place.removeprefix("jaxweights") and not _is_module(place):
                short.setdefault(form, place)
    return short


def _is_module(place: str) -> bool:
    return inspect.ismodule(functools.reduce(getattr, place.split(".")[1:], jw))


class LinkNames(SphinxPostTransform):
    """Wraps a literal that is a public name in a link to where the reference has it."""

    default_priority = 20

    def run(self, **kwargs):
        objects = self.env.domains.python_domain.objects
        in_reference = self.env.docname.startswith("reference/")
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference | nodes.title):
                continue
            if not (match := CODE.fullmatch(literal.astext())):
                continue
            name = match[1]
            place = places().get(re.sub(r"^jw\.", "jaxweights.", name))
            if place is None and in_reference:
                place = unmistakable().get(name)
            if place in objects:
                target = objects[place]
                link = make_refnode(
                    self.app.builder, self.env.docname, target.docname, target.node_id, literal.deepcopy(), place
                )
            else:
                link = self.elsewhere(name, literal)
            if link is not None:
                literal.replace_self(link)

    def elsewhere(self, name, literal):
        """A link into the documentation of another package, or None."""
        for short, full in SHORT.items():
            if name.startswith(short):
                name = full + name.removeprefix(short)
        if not name.startswith(("jax.", "flax.", "optax.")):
            return None
        for role in ("func", "class"):
            wanted = pending_xref("", refdomain="py", reftype=role, reftarget=name, refdoc=self.env.docname)
            if link := missing_reference(self.app, self.env, wanted, literal.deepcopy()):
                return link
        return None


def check(app, env):
    """Warns of public names that the reference does not have."""
    for name, place in places().items():
        if place not in env.domains.python_domain.objects:
            logging.getLogger(__name__).warning(f"{name} is public, and the reference has no {place}")


def setup(app):
    app.add_post_transform(LinkNames)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
