"""Shards: masks on them are those of one process, bit for bit, and the laws hold on each."""

import json
import random
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch

import lightning_prune as lp
from lightning_prune import folders
from lightning_prune.callbacks.checkpoints import load_masks
from lightning_prune.study.configs import load
from lightning_prune.study.training import built
from tests.networks import dead_are_zero, same
from tests.ranks import processes, started
from tests.sharded import ENDS, GROWING, RUNS, Dies, Whole, be_left_alone, fit, live_and_die, on_gpus, work

FAST = [
    *("parts", "cases", "held", "settings", "put_on", "refused", "tickets", "resumed", "resumed_folders"),
    *("stored", "drawn", "driven", "refused_fits", "tickets_of_gradients", "documented"),
    *("gathered", "tickets_of_activations", "spoilt_files", "given_otherwise", "summarized"),
    *("grown", "grown_and_resumed", "exchanges", "refused_growth"),
]
SLOW = [
    name
    for name in RUNS
    if name not in ("cases", "driven", "documented", "exchanges", "refused_fits", "resumed_from_two")
]


def ran(world, folder, names):
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no fully_shard for the CPU")
    results = processes(world, folder, names, work)
    failed = [
        f"{name} of {world}: {rank['failed']}"
        for name, ranks in results.items()
        for rank in ranks
        if isinstance(rank, dict) and "failed" in rank
    ]
    assert not failed, "\n".join(failed)
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return {**ran(2, folder, FAST), "folder": folder}


@pytest.fixture(scope="module", params=[2, 4])
def many(request, tmp_path_factory):
    return ran(request.param, tmp_path_factory.mktemp("many"), SLOW)


def check_parts(seen):
    for rank in seen["parts"]:
        assert not rank["wrong"]
    return seen["parts"][0]["placements"]


def check_cases(of_ranks, n):
    for rank in of_ranks:
        assert len(rank) >= n
        assert sum(case["bits"] for case in rank) == 0
        assert not [case["options"] for case in rank if not case["equal"]]
        assert any(0 < case["left"] < case["size"] for case in rank)


def check_held(seen):
    for rank in seen["held"]:
        assert not any(rank.values()), rank
        assert len(rank) >= 4


def test_each_process_knows_its_part(two):
    assert len(check_parts(two)) >= 3  # rows, columns, whole


def test_masks_on_shards_are_those_of_one_process(two):
    check_cases(two["cases"], 16)


def test_masks_of_data_on_shards_are_those_of_one_process(two):
    """Each process has a part of each batch; one process has all of it. Granularities of outputs, too."""
    check_cases(two["driven"], 14)


def test_dead_weights_stay_dead_on_shards(two):
    check_held(two)


def test_random_scores_of_shards_are_those_of_the_whole(two):
    for rank in two["drawn"]:
        assert rank == []


def test_dead_weights_stay_dead_on_shards_however_they_compute(two):
    """In bfloat16, mixed precision, with activation checkpointing, compiled by blocks."""
    for rank in two["settings"]:
        assert len(rank) == 5
        assert not any(rank.values()), rank


def test_masks_are_put_on_shards(two):
    for rank in two["put_on"]:
        assert rank == {"rows": True, "same": True, "zero": True}


def test_counts_and_sizes_of_shards_are_those_of_one_process(two):
    for rank in two["summarized"]:
        assert rank == {}


