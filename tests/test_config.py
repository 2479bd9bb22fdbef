"""Configs: quantities, overrides, and every problem at once."""

import subprocess
import sys
import tomllib

import pytest
import tomli_w

from launch.cli import main
from pretrain.config_file import differences, load, schema
from pretrain.errors import ConfigError
from pretrain.quantities import Duration, Horizon, human_count, human_seconds

BLOOM = "configs/bloom-176b.toml"


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("375M tokens", 375_000_000, "tokens"),
        ("20B", 20_000_000_000, "tokens"),
        ("409.6B tokens", 409_600_000_000, "tokens"),
        ("9_765_625 samples", 9_765_625, "samples"),
        ("500 steps", 500, "steps"),
        (512, 512, "tokens"),
        ("1.5k samples", 1500, "samples"),
    ],
)
def test_horizons(text, value, unit):
    horizon = Horizon.parse(text)
    assert (horizon.value, horizon.unit) == (value, unit)
    assert Horizon.parse(str(horizon)) == horizon


def test_durations():
    assert Duration.parse("90min").value == Duration.parse("1.5h").value == 5400
    assert Duration.parse("30s").value == Duration.parse(30).value == 30


@pytest.mark.parametrize("text", ["5 apples", "", "-3M", "1.5 samples", "nan", True, 1.5, "3 M M"])
def test_bad_quantities_are_refused(text):
    with pytest.raises(ValueError, match=r"whole number|number with"):
        Horizon.parse(text)


def test_warmup_tokens_become_blooms_samples():
    assert Horizon.parse("375M tokens").samples(2048) == 183_105
    assert Horizon.parse("20B").samples(2048) == 9_765_625


def test_human_numbers():
    assert [human_count(n) for n in (0, 999, 1234, 176.2e9, 4.1e11)] == [
        "0", "999", "1.23k", "176B", "410B"]  # fmt: skip
    assert [human_seconds(s) for s in (5, 65, 4000, 200_000)] == ["5s", "1m05s", "1h06m", "2d07h"]


