"""Statistics of each parameter equal those of whole parameters, and reach TensorBoard."""

import numpy as np
import pytest
import torch

from pretrain.config_file import load
from pretrain.config_optim import AdamW, Lamb
from pretrain.errors import ConfigError
from pretrain.recipe import StepPlan
from tests.ranks import run_ranks, run_worker
from tests.test_sharding import BATCH, LENGTH, build, new_model, rows_of
from tests.tiny import write_config
from tests.whole import whole_optimizer_of

RATE = 0.05


def measured(world, stage, section):
    from pretrain.engine.world import rows_of_rank

    engine = build(world, stage, section, micro=4)
    first, end = rows_of_rank(BATCH, world)
    plan = StepPlan(BATCH, RATE, section.weight_decay, section.momenta, section.clip_norm)
    stats = engine.forward_backward(rows_of(0)[first:end], BATCH)
    assert engine.step(plan, stats) is None
    stats = engine.forward_backward(rows_of(1)[first:end], BATCH)
    return engine.step(plan, stats, measure=True)


def expected(section):
    """Of the second step, on whole parameters."""
    model = new_model()
    optimizer = whole_optimizer_of(model, section)
    rows = {}
    for step in (0, 1):
        tokens = rows_of(step)
        model.zero_grad()
        (model(tokens[:, :-1], tokens[:, 1:]) / (BATCH * LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(RATE)
    ratios = getattr(optimizer.optimizer, "ratios", None)
    for number, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("query_key_value.bias"):
            continue
        weight = p.detach()
        rms = weight.square().mean().sqrt().item()
        counts, _ = np.histogram(weight.clamp(-4 * rms, 4 * rms), 64, (-4 * rms, 4 * rms))
        rows[name] = (
            weight.norm().item(), rms, p.grad.norm().item(),
            ((weight - before[name]).norm() / weight.norm()).item(),
            None if ratios is None else ratios[number].item(), counts,
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("section", [AdamW(), Lamb()], ids=["adamw", "lamb"])
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_tell_what_whole_parameters_tell(stage, section):
    torch.set_num_threads(1)
    rows = expected(section)
    for found in run_ranks(3, measured, stage, section):
        assert set(rows) < set(found.names)
        assert (found.trust_ratio is None) == (section.name == "adamw")
        for number, name in enumerate(found.names):
            if name not in rows:
                continue
            weight, rms, gradient, update, trust, counts = rows[name]
            assert found.weight_norm[number] == pytest.approx(weight, rel=1e-4)
            assert found.weight_rms[number] == pytest.approx(rms, rel=1e-4)
            assert found.gradient_norm[number] == pytest.approx(gradient, rel=1e-3, abs=1e-8)
            assert found.update_ratio[number] == pytest.approx(update, rel=1e-3)
            if trust is not None:
                assert found.trust_ratio[number] == pytest.approx(trust, rel=1e-3)
            assert sum(found.histogram[number]) == sum(counts)
            # Rounding may move a weight over the edge of a bin.
            assert np.abs(np.array(found.histogram[number]) - counts).sum() <= 2 + 0.02 * sum(
                counts
            )


def test_they_reach_tensorboard_when_due(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write_config(
        tmp_path,
        optimizer={"name": "lamb"},
        observe={"parameters_every": "10 steps", "tensorboard": True, "peak_tflops": 1.0},
    )
    code, output = run_worker([str(path)])
    assert code == 0, output
    board = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"), {"histograms": 0})
    board.Reload()
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    tags = board.Tags()
    for kind in ("weight_norm", "gradient_norm", "update_ratio", "trust_ratio"):
        events = board.Scalars(f"{kind}/{name}")
        assert len(events) == 2  # after steps 10 and 20 of 23
        assert all(event.value > 0 for event in events)
    assert f"weights/{name}" in tags["histograms"]
    histogram = board.Histograms(f"weights/{name}")[-1].histogram_value
    assert histogram.num == 24 * 96
    assert [event.step for event in board.Scalars(f"weight_norm/{name}")] == [
        event.step for event in board.Histograms(f"weights/{name}")
    ]


def test_without_tensorboard_they_are_refused(tmp_path):
    path = write_config(tmp_path, observe={"parameters_every": "10 steps", "tensorboard": False})
    with pytest.raises(ConfigError, match=r"observe\.parameters_every"):
        load(path)
