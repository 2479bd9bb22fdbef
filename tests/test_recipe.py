"""The recipe against the published BLOOM rows, a walk step by step, and its own inverses."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batches import linear_ramp
from pretrain.config_file import load
from pretrain.curves import Anneal, Warmup
from pretrain.recipe import Clock
from pretrain.sizes import hardware_flops_per_token, parameters

AS_RUN = "configs/bloom-176b-as-run.toml"
FROM_16 = "configs/bloom-176b.toml"

# step; its batch; samples after it; rate after it as BLOOM logs it. Computed from the published
# formulas of Megatron-DeepSpeed; the logs agree in all digits they print.
PUBLISHED = [
    (AS_RUN, 1, 192, 192, "6.291472106e-08"),
    (AS_RUN, 910, 224, 183_312, "6.000000000e-05"),
    (AS_RUN, 12_659, 2048, 9_767_856, "5.969400893e-05"),
    (AS_RUN, 95_281, 2048, 178_977_712, "7.461409102e-06"),
    (FROM_16, 1, 16, 16, "5.242893422e-09"),
    (FROM_16, 7_820, 48, 183_120, "6.000000000e-05"),
    (FROM_16, 26_077, 2048, 9_768_928, "5.969394061e-05"),
    (FROM_16, 95_281, 2048, 151_498_720, "1.347700676e-05"),
]
# step, samples and rate as printed in the public training log
LOGGED = [(12_695, 9_841_584, "5.969e-05"), (42_780, 71_455_664, "4.475e-05"),
          (94_768, 177_927_088, "7.610e-06")]  # fmt: skip


@pytest.mark.parametrize(("path", "step", "batch", "samples", "rate"), PUBLISHED)
def test_published_rows_to_the_digit(path, step, batch, samples, rate):
    recipe = load(path).build_recipe()
    before, after = recipe.clock_at(step=step - 1), recipe.clock_at(step=step)
    plan = recipe.at(before)
    assert plan.batch_samples == batch
    assert after == recipe.after(before, plan) == Clock(step, samples, samples * 2048)
    assert f"{recipe.learning_rate_at(step)[1]:.9e}" == rate


@pytest.mark.parametrize(("step", "samples", "rate"), LOGGED)
def test_rows_of_the_public_log(step, samples, rate):
    recipe = load(AS_RUN).build_recipe()
    assert recipe.clock_at(step=step).samples == samples
    assert f"{recipe.learning_rate_at(step)[1]:.3e}" == rate


@pytest.mark.parametrize(("path", "steps"), [(AS_RUN, 115_311), (FROM_16, 128_728)])
def test_total_steps_of_220_million_samples(path, steps):
    recipe = load(path).build_recipe()
    assert recipe.total_steps == steps
    end = recipe.clock_at(step=steps)
    assert recipe.done(end)
    assert not recipe.done(recipe.clock_at(step=steps - 1))
    assert 0 <= recipe.train_samples - end.samples < 2048  # the partial last batch is dropped


# Of the public scripts by Megatron's arithmetic: parameters, steps, FLOPs a token, last batch.
MODELS = [
    ("560m", 559_214_592, 868_457, 4.762632e9, 256),
    ("1b1", 1_065_314_304, 866_753, 8.955888e9, 256),
    ("1b7", 1_722_408_960, 441_356, 1.435710e10, 512),
    ("3b", 3_002_557_440, 442_197, 2.524447e10, 512),
    ("7b1", 7_069_016_064, 442_197, 5.851054e10, 512),
    ("176b", 176_247_271_424, 128_728, 1.435563e12, 2048),
    ("176b-as-run", 176_247_271_424, 115_311, 1.435563e12, 2048),
]


@pytest.mark.parametrize(("name", "count", "steps", "flops", "batch"), MODELS)
def test_all_bloom_recipes_ship(name, count, steps, flops, batch):
    config = load(f"configs/bloom-{name}.toml")
    recipe = config.build_recipe()
    assert parameters(config.model) == count
    assert recipe.total_steps == steps
    assert recipe.batch.final == batch
    # theirs always counts the recomputation of activations
    found = hardware_flops_per_token(config.model, 2048, activation_checkpointing=True)
    assert found == pytest.approx(flops, rel=1e-6)
    peak = recipe.learning_rate_at(recipe.clock_at(samples=183_105).step)[1]
    assert peak == pytest.approx(config.recipe.learning_rate.peak, rel=2e-3)
    assert config.model.dropout == 0.1


def test_first_update_has_rate_zero_and_each_update_the_rate_before_it():
    recipe = load(AS_RUN).build_recipe()
    assert recipe.at(Clock()).learning_rate == 0.0
    second = recipe.after(Clock(), recipe.at(Clock()))
    assert recipe.at(second).learning_rate == recipe.learning_rate_at(1)[1] > 0
    assert recipe.learning_rate_at(2)[0] == recipe.learning_rate_at(1)[1]


def test_ramp_by_samples_as_run():
    # facts of the 192 + 16 ramp: samples consumed before a step -> its batch
    ramp = linear_ramp(192, 2048, 16, 9_765_625)
    expected = {0: 192, 84_186: 192, 84_187: 208, 10**6: 368, 5 * 10**6: 1136, 9_765_625: 2048}
    assert {samples: ramp(samples) for samples in expected} == expected


def test_warmup_boundary_and_floor():
    rate = Warmup(6e-5, 183_105, Anneal(183_105, 200_000_000, 6e-5, 6e-6))
    assert rate(183_105) == 6e-5
    assert rate(183_106) < 6e-5
    assert rate(200_000_000) == pytest.approx(6e-6, rel=1e-12)
    assert rate(200_000_001) == rate(10**12) == 6e-6
    middle = (183_105 + 200_000_000) / 2
    assert rate(middle) == pytest.approx((6e-5 + 6e-6) / 2, rel=1e-12)
    assert math.isclose(rate(91_552.5), 3e-5)


ramps = st.builds(
    lambda start, increment, count, ramp: linear_ramp(
        start, start + increment * count, increment, ramp
    ),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(0, 40),
    st.integers(1, 50_000),
)


@given(ramps)
@settings(max_examples=60, deadline=None)
def test_closed_form_equals_the_walk(ramp):
    samples = 0
    for step in range(400):
        assert ramp.samples_at(step) == samples
        assert ramp.step_at(samples) == step
        batch = ramp(samples)
        assert ramp.step_at(samples + batch - 1) == step
        assert batch <= ramp.final
        samples += batch


@given(ramps, st.integers(0, 10**13))
@settings(deadline=None)
def test_step_and_samples_are_inverse(ramp, samples):
    step = ramp.step_at(samples)
    assert ramp.samples_at(step) <= samples < ramp.samples_at(step + 1)


def test_conversions_bisect_one_row_a_batch_size():
    ramp = load(FROM_16).build_recipe().batch
    assert len(ramp.stages) == 128  # not one a step
    assert [batch for _, _, batch in ramp.stages] == list(range(16, 2049, 16))
