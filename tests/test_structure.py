"""The house's order: imports point down the layers, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module may import those of its own and of lower layers.
LAYERS = {
    "pretrain.errors": 0, "pretrain.quantities": 0, "pretrain.recipe": 0, "pretrain.config": 0,
    "pretrain.config_rules": 0, "pretrain.config_file": 0, "pretrain.sizes": 0, "pretrain": 0,
    "pretrain.health": 2,
    "pretrain.model": 1, "pretrain.data": 1, "pretrain.optim": 1, "tokenizer": 2,
    "pretrain.engine": 2, "pretrain.sync": 2, "pretrain.checkpoint": 3,
    "pretrain.checkpoint_slices": 3, "pretrain.guard": 3, "pretrain.observe": 4,
    "pretrain.loop": 5, "pretrain.train": 6, "pretrain.__main__": 6, "pretrain.finished": 6,
    "pretrain.lab": 6,
    "launch": 7,
}  # fmt: skip
FILES = sorted(
    path for room in ("launch", "pretrain", "tokenizer") for path in (ROOT / room).rglob("*.py")
)
NO_TORCH = ("launch", "pretrain.config", "pretrain.config_file", "pretrain.config_rules",
            "pretrain.recipe", "pretrain.curves",
            "pretrain.batches", "pretrain.sizes", "pretrain.memory", "pretrain.wire",
            "pretrain.lab.range_test", "pretrain.lab.compare_",
            "pretrain.quantities", "pretrain.errors", "pretrain.health", "pretrain.foreign",
            "pretrain.stopping", "pretrain.rank_table", "pretrain.deepspeed_settings",
            "pretrain.engine.placement",
            "pretrain.data.corpus", "pretrain.data.shards", "pretrain.data.mixture",
            "pretrain.data.permutation", "pretrain.data.streams", "pretrain.data.megatron",
            "pretrain.data.shard_writer", "pretrain.sync.coordinator", "tokenizer")  # fmt: skip


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module):
    """Layer of a module: its own entry, or that of the package it lies in."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
        if not module:
            return None
    return LAYERS[module]


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    own = layer(module_name(path))
    assert own is not None, "a new module needs its place in LAYERS"
    for imported in imports(path):
        if imported.split(".")[0] in ("launch", "pretrain", "tokenizer"):
            assert layer(imported) <= own, f"{module_name(path)} must not import {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_light_modules_import_no_torch(path):
    if module_name(path).startswith(NO_TORCH):
        heavy = {"torch", "deepspeed", "transformers"}
        assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & heavy


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, f"{node.name} does not fit a screen"


def test_only_the_adapter_knows_deepspeeds_insides():
    users = {module_name(path) for path in FILES
             if any(name.split(".")[0] == "deepspeed" for name in imports(path))}  # fmt: skip
    assert users == {"pretrain.engine.deepspeed_setup", "pretrain.engine.fragments"}
