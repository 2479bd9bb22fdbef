"""Curves against torch's schedulers, closed forms, and the shapes of a config that build them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torch_lr

from pretrain.config_file import load
from pretrain.curves import FORMS, Anneal, Cyclic, Restarts
from pretrain.errors import ConfigError
from pretrain.quantities import Horizon
from tests.tiny import write_config

BATCH, STEPS, LENGTH = 8, 120, 16
CONFIG = "configs/demo.toml"


def recipe_of(rate, *overrides, batch=BATCH):
    """The recipe of the demo with a learning rate (a TOML table) and a constant batch."""
    fixed = [f"data.sequence_length={LENGTH}", f"recipe.batch={{final={batch}}}",
             f'recipe.train="{STEPS} steps"']  # fmt: skip
    return load(CONFIG, [*fixed, f"recipe.learning_rate={rate}", *overrides]).build_recipe()


def plans(recipe):
    clock = recipe.clock_at(step=0)
    for _ in range(STEPS):
        plan = recipe.at(clock)
        yield plan
        clock = recipe.after(clock, plan)


def torch_rates(make, peak=1.0, **options):
    """Rates and settings that a scheduler of torch gives to STEPS updates."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak, **options)
    scheduler = make(optimizer)
    for _ in range(STEPS):
        yield {**optimizer.param_groups[0]}
        optimizer.step()
        scheduler.step()


