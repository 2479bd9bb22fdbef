"""Who takes part in a comparison of optimizers, and the config of each of its runs. No torch.

Every optimizer trains the same run: the same tokens, batch, seeds and held-out samples. What
belongs to the method changes with it: its options, its learning rate and, for Schedule-Free, that
the rate does not decay.
"""

import argparse
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.config_file import load, validate
from pretrain.config_optim import OptimizerSection
from pretrain.config_rules import CHECKS
from pretrain.errors import ConfigError, Problem
from pretrain.lab.compare_arguments import GRAMMAR

# "module:Class" is a name too: what follows a colon and holds no "=" belongs to it.
_ENTRY = re.compile(r"(?P<name>[^:@=]+(?::[^:@=]+)?)(?:@(?P<rate>[^:]*))?(?::(?P<options>.*=.*))?")
_FACTORS = (1.1, 100.0)  # rates are rounded to three digits and have to stay apart
_MOST_RATES = 21
_RATES = (1e-30, 1e30)
_LONGEST_SLUG = 100


@dataclass(frozen=True)
class Entry:
    """An optimizer that takes part; `label` is what the user called it, `centre` the rate in the
    middle of its grid."""

    label: str
    section: OptimizerSection
    centre: float

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return _slug(self.label)

    @property
    def schedule_free(self) -> bool:
        """Whether the method takes a constant rate in place of the recipe's shape."""
        return self.section.facts.averages


@dataclass(frozen=True)
class Comparison:
    """A comparison: what `config` trains, by each of `entries`, into the folder `output`.

    The rates of an entry are centre x factor^k, `rates` of them (odd); the best of them on the
    first seed is run with the other seeds.
    """

    config: Config
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    rates: int
    factor: float
    output: Path

    @property
    def planned_runs(self) -> int:
        """How many runs there are, if no grid has to be extended."""
        return len(self.entries) * (self.rates + len(self.seeds) - 1)

    def rate(self, entry: Entry, k: int) -> float:
        """The rate k places above the centre of the grid, rounded so that a folder can name it."""
        return float(f"{entry.centre * self.factor**k:.3g}")

    def grid(self, entry: Entry) -> list[float]:
        """The rates that an entry begins with, in rising order."""
        half = self.rates // 2
        return [self.rate(entry, k) for k in range(-half, half + 1)]

    def trial(self, entry: Entry, rate: float, seed: int) -> Config:
        """The config of a run."""
        tree = _trial_tree(self.config, entry, rate)
        # A name has no room for the plus of 1e+06.
        name = f"{entry.slug}-rate{rate:.3g}-seed{seed}".replace("+", "")
        return Config.model_validate(
            tree | {"name": name, "directory": str(self.output / "runs"), "seed": seed}
        )


