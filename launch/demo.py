"""The demo: from text that every Python brings along to a trained, exported, sampled BLOOM."""

import ast
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path("configs/demo.toml")
DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
EXPORT = Path("runs/demo-export")
_PROMPT = "def read_file(path):\n"


def run_demo() -> int:
    """Run all steps, each by the command that a user would type; returns the exit code."""
    if EXPORT.exists():
        print(
            f"The demo is done: {RUN} holds the run, {EXPORT} the exported model.\n"
            f"To begin afresh: rm -r {RUN} {DATA} {EXPORT}, then `make demo`."
        )
        return 0
    if not CONFIG.exists():
        print(f"error: {CONFIG} is not here; run the demo in the project's folder", file=sys.stderr)
        return 2
    _write_text()
    tokenizer = str(DATA / "tokenizer")
    steps: list[list[str]] = []
    if not Path(tokenizer).exists():
        steps.append(["tokenizer", "train", "configs/tokenizer/demo.toml"])
    for name in ("code", "docs"):
        text, prefix = str(DATA / f"{name}.jsonl"), str(DATA / name)
        steps.append(["corpus", "encode", text, f"--tokenizer={tokenizer}", "--output", prefix])
    steps += [
        ["train", str(CONFIG)],
        ["plot", str(RUN)],
        ["export", str(RUN), str(EXPORT)],
    ]
    for step in steps:
        if code := _anthesis(step):
            return code
    if code := _generate_with_transformers():
        return code
    _report()
    return 0


def _anthesis(arguments: list[str]) -> int:
    print(f"\n$ anthesis {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "launch.cli", *arguments]).returncode


def _write_text() -> None:
    """code.jsonl: the standard library's sources; docs.jsonl: the documentation strings in them."""
    if (DATA / "docs.jsonl").exists():
        return
    print("collecting the sources and documentation strings of this Python's standard library ...")
    DATA.mkdir(parents=True, exist_ok=True)
    with open(DATA / "code.jsonl", "w") as code, open(DATA / "docs.new", "w") as docs:
        for source in _library_sources():
            code.write(json.dumps({"text": source}) + "\n")
            for text in _documentation(source):
                docs.write(json.dumps({"text": text}) + "\n")
    (DATA / "docs.new").rename(DATA / "docs.jsonl")


def _library_sources() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules of the library are in other encodings


def _documentation(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) > 100:
            yield text


def _generate_with_transformers() -> int:
    """Show that the export needs nothing of ours: transformers loads it and writes text."""
    code = (
        "import sys, transformers\n"
        "transformers.logging.set_verbosity_error()\n"
        "pipe = transformers.pipeline('text-generation', model=sys.argv[1])\n"
        "transformers.set_seed(0)\n"
        "out = pipe(sys.argv[2], max_new_tokens=60, do_sample=True, temperature=0.7)\n"
        "print(out[0]['generated_text'])\n"
    )
    print(f"\n$ python: transformers.pipeline('text-generation', model='{EXPORT}')", flush=True)
    return subprocess.run([sys.executable, "-c", code, str(EXPORT), _PROMPT]).returncode


def _report() -> None:
    from pretrain.observe.metrics import read_metrics

    losses = [
        row["validation_loss"]
        for row in read_metrics(RUN / "metrics.jsonl")
        if "validation_loss" in row
    ]
    before, after = (2.718281828459045**loss for loss in (losses[0], losses[-1]))
    print(
        f"\nDone. Validation perplexity fell from {before:,.0f} to {after:,.1f} "
        f"({before / after:,.0f} times).\n"
        f"  {RUN}/curves.png     loss, learning rate and batch against tokens\n"
        f"  {RUN}/metrics.jsonl  one row a step; {RUN}/tensorboard for TensorBoard\n"
        f"  {RUN}/checkpoints    the run can go on from here, on any number of ranks\n"
        f"  {EXPORT}          a model that transformers loads\n"
        "Next:\n"
        f'  anthesis sample {RUN} "import os"\n'
        f"  anthesis train {CONFIG} recipe.train=1M recipe.learning_rate.decay=1M\n"
        f"  torchrun --nproc-per-node 2 -m pretrain {CONFIG} name=two engine.zero_stage=3\n"
        "The commands are in .venv/bin."
    )
