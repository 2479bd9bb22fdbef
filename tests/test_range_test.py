"""The range test's rules, without a model: its rates, when it stops, and what it suggests."""

import math
import random

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.lab.range_test import Findings, Sweep, Trace, summary


def sweep_of(loss_at, **settings):
    """The findings of a sweep whose loss is a function of step and rate."""
    trace = Trace(Sweep(**settings))
    for step, rate in enumerate(trace.sweep.rates()):
        if trace.add(rate, loss_at(step, rate), 1.0):
            break
    return Findings(trace)


def test_rates_are_geometric_and_end_where_asked():
    rates = Sweep(1e-4, 10, 400).rates()
    assert (len(rates), rates[0], rates[-1]) == (400, 1e-4, 10)
    assert rates == pytest.approx(np.geomspace(1e-4, 10, 400).tolist(), rel=1e-12)
    assert Sweep(1e-3, 1e-1, 2).rates() == [1e-3, 1e-1]


def test_what_is_no_sweep_is_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Sweep(lowest=1, highest=1, steps=1, smoothing=1.0, batch=0)
    assert [problem.key for problem in caught.value.problems] == [
        "--highest", "--steps", "--smoothing", "--batch"]  # fmt: skip
    for bad in ({"lowest": 0}, {"lowest": math.nan}, {"highest": math.inf}, {"highest": math.nan}):
        with pytest.raises(ConfigError, match="cure"):
            Sweep(**bad)


@pytest.mark.parametrize(("dimensions", "flattest", "noise"), [(20, 0.1, 0.1), (100, 0.01, 0.3)])
def test_a_quadratic_stops_where_theory_says(dimensions, flattest, noise):
    """Gradient descent on a quadratic of curvatures up to h diverges beyond the rate 2 / h."""
    highest = 10.0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        curvatures = np.geomspace(flattest, highest, dimensions)
        weights = generator.normal(size=dimensions)

        def loss_then_step(step, rate, weights=weights, generator=generator, h=curvatures):
            loss = 0.5 * float((h * weights**2).sum())
            weights -= rate * (h * weights + noise * generator.normal(size=len(h)))
            return loss

        findings = sweep_of(loss_then_step, lowest=1e-4, highest=10, steps=400)
        assert 1.2 <= findings.trace.diverged_at * highest / 2 <= 1.8
        assert "4 times its lowest" in findings.trace.reason
        assert findings.minimal < findings.maximal < 2 / highest


def language_model(step, rate, noise=0.05):
    """ln 60000 at first, a fall of 4 nats about 1e-3, back to ln 60000 about 1: never 4 times."""
    fall = 4 / (1 + (1e-3 / rate) ** 1.5)
    lost = 4 / (1 + (1 / rate) ** 3)
    return math.log(60_000) - fall + lost + noise * random.Random(step).gauss(0, 1)


def test_a_language_model_need_not_quadruple_to_have_diverged():
    findings = sweep_of(language_model)
    assert 0.5 < findings.trace.diverged_at < 8
    assert "the average loss rose from 7" in findings.trace.reason
    # What the curve without noise and averaging says: a share s of the fall is made at
    # 1e-3 * (s / (1 - s))^(2/3). An average that is not moved to its rates is off by six.
    for rate, share, tolerance in (
        (findings.minimal, 0.1, 2.5), (findings.steepest, 0.5, 2.5), (findings.maximal, 0.9, 2.5)
    ):  # fmt: skip
        expected = 1e-3 * (share / (1 - share)) ** (2 / 3)
        assert expected / tolerance < rate < expected * tolerance
    text = summary(findings)
    for said in (findings.minimal, findings.steepest, findings.maximal):
        assert f"{said:.2e}" in text
    assert f"recipe.learning_rate.peak={findings.maximal:.2g}" in text


@pytest.mark.parametrize("deviation", [0.01, 0.5, 2.0])
def test_noise_alone_is_neither_a_fall_nor_a_divergence(deviation):
    for seed in range(100):
        noise = random.Random(seed)
        findings = sweep_of(lambda *_, noise=noise: 8 + deviation * noise.gauss(0, 1))
        assert findings.trace.diverged_at is None
        assert findings.fall is findings.minimal is findings.maximal is findings.steepest is None
        assert "no fall of the loss" in findings.advice
        assert "a higher --highest" in summary(findings)


def test_no_fall_before_a_divergence_says_so():
    findings = sweep_of(lambda step, rate: 8 + 100 * rate)
    assert findings.trace.diverged_at < 1
    assert findings.fall is None
    assert "a lower --lowest" in findings.advice


def test_a_sweep_that_ends_while_the_loss_falls_says_so():
    findings = sweep_of(language_model, highest=1e-3)
    assert findings.maximal is not None
    assert "raise --highest" in findings.advice


@pytest.mark.parametrize("found", [(math.nan, 1.0), (math.inf, 1.0), (8.0, math.nan)])
def test_numbers_that_are_not_finite_end_the_sweep(found):
    trace = Trace(Sweep())
    assert not trace.add(1e-7, 8.0, 1.0)
    assert trace.add(2e-7, *found)
    assert trace.diverged_at == 2e-7
    assert trace.losses == [8.0]
    assert "diverged        2.00e-07" in summary(Findings(trace))
    at_once = Trace(Sweep())
    at_once.add(1e-7, *found)
    assert "diverged at once" in summary(Findings(at_once))


def test_the_shortest_sweeps_have_a_summary():
    for steps in range(2, 25):
        for smoothing in (0.0, 0.95):
            assert "advice" not in summary(
                sweep_of(language_model, steps=steps, smoothing=smoothing)
            )
