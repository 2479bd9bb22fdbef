"""Quantities with units: "375M tokens", "20B", "90min", "80GB" <-> exact numbers.

SI suffixes are decimal (k = 10^3, M = 10^6, B or G = 10^9, T = 10^12); numbers are exact, so
"409.6B tokens" is the integer 409,600,000,000.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_PATTERN = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?(?:[eE]\d+)?)\s*([kKMBGT]?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Quantity:
    """An exact whole number of `unit`. Subclasses say which units they know."""

    value: int
    unit: str

    UNITS: ClassVar[dict[str, int]] = {}  # unit -> how many base units it is worth
    EXAMPLES: ClassVar[tuple[str, ...]] = ()
    DEFAULT_UNIT: ClassVar[str] = ""

    @classmethod
    def parse(cls, text: "str | int | Self") -> Self:
        """Read "20B", "375M tokens", 512. Raises ValueError with the rule and an example."""
        if isinstance(text, cls):
            return text
        if isinstance(text, bool) or not isinstance(text, str | int):
            raise ValueError(cls._rule())
        match = _PATTERN.fullmatch(str(text))
        if not match:
            raise ValueError(cls._rule())
        number, suffix, unit = match.groups()
        unit = unit or cls.DEFAULT_UNIT
        # "5 min": the pattern takes an upper-case M as a suffix only, so "5Min" is refused, not 5M.
        singular_or_plural = unit if unit in cls.UNITS else unit + "s"
        if singular_or_plural not in cls.UNITS:
            raise ValueError(cls._rule())
        value = Decimal(number.replace("_", "")) * _SUFFIXES[suffix.lower()]
        value *= cls.UNITS[singular_or_plural]
        if value != value.to_integral_value():
            raise ValueError(f"{text} is not a whole number")
        return cls(int(value), cls._base_unit(singular_or_plural))

    @classmethod
    def _base_unit(cls, unit: str) -> str:
        return unit

    @classmethod
    def _rule(cls) -> str:
        examples = ", ".join(f'"{e}"' for e in cls.EXAMPLES)
        return f"a number with an optional k, M, B or T and a unit, such as {examples}"

    def __str__(self) -> str:
        """Canonical text that parses back to the same quantity."""
        for suffix, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
            if self.value and self.value % factor == 0:
                return f"{self.value // factor}{suffix} {self.unit}"
        return f"{self.value} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": ["string", "integer"], "description": cls._rule()}


class Horizon(Quantity):
    """A length or moment of training: tokens (the default unit), samples, steps or epochs."""

    UNITS = {"tokens": 1, "samples": 1, "steps": 1, "epochs": 1}
    EXAMPLES = ("375M tokens", "20B", "9765625 samples", "2 epochs")
    DEFAULT_UNIT = "tokens"

    def samples(self, sequence_length: int) -> int:
        """Whole samples of `sequence_length` tokens that fit; a remainder is dropped, as BLOOM did
        (375M tokens of warm-up became 183,105 samples of 2048 tokens). Steps and epochs have no
        fixed size: see `pretrain.config_recipe.Axis`."""
        if self.unit in ("steps", "epochs"):
            raise ValueError(f"{self.unit} have no fixed number of samples; give tokens or samples")
        return self.value if self.unit == "samples" else self.value // sequence_length

    def crossed(self, before: Any, after: Any) -> bool:
        """Whether a multiple of this horizon lies in (before, after], two clocks."""
        field = "step" if self.unit == "steps" else self.unit
        return getattr(before, field) // self.value < getattr(after, field) // self.value


class Duration(Quantity):
    """A time in seconds."""

    UNITS = {"s": 1, "sec": 1, "seconds": 1, "min": 60, "minutes": 60, "h": 3600, "hours": 3600}
    UNITS |= {"d": 86400, "days": 86400}
    EXAMPLES = ("90min", "1.5h", "30s")
    DEFAULT_UNIT = "s"

    @classmethod
    def _base_unit(cls, unit: str) -> str:
        return "s"


def human_count(value: float) -> str:
    """1234567 -> "1.23M": at most six characters, for tables and log lines."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def human_bytes(size: float) -> str:
    """1234567 -> "1.23MB", in powers of 1000."""
    return human_count(round(size)).replace("B", "G") + "B"


def human_seconds(seconds: float) -> str:
    """4000 -> "1h06m"; for ETAs."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"