PARITY = {
    "constant": ("{shape='constant',peak=0.5}",
                 lambda o: torch_lr.ConstantLR(o, factor=0.5, total_iters=10**9)),
    "linear": ("{shape='linear',peak=1.0,floor=0.25,decay='50 steps'}",
               lambda o: torch_lr.LinearLR(o, 1.0, 0.25, 50)),
    "step": ("{shape='step',peak=1.0,factor=0.3,every='17 steps'}",
             lambda o: torch_lr.StepLR(o, 17, 0.3)),
    "multi-step": ("{shape='multi-step',peak=1.0,factor=0.1,milestones=['9 steps','40 steps',"
                   "'90 steps']}", lambda o: torch_lr.MultiStepLR(o, [9, 40, 90], 0.1)),
    "exponential": ("{shape='exponential',peak=1.0,factor=0.97,every='1 steps'}",
                    lambda o: torch_lr.ExponentialLR(o, 0.97)),
    "cosine": ("{shape='cosine',peak=1.0,floor=0.1,decay='120 steps'}",
               lambda o: torch_lr.CosineAnnealingLR(o, 120, 0.1)),
    "cosine-restarts": ("{shape='cosine-restarts',peak=1.0,floor=0.0,cycles=7}",
                        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, math.ceil(STEPS / 7))),
    "triangular": ("{shape='cyclic',peak=1.0,floor=0.1,rise='10 steps',fall='15 steps'}",
                   lambda o: torch_lr.CyclicLR(o, 0.1, 1.0, 10, 15, cycle_momentum=False)),
    "triangular2": ("{shape='cyclic',peak=1.0,floor=0.1,rise='10 steps',mode='triangular2'}",
                    lambda o: torch_lr.CyclicLR(o, 0.1, 1.0, 10, mode="triangular2",
                                                cycle_momentum=False)),
    "exp_range": (f"{{shape='cyclic',peak=1.0,floor=0.1,rise='10 steps',mode='exp_range',"
                  f"factor={0.98**20!r}}}",
                  lambda o: torch_lr.CyclicLR(o, 0.1, 1.0, 10, mode="exp_range", gamma=0.98,
                                              cycle_momentum=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARITY)
def test_torchs_schedulers(name):
    rate, make = PARITY[name]
    ours = [plan.learning_rate for plan in plans(recipe_of(rate))]
    theirs = [group["lr"] for group in torch_rates(make)]
    assert ours == pytest.approx(theirs, abs=1e-12, rel=0)
    assert len(set(ours)) > 1 or name == "constant"


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_one_cycle_is_torchs_with_beta2_left_alone(form, three_phase):
    # torch counts the update before the peak and before the end as the last of its phase
    rate = (f"{{shape='one-cycle',peak=1.0,rise='{0.3 * STEPS - 1:.0f} steps',"
            f"decay='{STEPS - 1} steps',form='{form}',"
            f"three_phase={str(three_phase).lower()}}}")  # fmt: skip

    def make(optimizer):
        return torch_lr.OneCycleLR(
            optimizer, 1.0, total_steps=STEPS, pct_start=0.3, three_phase=three_phase,
            anneal_strategy="cos" if form == "cosine" else form,
        )  # fmt: skip

    ours = list(plans(recipe_of(rate)))
    theirs = list(torch_rates(make, betas=(0.9, 0.95)))
    assert [p.learning_rate for p in ours] == pytest.approx([g["lr"] for g in theirs], abs=1e-12)
    betas = [p.betas for p in ours]
    assert [b[0] for b in betas] == pytest.approx([g["betas"][0] for g in theirs], abs=1e-12)
    assert min(b[0] for b in betas) == pytest.approx(0.85)
    assert max(b[0] for b in betas) == 0.95
    assert {b[1] for b in betas} == {0.95}
    kept = recipe_of(rate[:-1] + ",cycle_momentum=false}")
    assert {p.betas for p in plans(kept)} == {(0.9, 0.95)}


def samples_of(step):
    return step * BATCH


@pytest.mark.parametrize("form", ["linear", "sqrt"])
def test_warmup_stable_decay(form):
    """The rules of OLMo-core (linear) and of arXiv 2405.18392 (1 - sqrt), written out."""
    ours = recipe_of(f"{{shape='wsd',peak=2.0,floor=0.2,warmup='10 steps',cooldown='24 steps',"
                     f"cooldown_form='{form}'}}")  # fmt: skip

    def expected(step):
        if step <= 10:
            return 2.0 * step / 10
        if step <= STEPS - 24:
            return 2.0
        left = (STEPS - step) / 24 if form == "linear" else 1 - math.sqrt((step - 96) / 24)
        return 0.2 + 1.8 * left

    got = [plan.learning_rate for plan in plans(ours)]
    assert got == pytest.approx([expected(step) for step in range(STEPS)], abs=1e-12)


def test_inverse_square_root_and_power():
    got = recipe_of("{shape='inverse-sqrt',peak=1.0,floor=0.1,warmup='16 steps'}").learning_rate
    for step in (0, 3, 16, 17, 64, 119):
        expected = step / 16 if step <= 16 else 0.1 + 0.9 * math.sqrt(16 / step)
        assert got(samples_of(step)) == pytest.approx(expected, abs=1e-12)
    # The power scheduler's rate is min(peak, a n^b), n in tokens (a includes the batch there).
    b, peak, tokens = -0.51, 0.02, 4096
    a = peak / tokens**b
    got = recipe_of(f"{{shape='power',peak={peak},timescale={tokens}}}").learning_rate
    for step in (1, 31, 32, 33, 100):
        assert got(samples_of(step)) == pytest.approx(
            min(peak, a * (samples_of(step) * LENGTH) ** b), abs=1e-12
        )
    cooled = recipe_of(f"{{shape='power',peak={peak},timescale={tokens},cooldown='20 steps',"
                       "cooldown_form='linear'}").learning_rate  # fmt: skip
    assert cooled(samples_of(100)) == got(samples_of(100))
    assert cooled(samples_of(110)) == pytest.approx(got(samples_of(100)) / 2)
    assert cooled(samples_of(120)) == 0


@pytest.mark.parametrize("name", PARITY)
def test_warm_up_comes_before_any_shape(name):
    rate, _ = PARITY[name]
    plain = recipe_of(rate).learning_rate
    warm = recipe_of(f"{rate[:-1]},warmup='5 steps'}}").learning_rate
    reached = warm(samples_of(5))
    assert [warm(samples_of(step)) for step in range(6)] == pytest.approx(
        [reached * step / 5 for step in range(6)]
    )
    assert reached == plain(0)


def test_snapshot_schedule_of_the_paper():
    """alpha0 / 2 (cos(pi mod(t - 1, ceil(T / M)) / ceil(T / M)) + 1) for t = 1, 2, ..."""
    cycle = math.ceil(STEPS / 7)
    got = recipe_of("{shape='cosine-restarts',peak=0.2,cycles=7}")
    expected = [0.1 * (math.cos(math.pi * ((t - 1) % cycle) / cycle) + 1)
                for t in range(1, STEPS + 1)]  # fmt: skip
    assert [p.learning_rate for p in plans(got)] == pytest.approx(expected, abs=1e-15)


def test_cycles_are_counted_from_the_end_of_the_warm_up():
    for shape in ("{shape='cosine-restarts',peak=1.0,cycles=5,decay='105 steps',warmup='5 steps'}",
                  "{shape='cyclic',peak=1.0,floor=0.0,rise='4 steps',fall='16 steps',"
                  "warmup='5 steps'}"):  # fmt: skip
        curve = recipe_of(shape).learning_rate
        top = 5 if "restarts" in shape else 9
        assert curve(samples_of(top)) == curve(samples_of(top + 20)) == 1.0
        assert curve(samples_of(top + 10)) == pytest.approx(0.5 if top == 5 else 6 / 16)


def test_horizons_of_any_unit_are_the_same_curve():
    epoch = 40 * BATCH * LENGTH
    units = {"steps": 80, "samples": 80 * BATCH, "tokens": 80 * BATCH * LENGTH, "epochs": 2}
    rates = {
        unit: recipe_of(f"{{peak=1.0,decay='{value} {unit}'}}", f"data.epoch_tokens={epoch}")
        for unit, value in units.items()
    }
    curves = {unit: tuple(p.learning_rate for p in plans(recipe)) for unit, recipe in rates.items()}
    assert len(set(curves.values())) == 1


def test_an_epoch_is_counted_in_the_shards(tmp_path):
    path = write_config(tmp_path, data__validation_fraction=0.25)
    tokens = sum(f.stat().st_size // 2 for f in tmp_path.glob("*.bin"))
    config = load(path, ['recipe.train="3 epochs"', "recipe.learning_rate.decay=3 epochs"])
    recipe = config.build_recipe()
    assert recipe.train_samples == 3 * round(0.75 * tokens) // config.data.sequence_length
    next(tmp_path.glob("*.idx")).unlink()
    with pytest.raises(ConfigError, match=r"data\.epoch_tokens"):
        load(path, ['recipe.train="3 epochs"'])


def test_steps_in_a_ramp_are_steps_of_that_ramp():
    config = load(CONFIG, ['recipe.learning_rate.warmup="20 steps"'])
    recipe = config.build_recipe()
    assert recipe.batch(0) < recipe.batch.final
    peak = config.recipe.learning_rate.peak
    assert recipe.at(recipe.clock_at(step=20)).learning_rate == peak
    assert recipe.at(recipe.clock_at(step=19)).learning_rate < peak
    assert str(Horizon.parse("2 epochs")) == "2 epochs"


def test_weight_decay_momentum_and_clip_change_too():
    recipe = recipe_of("{shape='constant',peak=1.0}", "recipe.weight_decay={to=0.3}",
                       "recipe.momentum={to=0.8,begins='40 steps',ends='80 steps',form='cosine'}",
                       "recipe.clip_norm={to=0.5,ends='60 steps'}")  # fmt: skip
    at = [recipe.at(recipe.clock_at(step=step)) for step in (0, 60, 119)]
    assert [p.weight_decay for p in at] == pytest.approx([0.1, 0.2, 0.1 + 0.2 * 119 / 120])
    assert [p.betas[0] for p in at] == pytest.approx([0.9, 0.85, 0.8])
    assert [p.betas[1] for p in at] == [0.95] * 3
    assert [p.clip_norm for p in at] == pytest.approx([1.0, 0.5, 0.5])


positive = st.floats(1, 1e12)


@given(positive, positive, st.sampled_from(sorted(FORMS)), st.floats(0, 2))
@settings(deadline=None)
def test_anneals_fall_from_first_to_last(begin, length, form, progress):
    curve = Anneal(begin, begin + length, 3.0, 0.5, form)
    assert curve(begin) == curve(0) == 3.0
    assert curve(begin + length * 1.01) == 0.5
    here, later = curve(begin + length * progress), curve(begin + length * (progress + 0.01))
    assert 0.5 <= later <= here + 1e-12 <= 3.0 + 1e-12


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 10**12))
@settings(deadline=None)
def test_cycles_repeat(rise, fall, samples):
    period = rise + fall
    for curve in (Cyclic(0.1, 1.0, 0, rise, fall), Restarts(1.0, 0.1, 0, period)):
        assert curve(samples) == curve(samples + period)
        assert 0.1 <= curve(samples) <= 1.0
    halved = Cyclic(0.1, 1.0, 0, rise, fall, "triangular2")
    assert halved(rise + period) == pytest.approx(0.1 + 0.9 / 2)
