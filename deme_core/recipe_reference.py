"""The reference of all recipe keys, made of what `deme_core.recipe` says of them: the page docs/recipe.md.

``python -m deme_core.recipe_reference`` writes the page; ``make docs`` calls it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from deme_core.recipe import Recipe

RECIPE_PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"

# A kind of section, and its dotted name where it first appears; the recipe itself has none.
Sections = Mapping[type[BaseModel], str]

_OPENING = """\
# Recipe keys

Every key of a recipe. `make docs` makes this page of the descriptions in `deme_core/recipe/`: change those, not this.

A recipe is a YAML file of the sections below; `--set finetune.num_steps=50` overrides one key. **required** means that
there is no default, `null` that the key is not set. `deme recipes show NAME` prints a recipe with all its keys, and the
files in [recipes/](../recipes/) say why they set what they set. Symbols are those of [merging.md](merging.md#symbols).
"""
_END_OF_DOCUMENT = "\n..."
_TABLE_HEAD = ["| key | value | default | what it is |", "|---|---|---|---|"]
_KINDS = {
    str: ("text", "texts"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("`true` or `false`", "`true` or `false`"),
}
_BOUNDS = {
    "ge": "at least {:g}",
    "gt": "more than {:g}",
    "le": "at most {:g}",
    "lt": "less than {:g}",
    "min_length": "at least {:g} of them",
}


def recipe_sections() -> Sections:
    """Returns every kind of section of a recipe, in the order of a recipe file."""
    sections: dict[type[BaseModel], str] = {}
    for path, model in _walk("", Recipe):
        sections.setdefault(model, path)
    return sections


def recipe_reference() -> str:
    """Returns the page, as Markdown."""
    sections = recipe_sections()
    return "\n".join([_OPENING, *(_section(model, sections) for model in sections)])


def _walk(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if child := _section_of(field):
            yield from _walk(f"{path}.{name}".lstrip("."), child)


def _section(model: type[BaseModel], sections: Sections) -> str:
    base = next((each for each in sections if each in model.__bases__), None)
    rows = [
        f"| `{name}` | {_value(field, sections)} | {_default(field)} | {_description(field)} |"
        for name, field in model.model_fields.items()
        if base is None or name not in base.model_fields
    ]
    lines = [*_TABLE_HEAD, *rows, ""] if rows else []
    if sections[model]:
        more = f" It takes the keys of {_link(sections[base])}{', and these:' if rows else '.'}" if base else ""
        lines = [f"## `{sections[model]}`", "", f"{_about(model)}{more}", "", *lines]
    return "\n".join(lines)


def _link(path: str) -> str:
    return f"[`{path}`](#{path.replace('.', '')})"


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    kind = _kind(field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _kind(annotation: Any) -> Any:
    """Returns the type that a key has if it is set."""
    members = get_args(annotation)
    return next(each for each in members if each is not NoneType) if NoneType in members else annotation


def _value(field: FieldInfo, sections: Sections) -> str:
    if section := _section_of(field):
        return f"keys of {_link(sections[section])}"
    kind = _named(_kind(field.annotation))
    bounds = {bound: value for bound in _BOUNDS for value in _constraints(field, bound)}
    if {"ge", "le"} <= bounds.keys():
        return f"{kind} from {bounds['ge']:g} to {bounds['le']:g}"
    return ", ".join([kind, *(_BOUNDS[bound].format(value) for bound, value in bounds.items())])


def _constraints(field: FieldInfo, bound: str) -> Iterator[float]:
    return (getattr(constraint, bound) for constraint in field.metadata if hasattr(constraint, bound))


def _named(kind: Any, *, several: bool = False) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        *others, last = (f"`{choice}`" for choice in arguments)
        return f"{', '.join(others)} or {last}"
    if origin is tuple:
        number = "" if Ellipsis in arguments else f"{len(arguments)} "
        return f"list of {number}{_named(arguments[0], several=True)}"
    return "mapping" if origin is dict else _KINDS[kind][several]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "those of its keys"
    text = yaml.safe_dump(to_jsonable_python(default), default_flow_style=True, width=float("inf"))
    return f"`{text.partition(_END_OF_DOCUMENT)[0].strip()}`"


def _description(field: FieldInfo) -> str:
    section = _section_of(field)
    return (field.description or (_about(section) if section else "")).replace("|", r"\|")


def _about(model: type[BaseModel]) -> str:
    """Returns the first paragraph of a docstring, without its references to what is not in the repository."""
    paragraph = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
    return re.sub(r" \(METHOD [^)]*\)", "", paragraph)


if __name__ == "__main__":
    RECIPE_PAGE.write_text(recipe_reference(), encoding="utf-8")
