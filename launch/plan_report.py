"""A plan in words and tables, at most 96 columns wide."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from launch.plan import Plan, PlannedStage
from pretrain.config_sync import parse_sync
from pretrain.memory import host_memory
from pretrain.quantities import human_bytes, human_count, human_seconds

_ROWS = 12  # of the timeline, unless all are asked for
_METHODS = ("allreduce", "powersgd", "int8", "int4", "diloco:50", "diloco:50:int4", "localsgd:30")


def report(plan: Plan, questions: list[str], full: bool = False) -> str:
    """Everything that is known of the run."""
    parts = [_head(plan), _timeline(plan, full)]
    if questions:
        parts.append(_answers(plan, questions))
    if plan.cluster is not None:
        parts += [_memory(plan), _time(plan), _sync(plan), _advice(plan)]
        parts += [_published(plan)] if plan.config.published else []
    else:
        parts.append("For memory, time and cost: --cluster configs/clusters/NAME.toml")
    return "\n\n".join(part for part in parts if part)


def as_json(plan: Plan, questions: list[str]) -> dict[str, Any]:
    """The same for machines."""
    found: dict[str, Any] = {
        "name": plan.config.name,
        "total_steps": plan.recipe.total_steps,
        "total_samples": plan.recipe.total_samples,
        "total_tokens": plan.recipe.total_samples * plan.length,
        "parameters": plan.shape.parameters,
        "flops_per_token": plan.flops_per_token,
        "model_flops_per_token": plan.model_flops_per_token,
        "at": [plan.at(question) for question in questions],
        "stages": [_stage_json(stage) for stage in plan.stages],
    }
    if plan.cluster is not None:
        cost, layout = plan.final_cost, plan.layout
        found["cluster"] = {
            "name": plan.cluster.name,
            "ranks": layout.ranks,
            "shard_ranks": layout.shards,
            "replicas": layout.replicas,
            "rank_memory_bytes": plan.memory,
            "rank_bytes": plan.rank_bytes,
            "available_bytes": plan.available_bytes,
            "fits": plan.fits,
            "largest_micro_batch_samples": plan.largest_micro_batch(),
            "step_seconds": cost.seconds,
            "compute_seconds": cost.compute,
            "optimizer_seconds": cost.optimizer,
            "zero_communication_seconds": cost.zero_communication,
            "sync_communication_seconds": cost.sync_communication,
            "sync_bytes": plan.sent_bytes,
            "seconds": plan.seconds,
            "device_tflops": plan.device_tflops(plan.stages[-1]),
            **plan.bill(),
            "checkpoints": plan.checkpoint_advice(),
        }
    return found


def _stage_json(stage: PlannedStage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "first_step": stage.begin.step + 1,
        "last_step": stage.end.step,
        "batch_samples": stage.batch_samples,
        "tokens": stage.end.tokens,
        "first_learning_rate": stage.first_rate,
    }
    if stage.cost is not None:
        row |= {"step_seconds": stage.cost.seconds, "idle_share": stage.cost.idle_share}
    return row


# --- parts ---------------------------------------------------------------------------------------


def _head(plan: Plan) -> str:
    recipe, engine = plan.recipe, plan.config.engine
    recompute = "with" if engine.activation_checkpointing else "without"
    lines = [
        f"{plan.config.name}: {plan.shape.parameters:,} parameters, {recipe.total_steps:,} steps, "
        f"{human_count(recipe.total_samples * plan.length)} tokens in samples of {plan.length}",
        f"FLOPs a token: {plan.flops_per_token:.4g} {recompute} recomputation, "
        f"{plan.model_flops_per_token:.4g} of the model itself (6 N + attention)",
    ]
    if plan.cluster is not None:
        layout = plan.layout
        groups = f", {layout.replicas} replicas of {layout.shards}" if layout.replicas > 1 else ""
        lines.append(
            f"On {plan.cluster.name}: {plan.cluster.nodes} nodes of {plan.cluster.devices_per_node}"
            f" {plan.cluster.device.name}, ZeRO {engine.zero_stage}, {engine.precision}, "
            f"micro-batch {layout.micro_batch_samples}{groups}"
        )
    return "\n".join(lines)


def _timeline(plan: Plan, full: bool) -> str:
    timed = plan.cluster is not None
    head = f"{'batch':>11}{'steps':>18}{'tokens':>9}{'lr at begin':>13}"
    lines = [
        head + (f"{'s/step':>9}{'idle':>6}{'time':>8}{'share':>7}" if timed else f"{'share':>8}")
    ]
    for group in _grouped(plan.stages, None if full else _ROWS):
        first, last = group[0], group[-1]
        batch = f"{first.batch_samples}"
        if first is not last:
            batch += f"-{last.batch_samples}"
        span = f"{first.begin.step + 1}-{last.end.step}"
        line = f"{batch:>11}{span:>18}{human_count(last.end.tokens):>9}{first.first_rate:>13.4e}"
        steps = sum(stage.steps for stage in group)
        if timed:
            seconds = sum(stage.seconds for stage in group)
            idle = sum(stage.idle_share * stage.steps for stage in group) / steps
            line += (
                f"{seconds / steps:>9.3g}{idle:>6.0%}{human_seconds(seconds):>8}"
                f"{seconds / plan.seconds:>7.1%}"
            )
        else:
            tokens = last.end.tokens - first.begin.tokens
            line += f"{tokens / plan.stages[-1].end.tokens:>8.1%}"
        lines.append(line)
    applied, logged = plan.recipe.learning_rate_at(plan.recipe.total_steps)
    lines.append(f"The last update applies {applied:.4e}; after it the rate is {logged:.4e}.")
    return "\n".join(lines)


def _grouped(stages: list[PlannedStage], rows: int | None) -> Iterator[list[PlannedStage]]:
    """Stages side by side in as many rows: the first and the last alone."""
    if rows is None or len(stages) <= rows:
        yield from ([stage] for stage in stages)
        return
    cuts = [0, *(1 + round(i * (len(stages) - 2) / (rows - 2)) for i in range(rows - 1))]
    for begin, end in pairwise([*cuts, len(stages)]):
        yield stages[begin:end]


def _answers(plan: Plan, questions: list[str]) -> str:
    lines = [f"{'at':<22}{'step':>9}{'samples':>14}{'tokens':>18}{'batch':>7}{'lr applied':>13}"
             f"{'lr logged':>13}"]  # fmt: skip
    for question in questions:
        found = plan.at(question)
        lines.append(
            f"{question:<22}{found['step']:>9,}{found['samples']:>14,}{found['tokens']:>18,}"
            f"{found['batch_samples']:>7}{found['lr_applied']:>13.6e}{found['lr_logged']:>13.6e}"
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    total, available = plan.rank_bytes, plan.available_bytes
    lines = ["Memory of the fullest rank"]
    lines += [f"  {name:<24}{human_bytes(size):>10}" for name, size in plan.memory.items()]
    lines.append(f"  {'in all':<24}{human_bytes(total):>10} of {human_bytes(available)}")
    if plan.layout.offload:
        host = sum(host_memory(plan.shape, plan.layout).values())
        lines.append(f"  {'and on the host':<24}{human_bytes(host):>10} a rank (engine.offload)")
    if plan.fits:
        lines.append(f"  largest micro-batch that fits: {plan.largest_micro_batch()} samples")
        return "\n".join(lines)
    largest = max(plan.memory, key=lambda name: plan.memory[name])
    lines.append(
        f"  DOES NOT FIT, because {human_bytes(total)} exceed {human_bytes(available)}; "
        f"the largest part is {largest}, {human_bytes(plan.memory[largest])}"
    )
    ways = list(plan.ways_to_fit())
    shortest = min(ways, key=lambda way: way.count("=") + way.count("--"), default="")
    cure = shortest or "none of the engine's settings here: take more or larger devices"
    lines.append(f"  would with {cure}")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    assert plan.cluster is not None
    last, first, cost, bill = plan.stages[-1], plan.stages[0], plan.final_cost, plan.bill()
    lines = [
        f"Time and cost (nothing is taken to overlap: {plan.cluster.name}'s worst case)",
        f"  step of {last.batch_samples} samples: {cost.seconds:.4g} s = {cost.compute:.4g} "
        f"computing + {cost.optimizer:.3g} optimizer + {cost.zero_communication:.4g} ZeRO's "
        f"communication" + (f" + {cost.sync_communication:.4g} {plan.layout.sync.method}"
                            if plan.layout.replicas > 1 else ""),
        f"  speed of a device: {plan.device_tflops(last):.3g} TFLOPs; with the first batch of "
        f"{first.batch_samples}: {plan.device_tflops(first):.3g}",
        f"  whole run: {human_seconds(plan.seconds)}, "
        f"{human_count(bill['device_hours'])} device hours"
        + (f", {bill['energy_mwh']:.4g} MWh" if "energy_mwh" in bill else "")
        + (f", {bill['carbon_tonnes']:.3g} t CO2eq" if "carbon_tonnes" in bill else "")
        + (f", {bill['price']:,.0f} {plan.cluster.price.currency}" if "price" in bill else ""),
    ]  # fmt: skip
    return "\n".join(lines)


def _sync(plan: Plan) -> str:
    """What each way of keeping nodes together would send and cost."""
    assert plan.cluster is not None
    per_node = plan.cluster.devices_per_node
    shards = plan.layout.shards if plan.layout.replicas > 1 else per_node
    if plan.cluster.devices == shards:
        return ""
    lines = [
        f"Between replicas of {shards} ranks, by method",
        f"  {'method':<18}{'sent a step':>13}{'sync s':>9}{'step s':>9}{'days':>8}{'fits':>6}",
    ]
    for text in _METHODS:
        other = plan.with_replicas(shards, parse_sync(text))
        lines.append(
            f"  {text:<18}{human_bytes(other.sent_bytes):>13}"
            f"{other.final_cost.sync_communication:>9.3g}{other.final_cost.seconds:>9.4g}"
            f"{other.seconds / 86400:>8.1f}{'yes' if other.fits else 'no':>6}"
        )
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    lines = [*_ramp_advice(plan), *_checkpoint_advice(plan)]
    return "\n".join(["Advice", *(f"  {line}" for line in lines)]) if lines else ""


def _ramp_advice(plan: Plan) -> Iterator[str]:
    """Ranks that wait for others, and what a slow begin costs."""
    ranks, last = plan.layout.ranks, plan.stages[-1]
    if uneven := plan.uneven_stages():
        worst = max(uneven, key=lambda stage: stage.idle_share)
        wasted = sum(stage.seconds * stage.idle_share for stage in uneven)
        batches = ", ".join(str(stage.batch_samples) for stage in uneven[:8])
        yield (
            f"{len(uneven)} of {len(plan.stages)} batches cannot be shared evenly by {ranks} ranks:"
        )
        yield f"{batches}{', ...' if len(uneven) > 8 else ''}. Ranks wait for others"
        yield (
            f"{wasted / plan.seconds:.1%} of the run ({human_count(wasted / 3600 * ranks)} device "
            f"hours), most at batch {worst.batch_samples}: {worst.idle_share:.0%}."
        )
        yield from _better_batch(plan)
    ramp = plan.stages[:-1]
    if ramp:
        seconds = sum(stage.seconds for stage in ramp)
        at_full_speed = last.begin.tokens / last.batch_samples / plan.length * last.step_seconds
        yield (
            f"The {human_count(last.begin.tokens)} tokens before the last batch take "
            f"{human_seconds(seconds)};"
        )
        yield (
            f"at its speed they would take {human_seconds(at_full_speed)}, so a slow begin costs "
            f"{human_count((seconds - at_full_speed) / 3600 * ranks)} device hours."
        )


def _checkpoint_advice(plan: Plan) -> Iterator[str]:
    """How often to save (Young/Daly)."""
    if saves := plan.checkpoint_advice():
        yield (
            f"A failure every {human_seconds(saves['seconds_between_failures'])}, a checkpoint of "
            f"{human_bytes(saves['checkpoint_bytes'])} in {human_seconds(saves['save_seconds'])}:"
        )
        yield (
            f"save every {human_seconds(saves['interval_seconds'])}, {saves['interval_steps']} "
            f"steps of the last batch (the config: {plan.config.checkpoint.every})."
        )
        yield f"Failures and saves then take {saves['lost_share']:.1%} of the time (Young/Daly)."


def _better_batch(plan: Plan) -> Iterator[str]:
    ranks, final = plan.layout.ranks, plan.stages[-1].batch_samples
    if final % ranks and final > ranks:
        below = final // ranks * ranks
        yield f"A last batch of {below} or {below + ranks} would be even."


def _published(plan: Plan) -> str:
    published = plan.config.published
    assert published is not None
    rows = [
        ("memory of a rank", human_bytes(plan.rank_bytes), human_bytes(int(published.rank_memory))),
        ("step, seconds", f"{plan.final_cost.seconds:.4g}", f"{published.step_seconds:.4g}"),
        ("TFLOPs a device", f"{plan.device_tflops(plan.stages[-1]):.3g}",
         f"{published.device_tflops:.3g}"),
    ]  # fmt: skip
    lines = [f"Beside a published run ({published.source})", f"  {'':<20}{'here':>10}{'there':>10}"]
    lines += [f"  {name:<20}{here:>10}{there:>10}" for name, here, there in rows]
    stage = plan.config.engine.zero_stage
    gathers = ", which gathers every weight in each pass" if stage == 3 else ""
    lines.append(f"  there: {published.layout}")
    lines.append(f"  here: ZeRO {stage} over {plan.layout.shards} ranks{gathers}")
    return "\n".join(lines)
