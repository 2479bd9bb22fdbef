"""`python -m launch.host_facts CONFIG [key=value ...]`: what `anthesis doctor` runs on a host.

Prints the facts as one line of JSON between marks, since a login shell may print things too.
"""

import argparse
import json
import re
import sys
from typing import Any

from pretrain.config_file import load
from pretrain.errors import UserError
from pretrain.health.facts import host_facts

BEGIN, END = "<anthesis-facts>", "</anthesis-facts>"


def main(arguments: list[str] | None = None) -> int:
    """Print the facts, or why the config cannot be read here; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.host_facts", description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--master")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    try:
        config = load(options.config, options.overrides)
        found = host_facts(config, master=options.master, port=options.port)
    except UserError as error:
        found = {"problem": str(error)}
    print(f"\n{BEGIN}{json.dumps(found)}{END}", flush=True)
    return 0


def read_facts(output: str) -> dict[str, Any] | None:
    """The facts in what a host printed; None where there are none, or not all."""
    found = re.search(f"{BEGIN}(.*){END}", output)
    return json.loads(found[1]) if found else None


if __name__ == "__main__":
    sys.exit(main())
