"""Print the shell commands of the README, to be run after the demo.

Blocks marked `bash` are commands; `make` targets are left out, since CI runs them itself, and so
are blocks marked `console`, which show what needs a cluster.
"""

import re
from pathlib import Path

readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
commands = [
    line
    for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
    for line in block.splitlines()
    if not line.startswith(("make ", "git ", "cd ", ". "))
]
if len(commands) < 10:
    raise SystemExit(f"only {len(commands)} commands found in the README: has its form changed?")
print("\n".join(commands))