def test_every_problem_is_reported_at_once():
    bad = [
        "model.heads=100",
        "recipe.learning_rate.peak=nan",
        "data.sorces=1",
        "engine.zero_stage=4",
        "data.sources.0.weight=-1",
        "checkpoint.every=0",
    ]
    with pytest.raises(ConfigError) as caught:
        load(BLOOM, bad)
    problems = {problem.key: problem for problem in caught.value.problems}
    assert set(problems) == {
        "model.heads",
        "recipe.learning_rate.peak",
        "data.sorces",
        "engine.zero_stage",
        "data.sources.0.weight",
        "checkpoint.every",
    }
    assert "'sources'" in problems["data.sorces"].cure
    assert "112" in problems["model.heads"].cure
    text = str(caught.value)
    assert "rule:" in text
    assert "cure:" in text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("recipe.batch.increment=7", "recipe.batch.increment"),
        ("recipe.batch.start=4096", "recipe.batch.start"),
        ("recipe.batch.ramp=1T", "recipe.batch.ramp"),
        ("recipe.learning_rate.warmup=1T", "recipe.learning_rate.decay"),
        ("recipe.learning_rate.floor=1.0", "recipe.learning_rate.floor"),
        ("recipe.learning_rate.warmup=1 epochs", "recipe.learning_rate.warmup"),
        ("recipe.learning_rate.shape=cosin", "recipe.learning_rate.shape"),
        ("recipe.learning_rate.shape=wsd", "recipe.learning_rate.cooldown"),
        ("recipe.learning_rate.milestones=[1]", "recipe.learning_rate.milestones"),
        ("recipe.batch={schedule='table',stages=[]}", "recipe.batch.stages"),
        (
            "recipe.batch={schedule='table',stages=[{begins='1B',samples=8}]}",
            "recipe.batch.stages.0.begins",
        ),
        (
            "recipe.batch={schedule='table',stages=[{begins=0,samples=0}]}",
            "recipe.batch.stages.0.samples",
        ),
        (
            "recipe.batch={schedule='table',stages=[{begins=0,samples=8},"
            "{begins='2B',samples=9},{begins='1B',samples=9}]}",
            "recipe.batch.stages",
        ),
        (
            "recipe.batch={schedule='instead-of-decay',start=8,largest=64}",
            "recipe.batch.schedule",
        ),
        ("recipe.scaling={rule='noise-scale',base_batch=8}", "recipe.scaling.critical_batch"),
        (
            "recipe.learning_rate={shape='cyclic',peak=1.0,floor=0.1,rise='3 tokens'}",
            "recipe.learning_rate.rise",
        ),
        (
            "recipe.learning_rate={shape='step',peak=1.0,every=0}",
            "recipe.learning_rate.every",
        ),
        (
            "recipe.learning_rate={shape='multi-step',peak=1.0,milestones=['2B','1B']}",
            "recipe.learning_rate.milestones",
        ),
        (
            "recipe.learning_rate={shape='one-cycle',peak=1.0,rise='500B'}",
            "recipe.learning_rate.decay",
        ),
        (
            "recipe.learning_rate={shape='inverse-sqrt',peak=1.0}",
            "recipe.learning_rate.timescale",
        ),
        (
            "recipe.learning_rate={shape='cosine-restarts',peak=1.0}",
            "recipe.learning_rate.cycles",
        ),
        ("recipe.batch.schedule=tabel", "recipe.batch.schedule"),
        ("recipe.batch={schedule='list',samples=[4,-1]}", "recipe.batch.samples.1"),
        ("recipe.clip_norm={to=0}", "recipe.clip_norm"),
        ("recipe.momentum={to=1.5}", "recipe.momentum.to"),
        ("recipe.weight_decay={to=0.2,begins='2T'}", "recipe.weight_decay.ends"),
        ("checkpoint.every=1 epochs", "checkpoint.every"),
        ("recipe.train=1 samples", "recipe.train"),
        ("data.sources=[{name='x', path='y', weight=0.0}]", "data.sources"),
        ("model.family=gpt", "model.family"),
        ("name=../evil", "name"),
        ("nonsense", "override"),
        ("model.layers.x=1", "override"),
    ],
)
def test_contradictions(override, key):
    with pytest.raises(ConfigError) as caught:
        load(BLOOM, [override])
    assert key in [problem.key for problem in caught.value.problems]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "empty.toml")
    assert {"name", "model", "data", "recipe"} <= {p.key for p in caught.value.problems}


def test_resolved_config_repeats_the_run(tmp_path):
    config = load(BLOOM, ["engine.micro_batch_samples=1", "data.sources.0.weight=2.5"])
    path = tmp_path / "resolved.toml"
    path.write_text(tomli_w.dumps(config.resolved()))
    assert load(path) == config
    assert differences(config.resolved(), load(BLOOM).resolved()) == [
        "data.sources: " + f"{config.resolved()['data']['sources']} -> "
        f"{load(BLOOM).resolved()['data']['sources']}",
        "engine.micro_batch_samples: 1 -> 2",
    ]


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(BLOOM).engine.zero_stage = 1


def test_config_command(capsys):
    assert main(["config", BLOOM, "seed=7"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["seed"] == 7
    assert main(["config", BLOOM, "sed=7"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err


def test_schema_knows_all_sections():
    properties = schema()["properties"]
    assert {"model", "data", "recipe", "optimizer", "engine"} <= properties.keys()


def test_front_door_is_light():
    """`launch` and the recipe layer need no torch, so that planning answers at once."""
    code = (
        "import sys, launch.cli, pretrain.config_file, pretrain.recipe, pretrain.sizes\n"
        "launch.cli.main(['config', 'configs/bloom-176b.toml'])\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
