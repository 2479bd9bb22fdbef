"""The options of `anthesis compare`; they import nothing heavy, for `--help`."""

import argparse
from pathlib import Path

DEFAULT_OPTIMIZERS = "adamw,lamb,lion,muon,schedulefree"
GRAMMAR = "NAME[@RATE][:key=value,key=value]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", metavar="CONFIG", help="a run config in TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, of all runs")
    parser.add_argument(
        "--optimizers",
        default=DEFAULT_OPTIMIZERS,
        metavar="LIST",
        help=f"{GRAMMAR}, separated by commas; RATE is the centre of the grid (by default a usual "
        f"rate of the optimizer); adamw,muon@1e-3:scale=spectral ({DEFAULT_OPTIMIZERS})",
    )
    for name, kind, default, text in (
        ("seeds", int, 3, "runs at the best rate of each, the one that found it included"),
        ("rates", int, 3, "learning rates tried with the first seed"),
        ("factor", float, 3.0, "between neighbouring rates"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default:g})")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write (DIRECTORY/NAME-compare)"
    )
