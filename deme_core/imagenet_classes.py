"""The classes of ImageNet-1k, by WordNet id and by name, in their usual order: that of the sorted ids."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

_ID = re.compile(r"n\d{8}")
_BIRD, _MACHINE = 134, 517


def are_imagenet_ids(names: Iterable[str]) -> bool:
    """Whether these are names of classes, at least one, and each a WordNet id of ImageNet-1k."""
    names = set(names)
    # timm is imported for what looks like such ids alone.
    return bool(names) and all(map(_ID.fullmatch, names)) and names <= imagenet_numbers().keys()


@cache
def imagenet_numbers() -> dict[str, int]:
    """Returns the number of each class, from 0, by its WordNet id."""
    from timm.data import ImageNetInfo

    return {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


@cache
def imagenet_names() -> tuple[str, ...]:
    """Returns the name of each class: its first one, or all of them where another class has the same first one."""
    from timm.data import ImageNetInfo

    descriptions = ImageNetInfo("imagenet-1k").label_descriptions()
    first_names = [names.split(",")[0] for names in descriptions]
    count = Counter(first_names)
    names = [first if count[first] == 1 else every for first, every in zip(first_names, descriptions, strict=True)]
    names[_BIRD], names[_MACHINE] = "crane bird", "construction crane"  # Both are called crane and nothing else.
    return tuple(names)