REFUSED = {
    "granularity": "ValueError: granularity: Filter(dim=1, n=1) puts weights of 0.weight together",
    "blocks": "ValueError: granularity: Block(rows=2, columns=2, n=1) puts weights of 0.weight together",
    "columns": "ValueError: granularity: NM(n=2, m=4) puts weights of 2.weight together",
    "run": "ValueError: criterion: SynFlow",
    "twice": "ValueError: criterion: GraSP",
    "ranks": "ValueError: criterion: large_init_large_final ranks",
    "batches": "ValueError: batches: processes have 1, 2 of them",
    "accelerate": "ValueError: accelerate does not work on weights that are sharded",
    "schedule": "ValueError: schedule: it reads the scores",
    "allocation": "ValueError: allocate: refused.<locals>.<lambda> does",
    "layer_by_layer": "ValueError: layer_by_layer=True does not work on weights that are sharded",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_shards_cannot_do_is_refused_by_name(what, two):
    for rank in two["refused"]:
        assert rank[what].startswith(REFUSED[what])
        assert rank["unchanged"] is True


def test_arguments_that_differ_between_processes_are_refused_by_name(two):
    first, last = two["given_otherwise"]
    assert first == last
    assert first.pop("unchanged") is True
    assert len(first) == 14
    for name, words in first.items():
        assert re.match(f"ValueError: {name.removeprefix('fit ')}: process 1 has .*and process 0 has ", words)


def test_fits_that_shards_cannot_do_are_refused_by_name(two):
    for rank in two["refused_fits"]:
        assert "EMAWeightAveraging keeps a copy of the module" in rank["averages"]
        assert "StochasticWeightAveraging keeps a copy of the module" in rank["swa"]
        assert "step=9.ckpt' does not point to a valid checkpoint" in rank["torn"]  # says Lightning
    (warning,) = two["refused_fits"][0]["warned"]
    assert re.search("step=9.ckpt has no meta.pt.*Remove it. The newest whole one is .*step=8.ckpt", warning)


def test_no_process_waits_for_one_that_failed(two):
    first, last = two["refused"]
    assert last["one_fails"] == "OSError: no space left"
    assert (
        first["one_fails"]
        == "ValueError: process 1 failed, and all are needed. Look at its error: no space left"
    )
    assert "the weight 0.weight holds NaN" in first["nan"]
    assert "the weight 0.weight holds NaN" in last["nan"]


def test_no_process_waits_for_the_first_one_that_cannot_write(two):
    first, last = two["spoilt_files"]
    for name, wrong in (("missing", "No such file"), ("full", "no space left"), ("fit", "No such file")):
        assert re.match(f"(OSError|FileNotFoundError): .*{wrong}", first[name])
        assert re.search(f"0 failed, and all .*are needed. Look at its error: .*{wrong}", last[name])
        assert not first["left"]


def test_a_cut_network_is_not_loaded_onto_shards(two):
    for rank in two["spoilt_files"]:
        assert "0.weight is (8, 6) there and (9, 6) in the model, which is sharded" in rank["cut"]


def test_older_ways_to_shard_are_refused_in_plain_calls(two):
    for rank in two["refused"]:
        words = [text for name, text in rank.items() if name.startswith("fsdp1")]
        assert len(words) == 3
        for text in words:
            assert "FullyShardedDataParallel, which keeps parts of weights" in text
            assert "ModelParallelStrategy" in text


def check_tickets(of_ranks):
    for rank in of_ranks:
        alone = rank["alone"]
        assert len(alone["prunings"]) == 2
        for way in sorted(rank.keys() - {"alone"}):
            found = rank[way]
            assert not found["wrong"]
            assert same(found["prunings"], alone["prunings"]), way
            assert [what for what in ENDS if not same(found[what], alone[what])] == [], way


def test_a_lottery_ticket_on_shards_is_that_of_one_process(two):
    check_tickets(two["tickets"])


def test_a_lottery_ticket_by_gradients_on_shards_is_that_of_one_process(two):
    check_tickets(two["tickets_of_gradients"])


def test_a_lottery_ticket_by_activations_is_that_of_one_process_where_validation_leaves_weights_gathered(two):
    check_tickets(two["tickets_of_activations"])


def test_weights_that_a_forward_left_gathered_are_read_as_shards(two):
    assert two["gathered"] == [{}, {}]


def check_grown(of_ranks):
    for rank in of_ranks:
        assert len(rank) >= 4
        for name, ways in rank.items():
            alone = ways["alone"]
            assert len(alone["prunings"]) > 3, name
            assert alone["explored"] > 1 - alone["sparsity"], name
            for way in sorted(ways.keys() - {"alone"}):
                found = ways[way]
                assert not found["wrong"], (name, way)
                assert same(found["prunings"], alone["prunings"]), (name, way)
                assert [what for what in ENDS if not same(found[what], alone[what])] == [], (name, way)


def check_exchanges(of_ranks, n):
    for rank in of_ranks:
        assert len(rank) >= n
        assert all(equal for equal, _ in rank)
        assert sum(changed for _, changed in rank) > n / 2


def test_masks_that_grow_on_shards_are_those_of_one_process(two):
    check_grown(two["grown"])


def test_exchanges_of_parts_are_those_of_the_whole(two):
    check_exchanges(two["exchanges"], 40)


@pytest.mark.parametrize("where", ["files", "folders"])
def test_growth_that_is_resumed_on_shards_ends_with_the_same_bits(where, two):
    for rank in two["grown_and_resumed"]:
        straight = rank[where]["straight"]
        assert len(straight["prunings"]) == 7
        for resumed in rank[where]["resumed"]:
            assert [what for what in ENDS if not same(resumed[what], straight[what])] == []
            assert not resumed["wrong"]


@pytest.mark.parametrize("save", [False, True], ids=["files", "folders"])
def test_growth_on_shards_goes_on_with_one_process(save, two):
    straight = two["grown_and_resumed"][0]["folders" if save else "files"]["straight"]
    check_alone(
        two["folder"] / f"grown-{save}" / "step=12.ckpt", straight, growing=GROWING["snfs" if save else "set"]
    )


def test_growth_that_shards_cannot_do_is_refused_by_name(two):
    for rank in two["refused_growth"]:
        assert "granularity=FanIn(ablate=0.3): its rows share the weights of a layer" in rank["rows"]
        assert "granularity=NM(n=2, m=4): its rows share the weights of a layer" in rank["pattern"]
        assert rank["runs"].startswith("ValueError: grow: GraSP")
        assert rank["ranks"].startswith("ValueError: drop: large_init_large_final compares")
        assert "does not ask for `together`" in rank["alone"]
        assert "gives all dead weights of a layer the same score" in rank["same"]
        assert re.match(
            "ValueError: sparsity in update 0: process 1 has 0.6, and process 0", rank["sparsity"]
        )
        assert re.match(
            "ValueError: fraction in update 0: process 1 has 0.6, and process 0", rank["fraction"]
        )
        assert re.match("ValueError: sparsity: process 1 has 0.6, and process 0", rank["schedule"])
        for where in ("grown elsewhere", "pruned elsewhere"):
            assert "allowed is the same model on all" in rank[where]


def check_resumed(of_ranks):
    for rank in of_ranks:
        for resumed in rank["resumed"]:
            assert [what for what in ENDS if not same(resumed[what], rank["straight"][what])] == []
            assert not resumed["wrong"]


def test_a_resumed_run_on_shards_ends_with_the_same_bits(two):
    check_resumed(two["resumed"])


def check_alone(path, straight, **options):
    """A checkpoint of two processes goes on with one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # generators of two processes, and here is one
        alone = fit(None, 1, ckpt_path=path, **options)
    assert [what for what in ENDS if not same(alone[what], straight[what])] == []


def test_a_checkpoint_of_shards_goes_on_with_one_process_and_in_the_bare_model(two):
    path = two["folder"] / "checkpoints" / "step=8.ckpt"
    check_alone(path, two["resumed"][0]["straight"])
    state = torch.load(path, weights_only=True)["state_dict"]
    Whole().load_state_dict(state, strict=True)


def test_a_run_that_is_resumed_from_a_folder_of_shards_ends_with_the_same_bits(two):
    check_resumed(two["resumed_folders"])


def test_a_folder_of_shards_goes_on_with_one_process_and_in_the_bare_model(two):
    path = two["folder"] / "folders" / "step=8.ckpt"
    check_alone(path, two["resumed_folders"][0]["straight"])
    model, other = Whole(), Whole()
    with pytest.raises(ValueError, match="read by pickle"):
        lp.load_pruned(model, path)
    path = path.with_name("step=17.ckpt")
    lp.load_pruned(model, path, weights_only=False)
    other.load_state_dict(folders.whole(path)["state_dict"], strict=True)
    dead = sum((layer.weight == 0).sum() for layer in model.net)
    assert dead >= 51  # which were pruned before
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert not same(dict(model.state_dict()), dict(Whole().state_dict()))


def test_a_folder_of_shards_goes_on_in_another_way_to_shard(two):
    check_moved(two, ran(2, two["folder"], ["resumed_from_two"]))


def check_moved(two, seen):
    straight = two["resumed_folders"][0]["straight"]
    for rank in seen["resumed_from_two"]:
        for moved in rank:
            assert [what for what in ENDS if not same(moved[what], straight[what])] == []
            assert not moved["wrong"]


@pytest.mark.slow
def test_a_folder_of_two_processes_goes_on_with_four(two):
    check_moved(two, ran(4, two["folder"], ["resumed_from_two"]))


def killed_and_resumed(world, folder, seed):
    """Trained to the end, whatever kills the processes on the way: how often, and what came of it."""
    chance, folder = random.Random(seed), folder / f"{seed}"
    (folder / "checkpoints").mkdir(parents=True)
    deaths = sorted((chance.randrange(1, 24), chance.choice(Dies.HOOKS)) for _ in range(2))
    kills = 0
    while True:
        for process in (running := started(world, live_and_die, folder, bool(seed % 2), deaths)):
            process.join(300)
        codes = {process.exitcode for process in running}
        if codes == {0}:
            return kills, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
        assert codes <= {-signal.SIGKILL, 1}, codes  # 1: told that the other one is gone
        kills, deaths = kills + 1, deaths[1:]


def check_killed(world, folder, straight, seeds):
    ends, kills = [what for what in ENDS if what != "optimizers"], 0
    for seed in seeds:
        n, of_ranks = killed_and_resumed(world, folder, seed)
        kills += n
        for rank, found in enumerate(of_ranks):
            assert [what for what in ends if not same(found[what], straight[rank][what])] == [], seed
            assert not found["wrong"]
    return kills


def test_killed_at_any_step_shards_go_on_to_the_same_bits(two, tmp_path):
    straight = [rank["straight"] for rank in two["resumed"]]
    assert check_killed(2, tmp_path, straight, [1]) >= 1


@pytest.mark.slow
def test_killed_and_resumed_twenty_times_shards_end_with_the_same_bits(two, tmp_path):
    straight = [rank["straight"] for rank in two["resumed"]]
    assert check_killed(2, tmp_path, straight, range(2, 14)) >= 20


def test_a_process_that_is_killed_ends_the_others_with_a_message(tmp_path):
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no fully_shard for the CPU")
    for process in (running := started(2, be_left_alone, tmp_path)):
        process.join(120)
    assert [process.exitcode for process in running] == [0, -signal.SIGKILL]
    left = torch.load(tmp_path / "0.pt", weights_only=True)
    assert left["seconds"] < 30  # the timeout of their group
    assert re.search("(?i)connection|peer|timed out", left["words"]), left["words"]


def test_the_command_line_trains_a_ticket_on_two_processes(tmp_path):
    """`lightning-prune run trainer=fsdp2`, on MNIST-1D; the same command again finds it finished."""
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no fully_shard for the CPU")
    short = ["rounds=2", "steps_per_round=20", "evaluate_every=20", "progress=false", f"runs={tmp_path}"]
    main = "from lightning_prune.study.command import main; main()"
    run = [sys.executable, "-c", main, "run", "experiment=mnist1d", "trainer=fsdp2", *short]
    said = subprocess.run(run, capture_output=True, text=True, timeout=240, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    (folder,) = (path.parent for path in tmp_path.glob("*/*/DONE"))
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["alive"] for row in rows] == [50_000, 35_300, 24_965]
    task = built(load(folder / "config.yaml"))
    start = {name: p.clone() for name, p in task.named_parameters()}
    lp.load_pruned(task, folder / "final.ckpt")  # which has names and shapes of one process
    masks = load_masks(folder / "final.ckpt")
    assert sum(int(mask.sum()) for mask in masks.values()) == 24_965
    assert dead_are_zero(dict(task.named_parameters()), masks)
    assert not any(torch.equal(p, start[name]) for name, p in task.named_parameters() if name in masks)


def test_a_sparse_file_of_shards_is_that_of_one_process(two):
    assert two["stored"] == [True, True]


def test_the_documented_examples_run(two):
    assert two["documented"] == [{"blocks": 4, "round": 2, "sparsity": 0.36}] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed, which talk by NCCL")
def test_masks_on_shards_on_gpus_are_those_of_one_process(tmp_path):
    for process in (running := started(2, on_gpus, tmp_path)):
        process.join(300)
    assert [process.exitcode for process in running] == [0, 0]
    assert [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)] == [[], []]


@pytest.mark.slow
def test_shards_of_two_and_of_four_processes(many):
    """With the ways to cut that need four: both at once, and replicas of shards."""
    check_parts(many)
    check_cases(many["many_cases"], 80)
    check_cases(many["many_driven"], 84)
    check_held(many)
    check_tickets(many["tickets"])
    check_tickets(many["tickets_of_gradients"])
    check_grown(many["grown"])
    check_exchanges(many["many_exchanges"], 200)
    check_resumed(many["resumed"])
    check_resumed(many["resumed_folders"])
    assert not any(any(rank.values()) for rank in many["settings"])
    assert not any(many["drawn"])
