"""Settings of training that stand in files of other programs: an accelerate YAML, a DeepSpeed JSON,
the variables that `accelerate launch` makes of them.

The run config decides. What says the same elsewhere is let pass, what says something else is an
error that names both; nothing is taken over.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config import Config
from pretrain.errors import ConfigError, Problem, UserError


class Setting(NamedTuple):
    """One setting: which file or variable says it, its key there, what kind it is, its value."""

    source: str
    key: str
    kind: str
    value: Any


# Where DeepSpeed's JSON has what the run config decides. Other keys of it have no effect here.
_DEEPSPEED = {
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload",
    "zero_optimization.offload_param.device": "offload_parameters",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "gradient_clipping": "clip_norm",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "rate",
    "optimizer.params.betas": "betas",
    "optimizer.params.eps": "epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.type": "scheduler",
}
_ACCELERATE = {
    "mixed_precision": "mixed_precision",
    "deepspeed_config.zero_stage": "zero_stage",
    "deepspeed_config.gradient_accumulation_steps": "accumulation",
    "deepspeed_config.gradient_clipping": "clip_norm",
    "deepspeed_config.offload_optimizer_device": "offload",
    "deepspeed_config.offload_param_device": "offload_parameters",
    "deepspeed_config.deepspeed_config_file": "file",
    "distributed_type": "distributed_type",
    "num_machines": "nodes",
    "num_processes": "ranks",
}
_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "accumulation",
    "ACCELERATE_GRADIENT_CLIPPING": "clip_norm",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_parameters",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "file",
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "megatron",
}


def check_foreign(settings: list[Setting], config: Config, **job: int) -> None:
    """Raise ConfigError with all settings that contradict the run; `job` has nodes and ranks."""
    problems = [p for setting in settings for p in _contradiction(setting, config, job)]
    if problems:
        sources = dict.fromkeys(setting.source for setting in settings)
        raise ConfigError(", ".join(sources), problems)


def of_deepspeed(path: Path) -> list[Setting]:
    """What a DeepSpeed JSON says that a run config decides."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, "JSON", error) from None
    found = _settings(str(path), tree, _DEEPSPEED)
    if isinstance(tree, dict) and tree.get("managed_gradient_accumulation") is False:
        # As rendered here: accumulation and clipping are not DeepSpeed's.
        found = [one for one in found if one.kind not in ("accumulation", "clip_norm")]
    return found


def of_accelerate(path: Path) -> list[Setting]:
    """What an accelerate YAML says, and the DeepSpeed JSON that it names."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, "YAML", error) from None
    return _with_files(_settings(str(path), tree, _ACCELERATE))


def of_environment(environment: Mapping[str, str] = os.environ) -> list[Setting]:
    """What `accelerate launch` told this process of its files."""
    found = [
        Setting("environment", name, kind, _parsed(environment[name]))
        for name, kind in _VARIABLES.items()
        if name in environment
    ]
    return _with_files(found)


def _settings(source: str, tree: Any, known: dict[str, str]) -> list[Setting]:
    if not isinstance(tree, dict):
        raise UserError(f"{source}: no settings in it\n  cure: check that it is the right file")
    found = []
    for key, kind in known.items():
        node: Any = tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            found.append(Setting(source, key, kind, node))
    return found


def _with_files(settings: list[Setting]) -> list[Setting]:
    return settings + [
        inner for one in settings if one.kind == "file" for inner in of_deepspeed(Path(one.value))
    ]


def _contradiction(setting: Setting, config: Config, job: dict[str, int]) -> Iterator[Problem]:
    value, kind = setting.value, setting.kind
    if value is None or str(value).lower() in ("auto", "none") or kind == "file":
        return
    recipe, optimizer = config.build_recipe(), config.optimizer
    constant = recipe.batch(0) == recipe.batch.final
    passes = value  # nobody knows of how many ranks
    if "ranks" in job:
        passes = recipe.batch.final / (config.engine.micro_batch_samples * job["ranks"])
    decided: dict[str, tuple[str, Any]] = {
        "zero_stage": ("engine.zero_stage", config.engine.zero_stage),
        "offload": ("engine.offload", config.engine.offload),
        "bf16": ("engine.precision", config.engine.precision),
        "mixed_precision": ("engine.precision", config.engine.precision),
        "clip_norm": ("optimizer.clip_norm", optimizer.clip_norm),
        "micro_batch": ("engine.micro_batch_samples", config.engine.micro_batch_samples),
        "batch": ("recipe.batch", recipe.batch.final if constant else "a ramp"),
        "accumulation": ("recipe.batch", passes if constant else "a ramp"),
        "optimizer": ("optimizer.name", optimizer.name),
        "rate": ("recipe.learning_rate.peak", config.recipe.learning_rate.peak),
        "betas": ("optimizer.betas", list(getattr(optimizer, "betas", ()))),
        "epsilon": ("optimizer.epsilon", getattr(optimizer, "epsilon", None)),
        "weight_decay": ("optimizer.weight_decay", optimizer.weight_decay),
        "nodes": ("nodes of the launch", job.get("nodes", value)),
        "ranks": ("ranks of the launch", job.get("ranks", value)),
    }
    if kind == "bf16":
        same = bool(value) == (config.engine.precision == "bf16")
    elif kind == "mixed_precision":  # "no" is what accelerate writes where nobody chose
        same = value in ("no", False) or value == config.engine.precision
    elif kind in ("fp16", "fsdp", "megatron", "scheduler", "offload_parameters"):
        same = value in (False, "false", "no")
    elif kind == "distributed_type":
        same = str(value) not in ("FSDP", "MEGATRON_LM", "XLA", "TPU")
    elif kind == "optimizer":
        same = str(value).lower().replace("_", "-") == optimizer.name
    else:
        same = _equal(value, decided[kind][1])
    if not same:
        key, ours = decided.get(kind, ("the run config", "not offered: ZeRO and its own schedules"))
        yield Problem(
            f"{setting.key} ({setting.source})", value, f"must not contradict {key} = {ours}",
            f"remove it there: the run config says it; or change {key}",
        )  # fmt: skip


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return bool(one == other)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    said = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
    return UserError(f"{path}: {said}\n  rule: readable {kind}\n  cure: check the file")
