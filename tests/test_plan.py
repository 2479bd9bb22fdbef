"""The planner: what it says of a run, that it agrees with real ranks, that it answers at once."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from launch.cli import main as anthesis
from launch.clusters import Link, load_cluster
from launch.cost import step_cost
from launch.plan import Plan, daly_interval
from pretrain.config import BloomModel, Engine
from pretrain.config_file import load
from pretrain.config_optim import AdamW
from pretrain.config_sync import AllReduce, parse_sync
from pretrain.memory import Layout, memory
from pretrain.sizes import shape_of
from tests.ranks import run_ranks
from tests.tiny import write_config

ROOT = Path(__file__).parents[1]
AS_RUN, FROM_16 = "configs/bloom-176b-as-run.toml", "configs/bloom-176b.toml"
A100, H100 = "configs/clusters/jean-zay-a100.toml", "configs/clusters/h100-8x.toml"
LOCAL = "configs/clusters/local.toml"


def plan_of(config=AS_RUN, cluster=A100, overrides=(), **resized):
    profile = load_cluster(cluster).model_copy(update=resized)
    return Plan(load(config, list(overrides)), profile)


def output(capsys, *arguments):
    assert anthesis(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert anthesis(["plan", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert "rule:" in text
    assert "cure:" in text
    return text


# --- timeline ------------------------------------------------------------------------------------

ANSWERS = [
    (AS_RUN, "step=1", 1, 192, 192, "6.291472106e-08"),
    (AS_RUN, "step=12659", 12_659, 9_767_856, 2048, "5.969400893e-05"),
    (AS_RUN, "step=95281", 95_281, 178_977_712, 2048, "7.461409102e-06"),
    # the 20 billionth token is in the last step of the ramp
    (AS_RUN, "tokens=20B", 12_658, 9_765_808, 2032, None),
    (AS_RUN, "samples=9767856", 12_659, 9_767_856, 2048, None),
    (AS_RUN, "samples=9767857", 12_660, 9_769_904, 2048, None),
    (FROM_16, "step=7820", 7_820, 183_120, 48, "6.000000000e-05"),
    (FROM_16, "step=95281", 95_281, 151_498_720, 2048, "1.347700676e-05"),
]


@pytest.mark.parametrize(("config", "question", "step", "samples", "batch", "logged"), ANSWERS)
def test_at_answers_with_clock_batch_and_rates(config, question, step, samples, batch, logged):
    plan = Plan(load(config))
    found = plan.at(question)
    assert found["step"] == step
    assert (found["samples"], found["tokens"]) == (samples, samples * 2048)
    assert found["batch_samples"] == batch
    assert logged is None or f"{found['lr_logged']:.9e}" == logged
    before = plan.recipe.clock_at(step=step - 1)
    assert found["lr_applied"] == plan.recipe.at(before).learning_rate


def test_json_for_machines(capsys):
    found = json.loads(
        output(capsys, FROM_16, "--json", "--at", "step=12659", "--at", "tokens=20B")
    )
    assert (found["total_steps"], found["parameters"]) == (128_728, 176_247_271_424)
    assert found["flops_per_token"] == pytest.approx(1.435563e12, rel=1e-6)
    assert found["flops_per_token"] * 2048 * 2048 == pytest.approx(6.021189556e18, rel=1e-9)
    assert [row["step"] for row in found["at"]] == [12_659, 26_076]
    assert {"samples", "tokens", "batch_samples", "lr_applied", "lr_logged"} < found["at"][0].keys()
    stages = found["stages"]
    assert len(stages) == 128
    assert stages[0]["first_step"] == 1
    assert stages[-1]["last_step"] == 128_728
    assert all(a["last_step"] + 1 == b["first_step"] for a, b in pairwise(stages))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--at", "step=0"),
        ("--at", "step=115312"),
        ("--at", "tokens=1T"),
        ("--at", "days=3"),
        ("--at", "tokens=many"),
        ("--nodes", "3"),
        ("--compare", "zero.stage=1"),
        ("--cluster", A100, "--ranks", "11"),
        ("--cluster", A100, "--shard-ranks", "7"),
        ("--cluster", A100, "--sync", "gossip"),
        ("--cluster", A100, "--sync", "powersgd:0"),
        ("--cluster", A100, "--compare", "zero.stage"),
        ("--cluster", A100, "--compare", "nodes=x"),
        ("--cluster", A100, "--compare", "seed=" + ",".join(map(str, range(65)))),
        ("--cluster", "configs/clusters/jean-zay-v100.toml"),  # has no bf16
        ("--cluster", "none.toml"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_cure(capsys, arguments):
    refused(capsys, AS_RUN, *arguments)


def test_the_report_is_whole_and_fits_a_terminal(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    text = output(capsys, AS_RUN, "--cluster", A100, "--at", "step=12659", "--plot", picture)
    for word in ("115,311 steps", "12659-115311", "2.76", "fullest rank", "Time and cost", "MWh",
                 "powersgd", "cannot be shared evenly", "Young/Daly", "59GB", "104.5",
                 "tensor parallel 4"):  # fmt: skip
        assert word in text, word
    assert max(map(len, text.splitlines())) <= 100
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    full = output(capsys, AS_RUN, "--full")
    assert full.count("\n") > 117
    assert "--cluster" in full


def test_times_and_shares_add_up():
    plan = plan_of()
    assert sum(stage.steps for stage in plan.stages) == plan.recipe.total_steps == 115_311
    assert plan.seconds == pytest.approx(sum(s.steps * s.step_seconds for s in plan.stages))
    bill = plan.bill()
    assert bill["device_hours"] == pytest.approx(plan.seconds / 3600 * 384)
    # 48 nodes of 5.1 kW, 1.2 times that on the site, 57 g a kWh
    assert bill["energy_mwh"] == pytest.approx(48 * 5.1e-3 * 1.2 * plan.seconds / 3600)
    assert bill["carbon_tonnes"] == pytest.approx(bill["energy_mwh"] * 57 / 1000)


def test_options_may_stand_before_overrides(capsys):
    text = output(capsys, AS_RUN, "--json", "engine.zero_stage=2", "name=other")
    assert json.loads(text)["name"] == "other"
    with pytest.raises(SystemExit):
        anthesis(["plan", AS_RUN, "--jsn"])


def test_planning_176_billion_parameters_needs_no_torch_and_no_second():
    code = (
        "import sys, launch.cli\n"
        f"launch.cli.main(['plan', '{FROM_16}', '--cluster', '{A100}', '--at', 'tokens=20B'])\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 5  # 0.3 s on an idle machine


# --- memory --------------------------------------------------------------------------------------


def test_memory_falls_with_shards_stages_and_recomputation():
    plan = plan_of("configs/bloom-7b1.toml", H100)
    sizes = {stage: plan.with_engine(zero_stage=stage).rank_bytes for stage in (1, 2, 3)}
    assert sizes[1] > sizes[2] > sizes[3]
    plan = plan.with_engine(zero_stage=3)
    assert plan.with_engine(activation_checkpointing=False).rank_bytes > plan.rank_bytes
    assert plan.with_engine(micro_batch_samples=2).rank_bytes > plan.rank_bytes
    assert plan_of(cluster=A100, nodes=96).rank_bytes < plan_of(cluster=A100).rank_bytes


def test_ranks_share_the_memory_and_speed_of_a_processor():
    one, two = (plan_of("configs/demo.toml", LOCAL, devices_per_node=n) for n in (1, 2))
    assert one.available_bytes == load_cluster(LOCAL).device.memory
    assert two.available_bytes == one.available_bytes // 2
    # half a batch each, at half the speed
    assert two.cost(16).compute > 0.9 * one.cost(16).compute
    gpus = plan_of("configs/bloom-560m.toml", H100)
    assert gpus.available_bytes == 80e9


def test_largest_micro_batch_fits_and_one_more_does_not():
    plan = plan_of(FROM_16, A100, nodes=24)
    largest = plan.largest_micro_batch()
    assert 1 <= largest < 11  # the share of a rank
    assert plan.with_engine(micro_batch_samples=largest).fits
    assert not plan.with_engine(micro_batch_samples=largest + 1).fits
    # never more than a rank's share of the batch
    small = plan_of("configs/bloom-560m.toml", H100)
    assert small.largest_micro_batch() == math.ceil(256 / 128)


@pytest.mark.parametrize(
    ("overrides", "nodes"),
    [
        (["engine.zero_stage=1"], []),
        (["engine.activation_checkpointing=false"], ["--nodes", "24"]),
        ([], ["--nodes", "2"]),
    ],
)
def test_what_does_not_fit_would_with_the_change_that_is_named(capsys, overrides, nodes):
    text = output(capsys, FROM_16, *overrides, "--cluster", A100, *nodes)
    assert "DOES NOT FIT, because" in text
    change = text.split("would with ")[1].splitlines()[0].split()
    again = output(capsys, FROM_16, *overrides, "--cluster", A100, *nodes, *change)
    assert "DOES NOT FIT" not in again


MODEL = BloomModel(vocab_size=96, hidden_size=32, layers=3, heads=2)


def held_bytes(world, stage, precision):
    """Bytes of weights, masters, states and gradients that a rank really holds."""
    import torch

    from pretrain.engine.deepspeed_setup import sharded_construction
    from pretrain.engine.world import rows_of_rank
    from pretrain.engine.zero import ZeroEngine
    from pretrain.model import build_model
    from pretrain.recipe import StepPlan

    config = Engine(zero_stage=stage, precision=precision)
    with sharded_construction(config, world):
        model = build_model(MODEL)
    engine = ZeroEngine(model, AdamW(), config, world)
    rows, plan = torch.zeros(4, 9, dtype=torch.long), StepPlan(4, 1e-3, 0.1, (0.9, 0.95), 1.0)
    first, end = rows_of_rank(4, world)
    engine.step(plan, engine.forward_backward(rows[first:end], 4))
    engine.forward_backward(rows[first:end], 4)
    held = {"masters": 0, "optimizer states": 0, "flat gradients": 0}
    for fragment in engine.fragments():
        held["masters"] += fragment.master.nbytes
        held["optimizer states"] += sum(value.nbytes for value in fragment.state.values())
        held["flat gradients"] += fragment.gradient.nbytes
    return held


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_planned_masters_states_and_gradients_are_what_ranks_hold(stage, precision):
    layout = Layout(2, stage, precision, 1, False, 8, passes=2)
    planned = memory(shape_of(MODEL), layout)
    for held in run_ranks(2, held_bytes, stage, precision):
        assert held["masters"] == pytest.approx(planned["masters"], rel=0.02)
        assert held["optimizer states"] == pytest.approx(planned["optimizer states"], rel=0.02)
        shards = 2 if stage == 1 else 1  # stage 1 holds whole gradients besides
        assert held["flat gradients"] * shards == pytest.approx(planned["gradients"], rel=0.02)


# --- time ----------------------------------------------------------------------------------------


def test_idle_ranks_and_passes_cost_time():
    plan = plan_of("configs/bloom-7b1.toml", H100)
    shape, layout, cluster = plan.shape, plan.layout, plan.cluster
    even, odd = (step_cost(shape, layout, cluster, batch) for batch in (128, 129))
    assert even.idle_share == 0
    assert odd.idle_share == pytest.approx(1 - 129 / 256)
    assert odd.compute == pytest.approx(2 * even.compute)
    assert odd.optimizer == even.optimizer


def test_slow_links_between_nodes_cost_more_than_links_inside():
    one, two = plan_of("configs/bloom-1b1.toml", H100, nodes=1), plan_of(
        "configs/bloom-1b1.toml", H100, nodes=2
    )  # fmt: skip
    cluster = one.cluster
    payload = 4 * one.shape.parameters * 2 + 2 * one.shape.parameters
    latency = (2 + 1) * math.ceil(one.shape.parameters / 50e6) * cluster.network.inside.latency_us
    seconds = 7 / 8 * payload / (cluster.network.inside.gbytes_per_s * 1e9) + latency * 1e-6
    assert one.final_cost.zero_communication == pytest.approx(seconds)
    between = cluster.network.between
    latency = (2 + 1) * math.ceil(one.shape.parameters / 50e6) * between.latency_us * 1e-6
    # the ring crosses the node's border once, and inside moves 15/16 of it
    inside = 15 / 16 * payload / (cluster.network.inside.gbytes_per_s * 1e9)
    across = 1 / 2 * payload / (between.gbytes_per_s * 1e9)
    assert two.final_cost.zero_communication == pytest.approx(max(inside, across) + latency)


def test_replicas_of_a_node_share_its_links(capsys):
    plan = plan_of("configs/bloom-1b1.toml", H100, nodes=4).with_replicas(8, AllReduce())
    assert plan.layout.replicas == 4
    sent = 8 * plan.sent_bytes  # by the eight ranks of a node
    assert sent == pytest.approx(2 * 3 / 4 * 4 * plan.shape.parameters)
    link = plan.cluster.network.between
    assert plan.final_cost.sync_communication == pytest.approx(
        sent / (link.gbytes_per_s * 1e9) + 2 * link.latency_us * 1e-6
    )


def test_compression_costs_time_of_its_own():
    plan = plan_of("configs/bloom-1b1.toml", H100, nodes=4)
    fast = plan.cluster.network.model_copy(
        update={"between": Link(gbytes_per_s=1e6, latency_us=0.001)}
    )
    plan = replace(plan, cluster=plan.cluster.model_copy(update={"network": fast}))
    seconds = [
        plan.with_replicas(8, parse_sync(text)).final_cost.sync_communication
        for text in ("allreduce", "diloco:10", "powersgd:4", "int8")
    ]
    assert seconds == sorted(seconds)
    expected = 32 * plan.shape.parameters / 8 / (plan.cluster.device.memory_gbytes_per_s * 1e9)
    assert seconds[2] == pytest.approx(expected, rel=0.05)


def test_save_interval_loses_least():
    def lost(interval, save, mtbf):  # Daly 2006, equation 13, without the restart
        return mtbf * (math.exp((interval + save) / mtbf) - 1) / interval

    for save, mtbf in ((40, 86400 * 4), (600, 86400), (5, 3600)):
        best = daly_interval(save, mtbf)
        assert lost(best, save, mtbf) <= lost(best * 1.05, save, mtbf)
        assert lost(best, save, mtbf) <= lost(best * 0.95, save, mtbf)
    assert daly_interval(7200, 3600) == 3600


def test_alternatives_are_a_table(capsys):
    text = output(capsys, "configs/bloom-7b1.toml", "--cluster", H100, "--compare",
                  "sync=powersgd,diloco:100:int4", "zero.stage=1,2,3")  # fmt: skip
    rows = text.splitlines()[1:]
    assert len(rows) == 1 + 6
    assert rows[0].startswith("as configured")
    found = {row.split("  ")[0]: row.split() for row in rows[1:]}
    assert {"sync=powersgd zero.stage=3", "sync=diloco:100:int4 zero.stage=1"} < found.keys()
    assert all(row[-1].endswith("B") for row in found.values())  # replicas talk
    nodes = output(capsys, FROM_16, "--cluster", A100, "--compare", "nodes=24,96",
                   "activation_checkpointing=false").splitlines()  # fmt: skip
    assert len(nodes) == 1 + 1 + 2


def test_a_run_of_transformers_is_planned_too(tmp_path, capsys):
    path = write_config(tmp_path)
    small = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    model = f"model={{family='hf',vocab_size=61,config={json.dumps(small).replace(':', '=')}}}"
    found = json.loads(output(capsys, path, model, "--cluster", LOCAL, "--ranks", "1", "--json"))
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert found["parameters"] == 2 * 61 * 64 + matrices + 5 * 64
    assert found["model_flops_per_token"] == 6 * (matrices + 61 * 64) + 12 * 2 * 64 * 8
    assert found["cluster"]["fits"]
