"""The learning-rate finder on an engine and as a command: it leaves everything as it was."""

import hashlib
import os
import random
import signal

import numpy as np
import pytest

from pretrain.config_file import load
from pretrain.lab.range_test import Sweep
from pretrain.observe.metrics import read_metrics
from tests.ranks import run_ranks, run_worker
from tests.tiny import write_config

# --- with an engine -------------------------------------------------------------------------------


def fingerprint(engine):
    """Everything that a step changes, exactly; values by hash so that a difference has a name."""
    import torch

    def digest(value):
        if torch.is_tensor(value):
            value = (value.dtype, value.detach().cpu().contiguous().view(torch.uint8).numpy()
                     .tobytes() if value.ndim else value.item())  # fmt: skip
        return hashlib.sha256(repr(value).encode()).hexdigest()

    inner, masters = engine.optimizer, engine._map.masters
    found = {f"master {i}": digest(master) for i, master in enumerate(masters)}
    for name, parameter in engine.module.named_parameters():
        found[f"weight {name}"] = digest(getattr(parameter, "ds_tensor", parameter))
        if parameter.numel():  # ZeRO 3 keeps small ones gathered, from its first step on
            found[f"whole {name}"] = digest(parameter)
    for i, master in enumerate(masters):
        found[f"states {i}"] = sorted(inner.state[master]) if master in inner.state else None
        for key, value in inner.state.get(master, {}).items():
            found[f"{key} {i}"] = digest(value)
    for name, value in engine.optimizer_wholes().items():
        found[f"whole state {name}"] = digest(value)
    found["states"] = len(inner.state)
    found["scalars"] = engine.optimizer_scalars()
    found["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
    found["parameters"] = [[id(p) for p in g["params"]] for g in inner.param_groups]
    found["training"] = [module.training for module in engine.module.modules()]
    found["random"] = digest((random.getstate(), str(np.random.get_state())))
    found["torch"] = digest(torch.get_rng_state())
    return found


def built(world, path, overrides):
    from pretrain.train import build_engine, open_data

    config = load(path, overrides)
    corpus, _ = open_data(config, world)
    return config, build_engine(config, world), corpus


def train_steps(config, engine, corpus, clock, count):
    """The losses and norms of some steps as in the loop, and the clock after them."""
    from pretrain.data.loader import Loader
    from pretrain.engine.world import rows_of_rank
    from pretrain.loop import seed_step

    recipe, seen = config.build_recipe(), []
    loader = Loader(corpus, recipe, lambda batch: rows_of_rank(batch, engine.world))
    for _ in range(count):
        plan = recipe.at(clock)
        seed_step(config.seed, clock, engine.world.rank)
        stats = engine.forward_backward(loader.batch(clock, plan), plan.batch_samples)
        engine.step(plan, stats)
        clock = recipe.after(clock, plan)
        seen.append((stats.loss, stats.grad_norm))
    return seen, clock


def find_between_steps(world, path, overrides):
    """Names of what differs after a sweep, without and with optimizer state before it; whether the
    steps that follow are those of a run without sweeps; how the sweeps ended."""
    from pretrain.lab.lr_finder import find
    from pretrain.recipe import Clock

    config, engine, corpus = built(world, path, overrides)
    expected, end = train_steps(config, engine, corpus, Clock(), 6)
    final = fingerprint(engine)
    config, engine, corpus = built(world, path, overrides)
    clock, seen, differing, reasons = Clock(), [], [], []
    # The second one leaves no finite weight.
    for sweep in (Sweep(1e-4, 1.0, 12), Sweep(1e-2, 1e30, 12, smoothing=0.99, batch=5)):
        engine.module.eval()  # as validation leaves it
        before = fingerprint(engine)
        findings = find(engine, config.build_recipe(), corpus, clock, config.seed, sweep)
        after = fingerprint(engine)
        differing += [key for key in before if before[key] != after[key]]
        reasons.append((len(findings.trace.losses), findings.trace.reason))
        more, clock = train_steps(config, engine, corpus, clock, 3)
        seen += more
    end_state = fingerprint(engine)
    ends_equal = [key for key in final if key != "parameters" and final[key] != end_state[key]]
    return differing, seen == expected, ends_equal, clock == end, reasons


LAYOUTS = [(1, "fp32", 2), (1, "bf16", 1), (2, "fp32", 1), (2, "bf16", 2), (3, "fp32", 1),
           (3, "bf16", 2)]  # fmt: skip


@pytest.mark.parametrize(("stage", "precision", "ranks"), LAYOUTS)
def test_nothing_is_left_of_a_sweep(tmp_path, stage, precision, ranks):
    path = write_config(tmp_path, model__dropout=0.1)
    overrides = [f"engine.zero_stage={stage}", f'engine.precision="{precision}"']
    results = run_ranks(ranks, find_between_steps, path, overrides)
    for differing, same_steps, differing_ends, same_clock, reasons in results:
        assert differing == []
        assert same_steps
        assert differing_ends == []
        assert same_clock
        assert reasons[0][0] == 12
        assert reasons[1][0] < 12
        assert reasons[1][1]


@pytest.mark.parametrize("name", ["schedulefree", "lamb", "muon", "soap", "adafactor"])
def test_nothing_is_left_of_a_sweep_with_other_optimizers(tmp_path, name):
    path = write_config(tmp_path, optimizer={"name": name})
    for differing, same_steps, differing_ends, _, _ in run_ranks(2, find_between_steps, path, []):
        assert differing == []
        assert same_steps
        assert differing_ends == []


def interrupted_sweep(world, path):
    """What differs after Ctrl-C on the last rank in the middle of a sweep, and the steps made."""
    from pretrain.lab import lr_finder
    from pretrain.recipe import Clock

    config, engine, corpus = built(world, path, ["engine.zero_stage=3"])
    before, steps = fingerprint(engine), []
    step, handler = engine.step, signal.getsignal(signal.SIGINT)

    def counting_step(plan, stats):
        steps.append(plan.learning_rate)
        if len(steps) == 4 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(plan, stats)

    engine.step = counting_step
    with pytest.raises(KeyboardInterrupt):
        lr_finder.find(engine, config.build_recipe(), corpus, Clock(), config.seed, Sweep())
    after = fingerprint(engine)
    assert signal.getsignal(signal.SIGINT) is handler
    return [key for key in before if before[key] != after[key]], len(steps)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_on_one_rank_restores_all(tmp_path, ranks):
    path = write_config(tmp_path)
    assert run_ranks(ranks, interrupted_sweep, path) == [([], 4)] * ranks


def failing_sweep(world, path):
    """What differs after an error in the middle of a backward pass."""
    from pretrain.lab import lr_finder
    from pretrain.recipe import Clock

    config, engine, corpus = built(world, path, [])
    _, clock = train_steps(config, engine, corpus, Clock(), 2)
    before, calls = fingerprint(engine), []
    finish = engine._finish_accumulation

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        finish()

    engine._finish_accumulation = failing
    with pytest.raises(MemoryError):
        lr_finder.find(engine, config.build_recipe(), corpus, clock, config.seed, Sweep())
    after = fingerprint(engine)
    return [key for key in before if before[key] != after[key]]


def test_an_error_of_the_only_rank_restores_all(tmp_path):
    assert run_ranks(1, failing_sweep, write_config(tmp_path)) == [[]]


def applied_settings(world, path, batch):
    """Plans, rows and seeds of a sweep's steps, as an engine sees them that writes them down."""
    import torch

    from pretrain.lab import lr_finder
    from pretrain.recipe import Clock

    config, engine, corpus = built(world, path, [])
    recipe, plans, rows, seeds = config.build_recipe(), [], [], []
    step, forward = engine.step, engine.forward_backward

    def recording_forward(batch_rows, samples):
        rows.append(batch_rows.numpy().copy())
        seeds.append(torch.initial_seed())
        return forward(batch_rows, samples)

    def recording_step(plan, stats):
        plans.append(plan)
        step(plan, stats)
        assert engine.applied() == plan.settings

    engine.step, engine.forward_backward = recording_step, recording_forward
    clock = recipe.clock_at(step=4)  # the ramp grows after the next step
    sweep = Sweep(1e-5, 1e-3, 9, batch=batch)
    lr_finder.find(engine, recipe, corpus, clock, config.seed, sweep)
    size = batch or 3
    assert np.array_equal(np.concatenate(rows), corpus.batch(clock.samples, 9 * size))
    assert [plan.learning_rate for plan in plans] == sweep.rates()
    expected = recipe.at(clock)
    assert {(p.batch_samples, p.betas, p.weight_decay) for p in plans} == {
        (size, expected.betas, expected.weight_decay)
    }
    assert expected.batch_samples == 3 != recipe.batch(recipe.clock_at(step=9).samples)
    from pretrain.loop import seed_step

    seed_step(config.seed, Clock(6), world.rank)
    assert seeds[2] == torch.initial_seed()
    assert len(set(seeds)) == 9


@pytest.mark.parametrize("batch", [None, 4])
def test_only_the_rate_is_swept(tmp_path, batch):
    run_ranks(1, applied_settings, write_config(tmp_path), batch)


# --- the command ----------------------------------------------------------------------------------


def run_finder(folder, arguments):
    here = folder / "elsewhere"
    here.mkdir(exist_ok=True)
    return run_worker([str(a) for a in arguments], "pretrain.lab.lr_finder", str(here))


def contents(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in [folder, *folder.rglob("*")]
    }


def test_the_command_suggests_and_draws(tmp_path):
    path = write_config(tmp_path)
    code, output = run_finder(
        tmp_path, [path, "--batch=8", "--lowest=1e-5", "--steps=150", "--local_rank=0"]
    )
    assert code == 0, output
    assert (tmp_path / "elsewhere" / "lr-find-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "runs").exists()
    found = dict(line.split(maxsplit=2)[::2] for line in output.splitlines()
                 if line.startswith(("  minimal", "  maximal")))  # fmt: skip
    minimal, maximal = (float(found[key].split()[0]) for key in ("minimal", "maximal"))
    assert 1e-4 < minimal < 1e-2 < maximal < 1  # the model is 24 wide
    assert "  diverged" in output


def test_a_run_that_is_swept_from_is_not_touched(tmp_path):
    path = write_config(tmp_path)
    code, output = run_worker([str(path)])
    assert code == 0, output
    run = tmp_path / "runs" / "tiny"
    before = contents(run)
    picture = tmp_path / "a.png"
    options = ["--plot", picture, "--steps=2", "--lowest=1e-9", "--highest=1e-8"]
    code, output = run_finder(tmp_path, [path, *options, "--from", run])
    assert code == 0, output
    assert picture.exists()
    assert "from step 23, batch 9" in output
    older = run / "checkpoints" / "step-0000022"
    code, output = run_finder(tmp_path, [path, *options, "--from", older])
    assert code == 0, output
    row = next(row for row in read_metrics(run / "metrics.jsonl") if row.get("step") == 23)
    assert f"1.00e-09{row['loss']:8.3f}" in output  # the loss that training found there
    assert contents(run) == before


def test_errors_name_their_cure(tmp_path):
    path = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    for arguments, said in (
        (["--lowest=1", "--highest=0.1"], "--highest = 0.1"),
        (["--steps=1"], "--steps = 1"),
        (["--batch=0"], "--batch = 0"),
        ([f"--from={run}"], "no checkpoint here"),
        ([f"--plot={tmp_path}/nowhere/x.png"], "x.png: a picture cannot be drawn"),
        ([f"--plot={tmp_path}/x.gif"], "ends in .png"),
        (["recipe.train=nonsense"], "recipe.train"),
    ):
        code, output = run_finder(tmp_path, [path, *arguments])
        assert code == 2, output
        assert said in output
        assert "cure" in output
        assert "Traceback" not in output
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(run.iterdir())


def test_megatrons_order_ends_with_the_run(tmp_path):
    path = write_config(tmp_path)
    options = [path, 'data.order="megatron"', f"data.index_directory={tmp_path}/index"]
    code, output = run_finder(tmp_path, [*options, "--steps=54"])
    assert code == 2, output
    assert "needs 162 samples, and 160 are left" in output
    code, output = run_finder(tmp_path, [*options, "--steps=53"])
    assert code == 0, output


def test_the_same_sweep_on_any_number_of_ranks(tmp_path):
    path = write_config(tmp_path)
    one, *two = [
        losses
        for ranks, stage in ((1, 1), (2, 3))
        for losses in run_ranks(ranks, sweep_losses, path, [f"engine.zero_stage={stage}"])
    ]
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, abs=1e-4)
    assert len(one) == 25


def sweep_losses(world, path, overrides):
    from pretrain.lab.lr_finder import find
    from pretrain.recipe import Clock

    config, engine, corpus = built(world, path, overrides)
    sweep = Sweep(1e-5, 1e-1, 25)
    return find(engine, config.build_recipe(), corpus, Clock(), config.seed, sweep).trace.losses
