"""A table of alternatives to a planned run: `--compare zero.stage=1,2,3 sync=powersgd,diloco`."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from launch.plan import Plan
from pretrain.config import Config
from pretrain.config_sync import SyncSection
from pretrain.config_sync import parse_sync as read_sync
from pretrain.errors import UserError
from pretrain.quantities import human_bytes

_MOST = 64
_SHORT = {"zero.stage": "engine.zero_stage", "zero_stage": "engine.zero_stage",
          "micro_batch_samples": "engine.micro_batch_samples",
          "activation_checkpointing": "engine.activation_checkpointing"}  # fmt: skip


def compare(plan: Plan, choices: list[str], load: Callable[[list[str]], Config]) -> str:
    """One row for each combination of `choices`, after that of the plan itself.

    A choice is KEY=VALUE,VALUE,...: any key of the run config, or nodes, shard_ranks, sync. `load`
    reads the run config with more overrides. Raises UserError for a choice that is none.
    """
    keys, values = [], []
    for choice in choices:
        key, equals, listed = choice.partition("=")
        if not equals or not listed:
            raise UserError(
                f"--compare {choice}\n  rule: KEY=VALUE,VALUE,...\n"
                "  cure: for example zero.stage=1,2,3 sync=powersgd,diloco"
            )
        keys.append(key)
        values.append(listed.split(","))
    combinations = list(product(*values))
    if len(combinations) > _MOST:
        raise UserError(
            f"--compare asks for {len(combinations)} combinations\n  rule: at most {_MOST}\n"
            "  cure: compare fewer values at once"
        )
    rows = [("as configured", plan)]
    for combination in combinations:
        choice = dict(zip(keys, combination, strict=True))
        label = " ".join(f"{key}={value}" for key, value in choice.items())
        rows.append((label, _changed(plan, choice, load)))
    width = max(len(label) for label, _ in rows)
    lines = [f"{'':<{width}}{'memory':>9}{'fits':>6}{'s/step':>9}{'days':>9}{'sent a step':>13}"]
    for label, row in rows:
        sent = human_bytes(row.sent_bytes) if row.layout.replicas > 1 else "-"
        lines.append(
            f"{label:<{width}}{human_bytes(row.rank_bytes):>9}{'yes' if row.fits else 'no':>6}"
            f"{row.final_cost.seconds:>9.4g}{row.seconds / 86400:>9.3g}{sent:>13}"
        )
    return "\n".join(lines)


def _changed(plan: Plan, choice: dict[str, str], load: Callable[[list[str]], Config]) -> Plan:
    assert plan.cluster is not None
    overrides = [
        f"{_SHORT.get(key, key)}={value}"
        for key, value in choice.items()
        if key not in ("sync", "shard_ranks", "nodes")
    ]
    if overrides:
        config, before = load(overrides), plan.config
        for section in ("mesh", "sync"):  # what the plan was asked for beside its config
            if not any(text.startswith(f"{section}.") for text in overrides):
                config = config.model_copy(update={section: getattr(before, section)})
        plan = replace(plan, config=config)
    # Without shard_ranks a sync method is between nodes, so how many ranks they have comes first.
    for key, value in sorted(choice.items(), key=lambda item: item[0] == "sync"):
        if key == "sync":
            plan = plan.with_replicas(
                plan.config.mesh.shard_ranks or plan.cluster.devices_per_node, parse_sync(value)
            )
        elif key == "shard_ranks":
            plan = plan.with_replicas(whole_number(key, value), plan.config.sync)
        elif key == "nodes":
            plan = plan.with_nodes(whole_number(key, value))
    return plan


def parse_sync(text: str) -> SyncSection:
    """A method between replicas, for users."""
    try:
        return read_sync(text)
    except ValueError as error:
        raise UserError(
            f"sync = {error}\n  rule: a known method\n  cure: for example powersgd:4"
        ) from None


def whole_number(key: str, text: str) -> int:
    """`text` as a number above 0, for users."""
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise UserError(f"{key} = {text}\n  rule: a whole number above 0\n  cure: for example 8")
