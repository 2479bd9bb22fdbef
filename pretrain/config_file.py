"""Reading a run config: TOML plus `key.sub=value` overrides -> Config.

Everything wrong is reported at once: the key, what was found, the rule and the cure.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pretrain.config import Config
from pretrain.config_base import TAGS, Section, sections_of
from pretrain.config_rules import CHECKS, Check
from pretrain.errors import ConfigError, Problem

S = TypeVar("S", bound=Section)
_SEE = "see configs/ for examples, `anthesis config --schema` for all keys of a run"


def load(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """Read the config of a run: see `load_as`. `data.sources` may be a file that holds them."""
    return load_as(Config, path, overrides, CHECKS, _include_sources)


def load_as(
    root: type[S],
    path: str | os.PathLike[str],
    overrides: list[str] | None = None,
    checks: Sequence[Check] = (),
    prepare: Callable[[dict[str, Any], Path], None] = lambda tree, folder: None,
) -> S:
    """Read a TOML file, apply overrides, validate everything.

    `prepare(tree, folder)` may change the tree, at first (with the folder of the file) and after
    each override (with the working directory). Relative paths are taken from the working directory.
    Raises ConfigError with all problems.
    """
    tree = read_toml(Path(path))
    prepare(tree, Path(path).parent)
    problems = []
    for text in overrides or []:
        problems += [problem] if (problem := _override(tree, text)) else []
        prepare(tree, Path())
    config, found = validate(root, tree, checks)
    problems += found
    if problems or config is None:
        raise ConfigError(str(path), problems)
    return config


def _include_sources(tree: dict[str, Any], folder: Path) -> None:
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), str):
        file = folder / Path(data["sources"]).expanduser()
        data["sources"] = read_toml(file).get("sources", [])


def read_toml(path: Path) -> dict[str, Any]:
    """The tree of a TOML file; ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [Problem("CONFIG", str(path), "a readable TOML file",
                          f"{error.strerror}: check the path")]) from None  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem("CONFIG", str(path), "valid TOML in UTF-8",
                          str(error))]) from None  # fmt: skip


def validate(
    root: type[S], tree: dict[str, Any], checks: Sequence[Check] = ()
) -> tuple[S | None, list[Problem]]:
    """All problems of a config tree; the config if there are none."""
    problems: list[Problem] = []
    try:
        config = root.model_validate(tree)
        good: dict[str, Any] = {name: getattr(config, name) for name in root.model_fields}
    except ValidationError as error:
        # A list left too short by errors inside it is no problem of its own.
        details = [d for d in error.errors() if d["type"] != "too_short" or not d["input"]]
        config, problems = None, [_explain(root, detail) for detail in details]
        good = _valid_sections(root, tree)
    for needs, check in checks:
        if all(need in good for need in needs):
            problems += check(*(good[need] for need in needs))
    return (None if problems else config), problems


def schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    return Config.model_json_schema()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for every leaf in which two resolved configs differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


# --- reading -------------------------------------------------------------------------------------


def _override(tree: dict[str, Any], text: str) -> Problem | None:
    """Apply "a.b=value" to `tree`; the value is TOML, or a plain string where it is not."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return Problem("override", text, "key.sub=value", "for example engine.zero_stage=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        else:
            node = None
    if isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = parsed
    elif isinstance(node, dict):
        node[leaf] = parsed
    else:
        return Problem("override", text, "the key must lie inside a section", "check the key")
    return None


# --- explaining ----------------------------------------------------------------------------------


def _explain(root: type[Section], detail: Any) -> Problem:
    """A pydantic error in our words: the key, what was found, the rule and the cure."""
    section, location = _resolve(root, detail["loc"])
    key, found, message = ".".join(map(str, location)), detail.get("input"), detail["msg"]
    message = message.removeprefix("Value error, ")
    field = section.model_fields.get(str(location[-1])) if section and location else None
    description = field.description if field and field.description else _SEE
    if detail["type"] == "extra_forbidden":
        names = list(section.model_fields) if section else []
        return Problem(key, found, "no such key", _nearest(str(location[-1]), names))
    if detail["type"] == "missing":
        return Problem(key, None, "the key is required", f"add it ({description})")
    if detail["type"] == "union_tag_invalid":
        name = detail["ctx"]["discriminator"].strip("'()")
        known = [tag.strip(" '") for tag in detail["ctx"]["expected_tags"].split(",")]
        tag = detail["ctx"]["tag"]
        return Problem(f"{key}.{name}", tag, f"a known {name}", _nearest(tag, known))
    return Problem(key, found, message[0].lower() + message[1:], description)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"


def _resolve(
    root: type[Section], location: tuple[Any, ...]
) -> tuple[type[Section] | None, list[Any]]:
    """The section in which the last part of a pydantic location lies, and the location without the
    tags that pydantic puts in where a section is one of several."""
    section: type[Section] | None = root
    inside: list[type[Section]] = [root]
    key: list[Any] = []
    for part in location:
        if len(inside) > 1 and (chosen := [s for s in inside if TAGS.get(s) == part]):
            inside = chosen
            continue
        section = inside[0] if len(inside) == 1 else None
        key.append(part)
        if isinstance(part, str) and section and part in section.model_fields:
            inside = sections_of(section.model_fields[part])
    return section, key


def _valid_sections(root: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """The sections that are valid by themselves, so that cross checks run where they can."""
    good = {}
    for name, field in root.model_fields.items():
        if name in tree:
            wrapper = type("One", (Section,), {"__annotations__": {"value": field.annotation}})
            try:
                good[name] = wrapper(value=tree[name]).value
            except ValidationError:
                continue
        elif not field.is_required():
            good[name] = field.default
    return good
