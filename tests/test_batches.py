"""Batch schedules, what they mean in the place of rate drops, and scaling rules."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batches import BatchSchedule, held, linear_ramp, linear_ramp_in_steps
from pretrain.config_file import load
from pretrain.data.loader import Loader
from pretrain.engine.world import rows_of_rank
from pretrain.recipe import Clock

CONFIG = "configs/demo.toml"
LENGTH = 128


def recipe_of(batch, *overrides):
    return load(CONFIG, [f"recipe.batch={batch}", *overrides]).build_recipe()


def walk(recipe):
    """Clock before, plan, and clock after each step of a run."""
    clock = Clock()
    while not recipe.done(clock):
        plan = recipe.at(clock)
        after = recipe.after(clock, plan)
        yield clock, plan, after
        clock = after


# --- schedules -----------------------------------------------------------------------------------


def test_table_with_thresholds_of_any_unit():
    recipe = recipe_of(
        "{schedule='table',stages=[{begins=0,samples=4},{begins='5 steps',samples=6},"
        "{begins='50 samples',samples=3},{begins='12_800 tokens',samples=8}]}"
    )
    batches = [plan.batch_samples for _, plan, _ in walk(recipe)]
    # 5 x 4 = 20 samples; 6 until 50; 3 until 100 (12,800 tokens); then 8
    assert batches[:5] == [4] * 5
    assert batches[5:10] == [6] * 5
    assert batches[10:27] == [3] * 17  # 50 + 17 x 3 = 101
    assert set(batches[27:]) == {8}


def test_list_holds_each_batch_for_steps_or_samples():
    in_steps = recipe_of("{schedule='list',samples=[2,4,8],hold='3 steps'}")
    assert [p.batch_samples for _, p, _ in walk(in_steps)][:8] == [2, 2, 2, 4, 4, 4, 8, 8]
    each = recipe_of("{schedule='list',samples=[2,5,8]}")
    assert [p.batch_samples for _, p, _ in walk(each)][:4] == [2, 5, 8, 8]
    in_samples = recipe_of("{schedule='list',samples=[2,4,8],hold='8 samples'}")
    assert [p.batch_samples for _, p, _ in walk(in_samples)][:7] == [2, 2, 2, 2, 4, 4, 8]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_a_ramp_in_steps_is_the_shortest_that_takes_them(start, increment, count, steps):
    ramp = linear_ramp_in_steps(start, start + increment * count, increment, steps)
    length = ramp.edges[-1][0]
    assert ramp.stages[-1][0] >= steps
    shorter = linear_ramp(start, start + increment * count, increment, length - 1)
    assert shorter.stages[-1][0] < steps


def test_a_large_batch_may_step_over_a_row():
    schedule = BatchSchedule(((0, 100), (10, 7), (50, 9), (150, 3)))
    assert schedule.stages == [(0, 0, 100), (1, 100, 9), (7, 154, 3)]
    assert [schedule(n) for n in (0, 9, 10, 49, 50, 149, 150)] == [100, 100, 7, 7, 9, 9, 3]


schedules = st.one_of(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 60)), min_size=1, max_size=12).map(
        lambda rows: BatchSchedule(
            tuple(
                zip(
                    [0, *sorted(edge for edge, _ in rows[1:])],
                    [batch for _, batch in rows],
                    strict=True,
                )
            )
        )
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=9).map(lambda b: held(b, None, 4)),
    st.builds(lambda s, i, n, r: linear_ramp(s, s + i * n, i, r), st.integers(1, 30),
              st.integers(1, 9), st.integers(0, 30), st.integers(1, 5000)),
)  # fmt: skip


@given(schedules, st.integers(200, 20_000))
@settings(max_examples=150, deadline=None)
def test_inverses_agree_and_batches_sum_to_the_budget(schedule, budget):
    recipe = load(CONFIG).build_recipe()
    recipe = dataclasses.replace(recipe, batch=schedule, train_samples=budget)
    total, count = 0, 0
    for before, plan, after in walk(recipe):
        assert before == recipe.clock_at(step=count)
        assert recipe.clock_at(samples=before.samples) == before
        assert recipe.clock_at(tokens=after.tokens - 1) == before
        assert plan.batch_samples == schedule(before.samples)
        total, count = total + plan.batch_samples, count + 1
    assert count == recipe.total_steps
    assert total == recipe.total_samples
    # the budget, but for a last batch that does not fit
    assert 0 <= budget - total < schedule(total)
    assert sum(steps * batch for _, steps, batch in recipe.stages) == total
    assert all(steps > 0 for _, steps, _ in recipe.stages)


@given(schedules, st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_ranks_share_any_batch_and_none_differs_between_world_sizes(schedule, size):
    """What the ranks of a world read, put together, is the same slice of the sample axis."""

    @dataclasses.dataclass
    class Place:
        rank: int
        size: int

    recipe = dataclasses.replace(load(CONFIG).build_recipe(), batch=schedule)
    for before, plan, _ in list(walk(recipe))[:6]:
        shares = [rows_of_rank(plan.batch_samples, Place(r, size)) for r in range(size)]
        assert shares[0][0] == 0
        assert shares[-1][1] == plan.batch_samples == schedule(before.samples)
        assert [end for _, end in shares[:-1]] == [first for first, _ in shares[1:]]
        assert max(e - f for f, e in shares) - min(e - f for f, e in shares) <= 1


def test_the_loader_reads_the_slice_of_each_step():
    class Axis:
        def batch(self, first, count):
            return np.arange(first, first + count)

    recipe = recipe_of("{schedule='list',samples=[3,5,2,8],hold='2 steps'}")
    loaders = [Loader(Axis(), recipe, lambda b, r=r: (b * r // 3, b * (r + 1) // 3))
               for r in range(3)]  # fmt: skip
    for before, plan, after in list(walk(recipe))[:9]:
        rows = [row for loader in loaders for row in loader.batch(before, plan).tolist()]
        assert rows == list(range(before.samples, after.samples))


# --- a batch that grows in place of the rate's drops ---------------------------------------------

STEP = "recipe.learning_rate={shape='step',peak=1.0,factor=0.5,every='100 samples'}"


def test_the_batch_doubles_where_the_rate_would_halve():
    recipe = recipe_of("{schedule='instead-of-decay',start=4,largest=16}", STEP)
    assert recipe.batch.edges == ((0, 4), (100, 8), (200, 16))
    for samples, batch, rate in [(0, 4, 1), (99, 4, 1), (100, 8, 1), (250, 16, 1), (300, 16, 0.5),
                                 (400, 16, 0.25)]:  # fmt: skip
        plan = recipe.at(Clock(0, samples, 0))
        assert (plan.batch_samples, plan.learning_rate) == (batch, rate)


@given(st.integers(1, 64), st.floats(0.05, 0.95), st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_rate_over_batch_is_that_of_the_given_schedule(start, factor, largest):
    rate = f"{{shape='multi-step',peak=1.0,factor={factor!r},milestones=['9 steps','21 steps']}}"
    largest = max(start, largest)
    recipe = recipe_of(f"{{schedule='instead-of-decay',start={start},largest={largest}}}",
                       f"recipe.learning_rate={rate}", "recipe.train='100k samples'")  # fmt: skip
    for count, samples in enumerate((0, 9 * start, 21 * start)):
        plan = recipe.at(Clock(0, samples, 0))
        given_rate = factor**count
        assert plan.learning_rate / plan.batch_samples == pytest.approx(given_rate / start)
        assert plan.batch_samples <= largest
        assert plan.learning_rate >= given_rate - 1e-12
        assert plan.batch_samples == min(largest, round(start / given_rate))
    # lengths in steps are those of the given schedule, whose batch is constant
    assert recipe.batch(9 * start - 1) == start


def test_growing_batch_equals_falling_rate_on_a_noisy_quadratic():
    """Check 16: each phase ends at the loss of its noise, eps sigma^2 / (2 B (2 - eps)), whether
    the rate fell or the batch grew; with far fewer updates."""
    common = "factor=0.2,milestones=['32k samples','64k samples']"
    rate = f"recipe.learning_rate={{shape='multi-step',peak=0.5,{common}}}"
    train = "recipe.train='96k samples'"
    falling = recipe_of("{final=8}", rate, train)
    growing = recipe_of("{schedule='instead-of-decay',start=8,largest=200}", rate, train)
    updates, ends = {}, {}
    for name, recipe in (("falling", falling), ("growing", growing)):
        generator = np.random.default_rng(0)
        x, losses = np.full(4000, 3.0), {}  # 4000 runs at once, curvature 1, sigma 1
        for before, plan, after in walk(recipe):
            noise = generator.standard_normal(len(x)) / plan.batch_samples**0.5
            x -= plan.learning_rate * (x + noise)
            phase = before.samples // 32_000
            losses[phase] = float(np.mean(x**2) / 2)
            if after.samples >= 32_000 * (phase + 1):
                expected = plan.learning_rate / (2 * plan.batch_samples * (2 - plan.learning_rate))
                assert losses[phase] == pytest.approx(expected, rel=0.15)
        updates[name], ends[name] = after.step, losses
    assert updates == {"falling": 12_000, "growing": 4000 + 800 + 160}
    for phase in range(3):
        assert ends["growing"][phase] == pytest.approx(ends["falling"][phase], rel=0.35)


# --- scaling -------------------------------------------------------------------------------------


def scaled(rule, *options, batch="{final=64}"):
    section = f"recipe.scaling={{rule='{rule}',base_batch=16{''.join(f',{o}' for o in options)}}}"
    rate = "recipe.learning_rate={shape='constant',peak=1.0}"
    return recipe_of(batch, section, rate).at(Clock())


@pytest.mark.parametrize(
    ("rule", "options", "factor"),
    [
        ("none", [], 1),
        ("linear", [], 4),
        ("sqrt", [], 2),
        ("linear-then-sqrt", ["critical_batch=32"], 2 * 2**0.5),
        ("linear-then-sqrt", ["critical_batch=640"], 4),
        ("linear-then-sqrt", ["critical_batch=8"], 2),
        ("noise-scale", ["critical_batch=64"], (1 / 2) / (1 / 5)),
        ("noise-scale", ["critical_batch=64", "exponent=0.5"], 2.5**0.5),
    ],
)
def test_rules_of_scaling(rule, options, factor):
    assert scaled(rule, *options).learning_rate == pytest.approx(factor)
    at_base = scaled(rule, *options, batch="{final=16}")
    assert at_base == dataclasses.replace(scaled("none"), batch_samples=16)


def test_half_lives_in_tokens_are_kept():
    base, plan = scaled("none"), scaled("sqrt", "betas=true", "weight_decay=true")
    growth = 64 / 16
    # a token's share in the moments decays as before: beta^(1 / batch)
    for old, new in zip(base.betas, plan.betas, strict=True):
        assert new ** (1 / growth) == pytest.approx(old)
    # so does a weight under decay: rate x decay a step
    assert plan.learning_rate * plan.weight_decay == pytest.approx(
        base.learning_rate * base.weight_decay * growth
    )


def test_scaling_along_a_ramp_follows_its_batch():
    recipe = recipe_of("{start=4,increment=4,final=64,ramp='6k samples'}",
                       "recipe.learning_rate={shape='constant',peak=1.0}",
                       "recipe.train='9k samples'",
                       "recipe.scaling={rule='sqrt',base_batch=16,along_ramp=true}")  # fmt: skip
    seen = {plan.batch_samples: plan.learning_rate for _, plan, _ in walk(recipe)}
    assert seen == pytest.approx({batch: (batch / 16) ** 0.5 for batch in range(4, 65, 4)})


def test_the_noise_scale_rule_is_the_best_rate_of_a_noisy_quadratic():
    """Check 15: with B_noise = 64 the rate that lowers the expected loss most at batch B is
    1 / (1 + 64 / B), up to the grid and the noise of the measurement."""
    generator, dimensions, noise_scale = np.random.default_rng(1), 64, 64
    for batch, expected in ((8, 1 / 9), (64, 1 / 2), (512, 8 / 9)):
        gradient = np.ones(dimensions)  # curvature 1, at x = gradient; tr(sigma) / |g|^2 = 64
        noise = generator.standard_normal((4000, dimensions)) * (noise_scale / batch) ** 0.5
        rates = np.linspace(0.01, 1.2, 120)
        losses = [np.mean((gradient - rate * (gradient + noise)) ** 2) for rate in rates]
        best = rates[int(np.argmin(losses))]
        assert best == pytest.approx(expected, abs=0.02)
        options = (f"critical_batch={noise_scale}",)
        ours = scaled("noise-scale", *options, batch=f"{{final={batch}}}").learning_rate
        assert ours == pytest.approx(expected / (1 / (1 + 64 / 16)))