def comparison_of(options: argparse.Namespace) -> Comparison:
    """What the command asks for; ConfigError with all that is wrong, before anything trains."""
    problems = list(_option_problems(options))
    config = load(options.config, options.overrides)
    if config.data.validation_fraction == 0:
        problems.append(Problem("data.validation_fraction", 0.0, "above 0: optimizers are compared "
                        "by their loss on held-out text", "for example 0.05"))  # fmt: skip
    tree = config.resolved()
    tree["observe"] = tree["observe"] | {"tensorboard": False}
    tree["observe"].pop("parameters_every", None)  # it would be measured with the steps
    if config.validation.every is None:  # the end is validated where there is an interval
        samples = max(1, config.build_recipe().total_samples // 10)
        tree["validation"] = tree["validation"] | {"every": f"{samples} samples"}
    config = Config.model_validate(tree)
    entries, found = read_entries(options.optimizers, config)
    problems += found
    if problems:
        raise ConfigError("comparison of optimizers", problems)
    return Comparison(
        config=config,
        entries=tuple(entries),
        seeds=tuple(config.seed + k for k in range(options.seeds)),
        rates=options.rates,
        factor=options.factor,
        output=(options.output or config.directory / f"{config.name}-compare").absolute(),
    )


def _option_problems(options: argparse.Namespace) -> Iterator[Problem]:
    rules = (
        ("seeds", options.seeds >= 1, "at least 1", "3 or more, to see a spread"),
        ("rates", 1 <= options.rates <= _MOST_RATES and options.rates % 2,
         f"odd, 1 to {_MOST_RATES}: a centre with as many rates on each side", "default 3"),
        ("factor", _FACTORS[0] <= options.factor <= _FACTORS[1],
         f"{_FACTORS[0]:g} to {_FACTORS[1]:g}", "default 3"),
    )  # fmt: skip
    for key, good, rule, cure in rules:
        if not good:
            yield Problem(f"--{key}", getattr(options, key), rule, cure)


def read_entries(text: str, config: Config) -> tuple[list[Entry], list[Problem]]:
    """The optimizers named in `text`, and all that is wrong with them.

    A name without options that is the config's own means its section as it stands; otherwise an
    optimizer has the defaults of its section and the options given.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    for item in _split(text):
        entry, found = _read_entry(item, config)
        problems += found
        if entry and entry.slug in [other.slug for other in entries]:
            problems.append(Problem("--optimizers", entry.label, "each is named once",
                            "drop one, or give it other options"))  # fmt: skip
        elif entry:
            entries.append(entry)
    return entries, problems


def _read_entry(item: str, config: Config) -> tuple[Entry | None, list[Problem]]:
    match = _ENTRY.fullmatch(item)
    if not match:
        return None, [Problem("--optimizers", item, GRAMMAR, "for example adamw@1e-3, "
                      "sgd:momentum=0.9,nesterov=true or muon:scale=spectral")]  # fmt: skip
    name, options = match["name"], match["options"]
    label = f"{name}:{options}" if options else name
    problems = []
    rate = _rate(match["rate"]) if match["rate"] is not None else None
    if match["rate"] is not None and rate is None:
        problems.append(Problem("--optimizers", item, "RATE is a number, "
                        f"{_RATES[0]:g} to {_RATES[1]:g}", f"for example {name}@1e-3"))  # fmt: skip
    tree = {"name": name, **_options(options)} if options else {"name": name}
    if not options and name == config.optimizer.name:
        tree = config.resolved()["optimizer"]
    # The sections alone first: the centre of the grid is a fact of the section.
    found, wrong = validate(Config, config.resolved() | {"optimizer": tree})
    if found is None:
        return None, problems + [_of(label, problem) for problem in wrong]
    section = found.optimizer
    entry = Entry(label, section, rate or section.facts.learning_rate)
    _, wrong = validate(Config, _trial_tree(config, entry, entry.centre), CHECKS)
    return entry, problems + [_of(label, problem) for problem in wrong]


def _of(label: str, problem: Problem) -> Problem:
    return replace(problem, key=f"{label}: {problem.key}")


def _trial_tree(config: Config, entry: Entry, rate: float) -> dict[str, Any]:
    """The run of `config` as an entry trains it, as plain values."""
    tree = config.resolved()
    shape = tree["recipe"]["learning_rate"]
    if entry.schedule_free:
        # Its average takes the place of a decay (arXiv 2405.15682); the warm-up stays.
        shape = {"shape": "constant", "peak": rate, "warmup": shape["warmup"]}
    else:
        if "floor" in shape:
            shape["floor"] *= rate / shape["peak"]
        shape["peak"] = rate
    # A Config of its own, so that the section's values are written as a file would have them.
    own = config.model_copy(update={"optimizer": entry.section}).resolved()["optimizer"]
    return tree | {"optimizer": own, "recipe": tree["recipe"] | {"learning_rate": shape}}


def _split(text: str) -> list[str]:
    """The optimizers of a list; what has a "=" and no colon is a further option of the one before,
    as in sgd:momentum=0.9,nesterov=true,lion."""
    items: list[str] = []
    for part in _at_commas(text):
        is_option = "=" in part and ":" not in part.partition("=")[0]
        if is_option and items and "=" in items[-1]:
            items[-1] += f",{part}"
        else:
            items.append(part)
    return items


def _at_commas(text: str) -> list[str]:
    """Split at commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _options(text: str) -> dict[str, Any]:
    """key=value,...; a value is TOML, or a plain string where it is not, as in an override."""
    options: dict[str, Any] = {}
    for part in _at_commas(text):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[key.strip()] = value
    return options


def _rate(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if _RATES[0] <= number <= _RATES[1] else None


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-._")[:_LONGEST_SLUG]
