"""Machines of labs: cards apart, several machines, uneven numbers of devices, and the command line that runs a plan."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch

from sonic.cli import compose, group_choices
from sonic.commands import infer_command, train_command
from sonic.commands.plan_command import ENTRY, TRAINING_ENTRY, entry_of
from sonic.config import Ranks
from sonic.families import FAMILIES
from sonic.families.wan import Wan
from sonic.inference import choose_plan
from sonic.parallel.parallel_config import HardwareConfig
from sonic.planner.command_line import command_line
from sonic.planner.hardware import RATES, hardware_here
from sonic.planner.search import as_json, search_plans
from sonic.planner.step_time import all_to_all_seconds, hop_seconds, ring_seconds
from sonic.planner.training_memory import sizes
from sonic.planner.workload import learnt
from sonic.training.plan_training import PlanTrainingConfig, plan_training, training

CPU = torch.device("cpu")
VIDEO = ("model=live_avatar_14b", "video=704x384", "run.dtype=bfloat16", "sampler.sample_steps=4")
DISTILL = ("+distill=live_avatar_4step", "video.size=384x256")
FILES = [name for name in group_choices("hardware") if name != "here"]
TWO = HardwareConfig("two machines", 8, nodes=2, link="nvlink", link_gbps=300, node_link_gbps=30)
ALONE = replace(TWO, nodes=1)
CARDS = {
    **{"1x24gb": "4090", "1x32gb": "5090", "1x40gb": "A100-SXM4-40GB", "1x48gb": "L40S", "1xa6000": "A6000"},
    **{"1x80gb": "H100", "1xa100": "A100", "1xh200": "H200"},
}


def planned(*items):
    """The plans of a video or a training, with the options they were asked with."""
    config = compose(entry_of(list(items)), list(items))
    found = plan_training(config) if isinstance(config, PlanTrainingConfig) else search_plans(config)
    return replace(found, asked=items)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_by_its_name_and_states_figures_that_are_possible(name):
    found = compose(ENTRY, [f"hardware={name}"]).hardware
    assert found.name == name and found.devices == (1 if name == "cpu" else int(name.partition("x")[0]))
    assert name == "cpu" or found.usable_gib < found.memory_gib
    assert found.devices == 1 or found.node_link_gbps < found.link_gbps


@pytest.mark.parametrize("name", CARDS)
def test_a_file_has_the_rates_of_its_card(name):
    found = compose(ENTRY, [f"hardware={name}"]).hardware
    assert (found.tflops, found.memory_gbps) == RATES[CARDS[name]]


def test_files_of_the_same_memory_are_apart_where_their_speeds_are():
    one, other, same = (compose(ENTRY, [f"hardware={name}"]).hardware for name in ("8xh100", "8xa100", "8x80gb"))
    assert one.usable_gib == other.usable_gib and one.tflops > 3 * other.tflops
    assert replace(same, name=one.name) == one


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (("1x24gb", "usable_gib=30"), "hardware.usable_gib=30.0 is more than the 24 GiB of 1x24gb; choose the file of a larger card"),
        (("1x24gb", "devices=2"), "hardware.devices=2 and hardware.link=none"),
        (("8xh100", "devices=16"), "hardware.devices=16: NVLink joins 8 devices in a machine; use hardware.devices=8 hardware.nodes=2"),
        (("8xh100", "nodes=0"), "hardware.nodes=0: need 1"),
        (("8xh100", "node_link_gbps=0"), "hardware.node_link_gbps=0.0: need more than 0"),
    ],
)
def test_impossible_hardware_is_refused_in_a_sentence(items, sentence):
    with pytest.raises(ValueError, match="hardware") as caught:
        compose(ENTRY, [f"hardware={items[0]}", *(f"hardware.{item}" for item in items[1:])])
    assert sentence in str(caught.value)


def test_a_larger_card_may_be_described_whole():
    assert compose(ENTRY, ["hardware=1x24gb", "hardware.memory_gib=32", "hardware.usable_gib=30"]).hardware.usable_gib == 30


def test_what_passes_between_machines_takes_the_link_between_them():
    size = 3e9
    assert ring_seconds(size, TWO, 16) == pytest.approx(size * 15 / 16 / 30e9)
    assert ring_seconds(size, TWO, 8) == ring_seconds(size, ALONE, 8) == pytest.approx(size * 7 / 8 / 300e9)
    assert ring_seconds(size, TWO, 3) > ring_seconds(size, replace(ALONE, devices=3), 3)  # ranks 6 to 8 are on both machines
    assert all_to_all_seconds(size, TWO, 8) == all_to_all_seconds(size, ALONE, 8) == pytest.approx(size * 7 / 8 / 300e9)
    assert all_to_all_seconds(size, TWO, 16) == pytest.approx(8 * size / 2 / 30e9)  # half of what each of eight has goes over
    assert hop_seconds(size, TWO, senders=2) == pytest.approx(2 * size / 30e9)
    assert hop_seconds(size, ALONE, senders=2) == pytest.approx(size / 300e9)


@pytest.mark.parametrize("job", [VIDEO, DISTILL])
def test_plans_over_two_machines_wait_for_the_link_between_them_where_they_use_it(job):
    slow, fast = (planned(*job, "hardware=8xh100", "hardware.nodes=2", f"hardware.node_link_gbps={rate}") for rate in (5, 300))
    seconds = {plan.name: plan.seconds for plan in fast.plans}
    for plan in slow.plans:
        crosses = plan.parallel.name in ("fsdp", "pipeline", "context", "zero3")
        parts = ("weights",) if plan.parallel.name in ("fsdp", "zero3") and not plan.parallel.cpu_offload else ("weights", "activations")
        before, now = (sum(getattr(each, part) for part in parts) for each in (seconds[plan.name], plan.seconds))
        most = 1.2 if plan.parallel.replicas > 1 else 1.5  # copies on each machine exchange gradients alone
        assert (now > most * before) == crosses or plan.parallel.cpu_offload, plan.name
    inside = {name: found.activations for name, found in seconds.items() if name.startswith("fsdp+context8")}
    assert inside and all(plan.seconds.activations == inside[plan.name] for plan in slow.plans if plan.name in inside)


def test_a_training_on_two_machines_is_also_planned_as_a_copy_on_each_which_send_each_other_gradients_alone():
    asked = (*DISTILL, "hardware=8x80gb", "hardware.nodes=2")
    found = planned(*asked)
    plans = {plan.name: plan for plan in found.plans}
    copied = plans["fsdp+replicas2"]
    command = next(each["command"] for each in as_json(found)["plans"] if each["plan"] == copied.name)
    assert command.startswith("sbatch --nodes=2 --gpus-per-node=8 ")
    assert command.endswith(f"slurm.sh train {DISTILL[0]} speed.engine=fsdp speed.replicas=2")
    slow, slower = (
        {plan.name: plan.seconds.weights for plan in planned(*asked, f"hardware.node_link_gbps={rate}").plans} for rate in (2, 1)
    )
    work = training(compose(TRAINING_ENTRY, asked))
    gradients = 9 * 4 * sum(learnt(work).values())  # bytes of 5 updates of the critic and of the 4 blocks of the student's replay
    assert slower[copied.name] - slow[copied.name] == pytest.approx(gradients / 1e9 / 2)  # each of 8 ranks sends its eighth, there and back
    gathered = 124 * sizes(work, 16).gathered  # of 5 x (4 steps x 4 blocks + 3) passes of the critic, and 29 of the student
    assert slower["fsdp"] - slow["fsdp"] == pytest.approx((gathered + gradients) * 15 / 16 / 1e9 / 2)
    assert plans["fsdp"].seconds.weights > copied.seconds.weights  # whose groups are inside a machine


def test_the_optimizer_on_the_host_updates_the_weights_of_one_copy_on_each_machine():
    job = ("+train=audio_adapter", "objective.learn.targets=[]", "video.size=384x256", "parallel=fsdp", "parallel.cpu_offload=true")
    one, two = (
        planned(*job, "hardware=8x80gb", f"hardware.nodes={n}", f"parallel.replicas={n}", f"budget.accumulate={8 * n}") for n in (1, 2)
    )
    copied, alone = two.chosen.seconds.weights, one.chosen.seconds.weights
    work = training(compose(TRAINING_ENTRY, [*job, "hardware=8x80gb"]))
    between = 4 * sum(learnt(work).values()) / (two.hardware.node_link_gbps * 1e9)
    assert copied - alone == pytest.approx(between, rel=0.01)


def test_host_memory_is_that_of_a_machine_not_of_all():
    one, two = (planned(*VIDEO, "hardware=8x24gb", "parallel=fsdp", "parallel.cpu_offload=true", f"hardware.nodes={n}") for n in (1, 2))
    assert two.chosen.host_gib(two.hardware) == pytest.approx(8 * two.chosen.host / 2**30)
    assert two.chosen.host < one.chosen.host and len(two.chosen.ranks) == 16


def test_ranks_that_run_are_spread_over_machines_as_they_were_started():
    named = compose(ENTRY, ["hardware=8xh100"]).hardware
    found = [hardware_here(named, CPU, ranks=ranks, local_ranks=local) for ranks, local in ((16, 8), (8, 4), (12, 8), (8, 8))]
    assert [(each.devices, each.nodes) for each in found] == [(8, 2), (4, 2), (4, 3), (8, 1)]
    assert [(each.devices, each.nodes) for each in map(TWO.part, (16, 8, 4, 3))] == [(8, 2), (8, 1), (4, 1), (1, 3)]
    here = hardware_here(HardwareConfig("here"), CPU, ranks=4, local_ranks=2)
    assert (here.devices, here.nodes, here.link) == (2, 2, "host")


@pytest.mark.parametrize("devices", range(1, 17))
def test_any_number_of_devices_gives_plans_or_a_sentence(devices):
    jobs = [(f"model={model}", "parallel=auto") for model in group_choices("model")]
    jobs += [("model=preview", f"parallel={name}") for name in FAMILIES["preview"].plans]
    jobs += [(*DISTILL, *more) for more in ((), ("parallel=fsdp",), ("parallel.context=2", "parallel=fsdp"), ("budget.accumulate=1",))]
    jobs += [("+train=audio_adapter", f"budget.accumulate={batches}") for batches in (1, 6, 64)]
    jobs += [("+train=preview_dit", "data.window=9"), ("+distill=preview_2step",)]
    for job in jobs:
        try:
            found = planned(*job, "hardware=8x24gb", f"hardware.devices={devices}")
        except ValueError as error:
            assert str(error).partition("=")[0] and len(str(error).split()) > 6, (job, error)
            assert "auto" not in job[-1], (job, error)
        else:
            assert {len(plan.ranks) for plan in found.plans} <= {1, devices}
            names = [plan.name for plan in found.plans]
            assert len(names) == len(set(names)), names


@pytest.mark.parametrize(
    ("devices", "sentence"),
    [(3, "budget.accumulate=16 cannot be shared by 3; use 15 or 18"), (5, "budget.accumulate=16 cannot be shared by 5; use 15 or 20")],
)
def test_a_training_that_devices_cannot_share_evenly_says_which_numbers_they_can(devices, sentence):
    with pytest.raises(ValueError, match=sentence):
        planned(*DISTILL, "hardware=8x24gb", f"hardware.devices={devices}")


RUNS = [
    (*VIDEO, "+preset=standard", "hardware=1x24gb"),
    (*VIDEO, "hardware=2xa6000"),
    (*VIDEO, "hardware=4x24gb", "parallel.prefetch=0", "verify=true", "json=plan.json"),
    (*VIDEO, "hardware=8x141gb", "parallel=fsdp", "parallel.context=2", "parallel.unshard_unit=block"),
    ("model=wan_s2v_14b", "+preset=quality", "video.size=704x384", "hardware=8xh100", "hardware.nodes=2"),
    ("model=preview", "sampler.negative_prompt=a frown", "hardware=4x32gb"),
    (*DISTILL, "hardware=8x40gb", "objective.learn.rank=64", "speed.reshard=false"),
    (*DISTILL, "hardware=8xh100", "hardware.nodes=2", "name=my run"),
    ("+train=audio_adapter", "hardware=4x40gb", "parallel=fsdp", "parallel.context=2"),
]


@pytest.mark.parametrize("items", RUNS, ids=" ".join)
def test_the_command_of_every_plan_composes_to_that_plan(items, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch/plan.py"])
    monkeypatch.setattr(Wan, "settled_model", lambda family, model: model)  # whose weights are not here
    monkeypatch.chdir(infer_command.__file__.rpartition("/sonic/")[0])
    found = planned(*items)
    shown = [each["command"] for each in as_json(found)["plans"]]
    assert len(set(shown)) == len(shown) == len(found.plans)
    for plan, command in zip(found.plans, shown, strict=True):
        ranks, words = started(shlex.split(command))
        assert (ranks.world, ranks.local_world) == (len(plan.ranks), min(len(plan.ranks), found.hardware.devices))
        if plan.unit == "step":
            trained = compose(train_command.ENTRY, words)
            asked = compose(TRAINING_ENTRY, [*words, *(item for item in items if item.startswith(("video.", "hardware")))])
            same = plan_training(replace(asked, parallel=replace(asked.parallel, name="fsdp", context=trained.speed.context))).chosen
            assert (trained.speed.engine, trained.speed.cpu_offload) == ("fsdp", plan.parallel.cpu_offload)
        elif plan.missing_gib(found.hardware):
            compose(infer_command.ENTRY, words)
            continue
        else:
            config = replace(compose(infer_command.ENTRY, words), hardware=found.hardware)
            same = choose_plan.choose_plan(config, ranks, CPU, size=(found.work.width, found.work.height)).plan
        assert (same.name, same.peak_gib, same.seconds) == (plan.name, plan.peak_gib, plan.seconds), command


def started(words: list[str]) -> tuple[Ranks, list[str]]:
    """The ranks that a command line starts, and the options behind it."""
    job = next(place for place, word in enumerate(words) if word in ("infer", "train") or word.endswith(("infer.py", "train.py")))
    numbers = dict(word.lstrip("-").split("=") for word in words[:job] if word.startswith("--"))
    if words[0] == "sbatch":
        assert words[job - 1] == "launch/slurm.sh"
        nodes, local = int(numbers["nodes"]), int(numbers["gpus-per-node"])
        return Ranks(0, nodes * local, 0, local), words[job + 1 :]
    local = int(numbers.get("nproc-per-node", 1))
    assert (words[0] == "torchrun") == (local > 1)
    return Ranks(0, local, 0, local), words[job + 1 :]


def test_changes_come_with_the_command_that_makes_them():
    found = planned(*VIDEO, "hardware=1x24gb", "parallel=single")
    changes = as_json(found)["changes"]
    assert changes
    for change in changes:
        _, words = started(shlex.split(change["command"]))
        assert set(change["options"]) - set(words) <= {"parallel=auto"}
        compose(infer_command.ENTRY, words)


def test_without_a_launcher_for_slurm_torchrun_is_started_on_every_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("sonic.planner.command_line.data_root", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["venv/bin/sonic"])
    found = planned(*VIDEO, "hardware=8xh100", "hardware.nodes=2", "parallel=fsdp")
    line = command_line((), found.chosen, found.hardware)
    assert line.startswith("torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500")
    assert line.endswith("-m sonic infer parallel=fsdp")
