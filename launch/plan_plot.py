"""The picture of a plan: learning rate and batch over tokens and, with a cluster, over time."""

from pathlib import Path
from typing import Any

from launch.plan import Plan
from pretrain.quantities import human_count

_POINTS = 600


def plot(plan: Plan, path: Path) -> None:
    """Draw it to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    clocks = [plan.recipe.clock_at(step=step) for step in _steps(plan)]
    rates = [plan.recipe.at(clock).learning_rate for clock in clocks]
    axes_of_time = [([clock.tokens for clock in clocks], "tokens", human_count)]
    edges = [(stage.begin.tokens, stage.batch_samples) for stage in plan.stages]
    edges_of_time = [[*edges, (plan.stages[-1].end.tokens, edges[-1][1])]]
    if plan.cluster is not None:
        days, stage_days = _days(plan, clocks)
        axes_of_time.append((days, "days", lambda value: f"{value:.3g}"))
        edges_of_time.append(
            [*zip(stage_days, [b for _, b in edges], strict=False), (stage_days[-1], edges[-1][1])]
        )
    columns = len(axes_of_time)
    figure, grid = plt.subplots(
        2, columns, figsize=(5.5 * columns, 5.5), sharex="col", sharey="row", squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for column, (where, label, form) in enumerate(axes_of_time):
        rate, batch = grid[0][column], grid[1][column]
        rate.plot(where, rates, color="#1f4e79")
        begins, batches = zip(*edges_of_time[column], strict=True)
        batch.step(begins, batches, where="post", color="#c0504d")
        batch.fill_between(begins, batches, step="post", alpha=0.15, color="#c0504d")
        batch.set_xlabel(label)
        batch.xaxis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
        for axes in (rate, batch):
            axes.grid(alpha=0.3)
            axes.set_xlim(0, where[-1])
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("learning rate")
    grid[1][0].set_ylabel("batch (samples)")
    on = f" on {plan.cluster.devices} x {plan.cluster.device.name}" if plan.cluster else ""
    figure.suptitle(
        f"{plan.config.name}{on}: {plan.recipe.total_steps:,} steps, "
        f"{human_count(plan.stages[-1].end.tokens)} tokens"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _steps(plan: Plan) -> list[int]:
    """Steps evenly over the tokens of the run, and more of them at its begin."""
    total = plan.recipe.total_samples
    samples = {round(total * i / _POINTS) for i in range(_POINTS + 1)}
    samples |= {round(total * (i / _POINTS) ** 3) for i in range(_POINTS + 1)}
    return sorted({plan.recipe.batch.step_at(count) for count in samples})


def _days(plan: Plan, clocks: list[Any]) -> tuple[list[float], list[float]]:
    """Days until each of `clocks`, and until the begin of each stage and the end of the run."""
    edges, passed = [0.0], 0.0
    for stage in plan.stages:
        passed += stage.seconds / 86400
        edges.append(passed)
    days, row = [], 0
    for clock in clocks:
        while clock.step > plan.stages[row].end.step:
            row += 1
        stage = plan.stages[row]
        share = (clock.step - stage.begin.step) / stage.steps
        days.append(edges[row] + share * (edges[row + 1] - edges[row]))
    return days, edges
