"""Settings of training in files of accelerate and DeepSpeed: the run config decides, and what
contradicts it is refused, all of it at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import main as anthesis
from pretrain.config_file import load
from pretrain.errors import ConfigError, UserError
from pretrain.foreign import check_foreign, of_accelerate, of_deepspeed, of_environment
from tests.tiny import write_config

SHIPPED = sorted((Path(__file__).parents[1] / "configs" / "accelerate").glob("*.yaml"))
# The tiny run as DeepSpeed's own settings would say it, for two ranks; and each wrongly.
AGREES = {
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8,
                                              "weight_decay": 0.1}},
    "steps_per_print": 7,
}  # fmt: skip
CONTRADICTS = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": True},
    "gradient_clipping": 2.5,
    "train_micro_batch_size_per_gpu": 16,
    "train_batch_size": 64,
    "gradient_accumulation_steps": 5,
    "optimizer": {"type": "Lamb", "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-5,
                                             "weight_decay": 0.3}},
    "scheduler": {"type": "WarmupLR"},
}  # fmt: skip
OURS = {
    "zero_optimization.stage": ("3", "engine.zero_stage = 1"),
    "zero_optimization.offload_param.device": ("'cpu'", ""),
    "bf16.enabled": ("True", "engine.precision = fp32"),
    "fp16.enabled": ("True", ""),
    "gradient_clipping": ("2.5", "optimizer.clip_norm = 1.0"),
    "train_micro_batch_size_per_gpu": ("16", "engine.micro_batch_samples = 2"),
    "train_batch_size": ("64", "recipe.batch = 8"),
    "gradient_accumulation_steps": ("5", "recipe.batch"),
    "optimizer.type": ("'Lamb'", "optimizer.name = adamw"),
    "optimizer.params.lr": ("0.0003", "recipe.learning_rate.peak = 0.01"),
    "optimizer.params.betas": ("[0.8, 0.95]", "optimizer.betas = [0.9, 0.95]"),
    "optimizer.params.eps": ("1e-05", "optimizer.epsilon = 1e-08"),
    "optimizer.params.weight_decay": ("0.3", "optimizer.weight_decay = 0.1"),
    "scheduler.type": ("'WarmupLR'", ""),
}


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path, recipe__batch={"final": 8})


@pytest.fixture
def run(path):
    return load(path)


def written(folder, tree, name="foreign"):
    """The tree in a file, which is JSON and YAML."""
    (folder / name).write_text(json.dumps(tree))
    return folder / name


def contradictions(settings, run, **job):
    """The problems by key; each has what was found, the rule and a cure."""
    with pytest.raises(ConfigError) as caught:
        check_foreign(settings, run, **job)
    assert all(problem.cure and problem.rule for problem in caught.value.problems)
    return {problem.key.split(" (")[0]: str(problem) for problem in caught.value.problems}


def test_deepspeed_settings_that_say_the_same_pass(tmp_path, run):
    check_foreign(of_deepspeed(written(tmp_path, AGREES)), run, nodes=1, ranks=2)


def test_auto_passes(tmp_path, run):
    def auto(tree):
        return {k: auto(v) if isinstance(v, dict) else "auto" for k, v in tree.items()}

    check_foreign(of_deepspeed(written(tmp_path, auto(CONTRADICTS))), run, nodes=1, ranks=2)


def test_all_contradictions_of_deepspeed_are_named_at_once(tmp_path, run):
    file = written(tmp_path, CONTRADICTS)
    found = contradictions(of_deepspeed(file), run, nodes=1, ranks=2)
    assert found.keys() == OURS.keys()
    for key, (theirs, ours) in OURS.items():
        assert theirs in found[key]
        assert ours in found[key]
        assert str(file) in found[key]


def test_accelerate_and_the_deepspeed_file_that_it_names(tmp_path, run):
    tree = {
        "mixed_precision": "fp16",
        "num_machines": 3,
        "num_processes": 8,
        "distributed_type": "FSDP",
        "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 4,
                             "gradient_clipping": 0.5, "offload_optimizer_device": "nvme",
                             "offload_param_device": "cpu",
                             "deepspeed_config_file": str(written(tmp_path, CONTRADICTS))},
    }  # fmt: skip
    found = contradictions(
        of_accelerate(written(tmp_path, tree, "own.yaml")), run, nodes=1, ranks=2
    )
    inner = set(tree["deepspeed_config"]) - {"deepspeed_config_file"}
    assert found.keys() == OURS.keys() | (tree.keys() - {"deepspeed_config"}) | {
        f"deepspeed_config.{key}" for key in inner
    }
    assert "engine.precision = fp32" in found["mixed_precision"]
    assert "3" in found["num_machines"]


def test_accelerate_that_says_the_same_passes(tmp_path, path):
    """ "no" is what accelerate writes where nobody chose, whatever the run's precision."""
    tree = {"mixed_precision": "no", "num_machines": 1, "num_processes": 2,
            "distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}  # fmt: skip
    for precision in ("fp32", "bf16"):
        run = load(path, [f'engine.precision="{precision}"'])
        check_foreign(of_accelerate(written(tmp_path, tree)), run, nodes=1, ranks=2)
    (tmp_path / "yaml").write_text("mixed_precision: 'no'\n")
    check_foreign(of_accelerate(tmp_path / "yaml"), run)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_say_nothing_about_training(path, file):
    """They are for any run, so they pass with any."""
    tree = yaml.safe_load(file.read_text())
    words = ("precision", "zero", "accumul", "clip", "deepspeed", "fsdp", "batch", "offload")
    assert not [key for key in tree if any(word in key for word in words)]
    for overrides in ([], ["engine.precision=bf16", "engine.zero_stage=3", "recipe.batch.final=4"]):
        check_foreign(of_accelerate(file), load(path, overrides), nodes=1, ranks=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['touch {pwned}']", "python/object"),
        ("a: [", "YAML"),
        ("- a", "no settings"),
        ("", "no settings"),
    ],
)
def test_files_that_are_something_else(tmp_path, path, capsys, text, words):
    """Tags of Python are refused without being run."""
    (tmp_path / "own.yaml").write_text(text.replace("{pwned}", str(tmp_path / "pwned")))
    own = ["--accelerate-config", str(tmp_path / "own.yaml"), "--ranks-per-node=2", "--dry-run"]
    assert anthesis(["launch", "accelerate", str(path), *own]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert str(tmp_path / "own.yaml") in said
    assert "cure:" in said
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_not_there(tmp_path):
    for read in (of_accelerate, of_deepspeed):
        with pytest.raises(UserError, match="cure:"):
            read(tmp_path / "none")


def test_launch_refuses_before_anything_starts(tmp_path, path, capsys):
    file = str(written(tmp_path, CONTRADICTS))
    ranks = ["--ranks-per-node=2", "--dry-run"]
    for line in (["torchrun", "--deepspeed-config", file],
                 ["accelerate", "--accelerate-config", str(written(
                     tmp_path, {"mixed_precision": "fp16"}, "own"))]):  # fmt: skip
        assert anthesis(["launch", line[0], str(path), *line[1:], *ranks]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        assert line[-1] in found.err
        assert "engine.precision = fp32" in found.err


def test_variables(tmp_path, run):
    file = str(written(tmp_path, {"zero_optimization": {"stage": 2}}))
    told = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_GRADIENT_CLIPPING": "0.3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": file,
    }
    found = contradictions(of_environment(told), run)
    assert found.keys() == (told.keys() - {"ACCELERATE_DEEPSPEED_CONFIG_FILE"}) | {
        "zero_optimization.stage"
    }
    fine = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
            "ACCELERATE_USE_FSDP": "false", "ACCELERATE_GRADIENT_CLIPPING": "none",
            "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    check_foreign(of_environment(fine), run)


def test_passes_by_variable(run):
    """8 samples on 2 ranks, 2 a pass; where nobody knows the ranks nothing can be said."""
    told = of_environment({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"})
    check_foreign(told, run, ranks=2)
    check_foreign(told, run)
    assert contradictions(told, run, ranks=4)


def test_a_worker_stops_where_accelerate_tells_it_something_else(tmp_path, path):
    told = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    done = subprocess.run([sys.executable, "-m", "pretrain", str(path)], env=os.environ | told,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for text in (*told, "'bf16'", "engine.precision = fp32", "engine.zero_stage = 1"):
        assert text in done.stderr
    assert not (tmp_path / "runs").exists()
