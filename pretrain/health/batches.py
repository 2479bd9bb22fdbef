"""Which steps of a run leave ranks without work, over the whole ramp of its batch."""

from collections.abc import Iterator
from math import ceil

from pretrain.config import Config
from pretrain.config_recipe import GrowingBatch, RampBatch
from pretrain.config_sync import OuterSection
from pretrain.health.finding import Finding, listed
from pretrain.quantities import human_count
from pretrain.recipe import Clock

_WASTE = 0.01  # of the ranks' time in the whole run; less is not worth a word

_Stage = tuple[Clock, int, int]  # where it begins, its steps, its batch


def batch_findings(config: Config, ranks: int, uneven_too: bool = True) -> Iterator[Finding]:
    """Steps with fewer rows than ranks, and batches that cannot be dealt evenly. Neither is wrong:
    a rank without rows runs a pass of weight zero, and waits.

    With a coordinator `ranks` are those of one replica, which is a launch of its own.
    """
    if isinstance(config.sync, OuterSection) and config.sync.coordinator:
        ranks *= config.sync.replicas
    recipe, micro = config.build_recipe(), config.engine.micro_batch_samples
    few: list[_Stage] = []
    uneven: list[tuple[_Stage, int]] = []  # and how many ranks wait during the last pass
    done = wasted = 0
    for stage in recipe.stages:
        _, steps, batch = stage
        most = ceil(ceil(batch / ranks) / micro)
        waiting = ranks - batch % ranks if ceil(batch // ranks / micro) < most else 0
        done += steps * most * ranks
        if batch < ranks:
            few.append(stage)
        elif waiting:
            uneven.append((stage, waiting))
            wasted += steps * waiting
    if few:
        yield _too_few(config, few, ranks)
    if uneven_too and wasted >= _WASTE * done:
        yield _uneven(config, uneven, ranks, wasted / done)


def _too_few(config: Config, stages: list[_Stage], ranks: int) -> Finding:
    recipe, batches = config.build_recipe(), [batch for _, _, batch in stages]
    steps = sum(steps for _, steps, _ in stages)
    samples = sum(steps * batch for _, steps, batch in stages)
    idle = ranks - min(batches)
    growing = isinstance(config.recipe.batch, RampBatch | GrowingBatch)
    larger = f"recipe.batch.{'start' if growing else config.recipe.batch.schedule}"
    return Finding(
        "batches",
        "warning",
        f"{_named(batches)} for {ranks} ranks: {idle if len(stages) == 1 else f'up to {idle}'} "
        f"idle in {_span(stages)}, {steps:,} steps and "
        f"{human_count(samples * recipe.sequence_length)} tokens, "
        f"{samples / recipe.total_samples:.1%} of the run's",
        f"begin on fewer nodes (--nodes), at most {min(batches)} ranks, and go on with all from "
        f"step {stages[-1][0].step + stages[-1][1] + 1}; or let {larger} be {ranks} or more",
    )


def _uneven(config: Config, stages: list[tuple[_Stage, int]], ranks: int, share: float) -> Finding:
    micro = config.engine.micro_batch_samples
    (worst, waiting) = max(stages, key=lambda row: row[0][1] * row[1])
    return Finding(
        "batches",
        "warning",
        f"{_named([stage[2] for stage, _ in stages])} cannot be dealt evenly to {ranks} ranks in "
        f"micro-batches of {micro}: {share:.1%} of their time they wait, most at batch {worst[2]} "
        f"({_span([worst])}), which leaves {waiting} of them a pass less",
        f"batches that are multiples of {ranks * micro} (recipe.batch), or a smaller "
        "engine.micro_batch_samples",
    )


def _named(batches: list[int]) -> str:
    return f"batch {batches[0]}" if len(batches) == 1 else f"batches {listed(batches)}"


def _span(stages: list[_Stage]) -> str:
    """Steps counted from 1, as they are shown everywhere."""
    (first, *_), (last, steps, _) = stages[0], stages[-1]
    return f"steps {first.step + 1:,} to {last.step + steps:,}"
