"""What all config sections are made of: the base class, common types, unions by a key."""

import os
from collections.abc import Callable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic.fields import FieldInfo

Positive = Annotated[int, Field(gt=0, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Taken from the working directory at once, so that the saved config works from anywhere.
AbsolutePath = Annotated[
    Path, AfterValidator(lambda path: Path(os.path.abspath(path.expanduser())))
]


class Section(BaseModel):
    """Base of all config sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# The name of each section that is one of several.
TAGS: dict[type[Section], str] = {}


def union_by(
    key: str, *sections: type[Section], tag_of: Callable[[Any], Any] = lambda name: name
) -> Any:
    """The type of a section that is one of `sections`, as its `key` says; the first by default.

    Each has a field `key` whose default is its name; `tag_of` turns a value of the key into such a
    name.
    """

    def name_of(value: Any) -> Any:
        default = TAGS[sections[0]]
        found = value.get(key, default) if isinstance(value, dict) else getattr(value, key, default)
        return tag_of(found)

    name_of.__name__ = key  # so pydantic's errors name it
    TAGS.update((section, section.model_fields[key].default) for section in sections)
    tagged = [Annotated[section, Tag(TAGS[section])] for section in sections]
    return Annotated[reduce(or_, tagged), Discriminator(name_of)]


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The sections that a field may hold: by itself, in a tuple, or as one of a union."""
    found, todo = [], [field.annotation]
    while todo:
        annotation = todo.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found.append(annotation)
        else:
            todo += get_args(annotation)
    return found
