"""Recipe files: found by name or path, overridden from the command line, checked, and written out resolved."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from deme_core.errors import ArtifactNotFoundError, InputError, RecipeError, StoreUnavailableError
from deme_core.local_files import user_path
from deme_core.recipe import Recipe
from deme_core.store import folder_and_key, open_store

RECIPES_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with DeMe."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """Returns the file of a recipe.

    Raises:
        RecipeError: there is no such recipe.
    """
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        path = user_path(name_or_path)
        if path.is_file():
            return path
        raise RecipeError(f"There is no recipe file {name_or_path}.")
    if name_or_path in recipe_names():
        return RECIPES_FOLDER / f"{name_or_path}.yaml"
    raise RecipeError(
        f"There is no recipe '{name_or_path}'; there are {', '.join(recipe_names())}, or give a .yaml file."
    )


def read_recipe(name_or_path: str) -> bytes:
    """Returns the text of a recipe: a name, a path, or an object-store URI.

    Raises:
        RecipeError: there is no such recipe.
        StoreUnavailableError: the object store of the URI does not answer.
    """
    if "://" not in name_or_path:
        try:
            return find_recipe(name_or_path).read_bytes()
        except OSError as error:
            raise RecipeError(f"The recipe {name_or_path} cannot be read ({error.strerror}).") from error
    folder, key = folder_and_key(name_or_path)
    try:
        store = open_store(folder)
    except StoreUnavailableError:
        raise
    except InputError as error:
        # Not repeated: it may hold a password.
        raise RecipeError("There is no recipe at such an address; give s3://BUCKET/KEY or file:///PATH.") from error
    try:
        return store.get_bytes(key)
    except StoreUnavailableError:
        raise
    except (ArtifactNotFoundError, ValueError) as error:
        raise RecipeError(f"There is no recipe {name_or_path}.") from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        name_or_path: a name from `recipe_names`, or path or object-store URI of a YAML file.
        overrides: settings such as ``finetune.num_steps=50``; values are YAML.

    Raises:
        RecipeError: the recipe or an override is unknown or invalid; one sentence per problem.
    """
    content = _parse_yaml(read_recipe(name_or_path), name_or_path)
    if not isinstance(content, dict):
        raise RecipeError(f"{name_or_path} does not hold a mapping of recipe keys.")
    for override in overrides:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(
            f"{name_or_path.rpartition('/')[2]}: {'; '.join(_sentence(details) for details in error.errors())}."
        ) from error


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, every default filled in but for those that digests leave out."""
    return _yaml(recipe.model_dump(mode="json"))


def spell_out_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML with every key there is, those that `dump_recipe` leaves out too."""
    return _yaml(_every_key(recipe))


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every setting of a dumped recipe under its dotted name, e.g. ``finetune.num_steps``."""
    return dict(_leaves("", content))


def differing_settings(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns what differs among dumped recipes: by dotted name the value in each, None where it is not set."""
    flat = [flatten(recipe) for recipe in recipes]
    names = dict.fromkeys(name for settings in flat for name in settings)
    values = {name: [settings.get(name) for settings in flat] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _every_key(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _every_key(getattr(value, name)) for name in type(value).model_fields}
    return to_jsonable_python(value)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, child)
    else:
        yield prefix, value


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but that 1e-4 is a number, as everybody thinks, and not a string; and that no key comes twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a mapping that says two things of one key, of which PyYAML would take the last in silence."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"found the key {key.value!r} a second time"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # A date or number that cannot be is a ValueError.
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    except (LookupError, AttributeError) as error:  # What PyYAML trips over, as in !!bool maybe.
        raise RecipeError(f"{where} is not valid YAML: a value is not what its !!tag says.") from error
    except RecursionError as error:
        raise RecipeError(f"{where} is not valid YAML: it is nested too deeply.") from error


def _apply(content: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"The override {override!r} is not of the form key.subkey=value.")
    *parents, last = dotted.split(".")
    for parent in parents:
        child = content.get(parent)
        if child is not None and not isinstance(child, dict):
            raise RecipeError(f"The override {override!r} goes below {_printable(parent)}, which is a plain value.")
        if child is None:  # Absent, or an explicit null.
            child = content[parent] = {}
        content = child
    content[last] = _parse_yaml(value, f"The value of --set {_printable(dotted)}")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _sentence(details: ErrorDetails) -> str:
    location = [_printable(str(part)) for part in details["loc"]]
    key = ".".join(location) or "the recipe"
    if details["type"] == "extra_forbidden":
        return f"{key} is no recipe key ({what_was_meant(location[-1], _known_keys(location[:-1]))})"
    if details["type"] == "missing":
        return f"{key} is missing"
    if details["type"] in ("recursion_loop", "recursion_depth_exceeded"):
        return f"{'.'.join(location[:2])} is nested too deeply, or holds itself"
    message = details["msg"].removeprefix("Value error, ")
    sentence = f"{key}: {message[0].lower()}{message[1:]}"
    if not location:
        return message
    # A whole section would bury what is said of it, and an address may hold a password.
    is_shown = not isinstance(details["input"], dict | list) and "://" not in str(details["input"])
    return f"{sentence} (got {details['input']!r})" if is_shown else sentence


def what_was_meant(name: str, known: Sequence[str]) -> str:
    """Returns the known name that an unknown one looks like, or all of them, as a hint in a message."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known there are {', '.join(known)}"


def _known_keys(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return sorted(model.model_fields)
