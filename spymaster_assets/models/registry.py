"""Model families by name."""

from __future__ import annotations

from importlib import import_module

from spymaster_assets.errors import ModelError
from spymaster_assets.models.base import Model

MODULES = ("spymaster_assets.models.patchtst", "spymaster_assets.models.trees")
"""Where families register themselves; imported when one is asked for, since torch takes seconds."""
_FAMILIES: dict[str, type[Model]] = {}


def register(family: type[Model]) -> type[Model]:
    """Class decorator: make a family known under its name and aliases; raise ModelError when one is taken."""
    for name in (family.name, *family.aliases):
        known = _FAMILIES.get(name)
        if known is not None and known is not family:
            raise ModelError(
                f"the model name {name!r} is taken by {known.__name__}",
                where=family.__name__,
                remedy="choose another name",
            )
    for name in (family.name, *family.aliases):
        _FAMILIES[name] = family
    return family


def get(name: str) -> type[Model]:
    """Family of a name or alias; raise ModelError naming the known ones."""
    _import_all()
    try:
        return _FAMILIES[name]
    except KeyError:
        raise ModelError(f"no model family {name!r}", expected=", ".join(names())) from None


def names() -> list[str]:
    """Names of all families, without aliases, sorted."""
    _import_all()
    return sorted({f.name for f in _FAMILIES.values()})


def _import_all() -> None:
    for module in MODULES:
        import_module(module)
