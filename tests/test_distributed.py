"""Ranks agree: real processes, by gloo, with other data, other weights and other random numbers on each."""

import itertools

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

import lightning_prune as lp
from lightning_prune import growth
from lightning_prune.evidence import gradients
from lightning_prune.layers import layouts
from lightning_prune.masks import alive
from lightning_prune.pruning import next_masks
from tests.networks import Net, bits_of, dead_are_zero, fitter, same
from tests.ranks import GROWN, POLICIES, RUNS, WAITS, Loaded, drawn, processes, pruning, still
from tests.reference import global_selection

ONLY_2 = ["channels", "gradients_in_buckets", "unused_parameters", "stopped_by_a_metric_of_each_rank"]
ONLY_2 += ["patience_of_each_rank"]
TROUBLE = {  # of rank 1: what it says, the round it is in, and rows of history
    "one_rank_fails_in_on_prune": ("OSError: no space left", 0, 0),
    "one_rank_fails_in_on_round_start": ("OSError: no space left", 1, 1),  # the rewind has been by then
    "one_rank_has_no_masks": ("ValueError: masks=", 0, 0),
    "one_rank_cannot_score": ("ValueError: score: not on this machine", 0, 0),
    "one_rank_has_dead_weights_alive": ("RuntimeError: body.weight: ", 1, 1),
}
ONLY_2 += [*TROUBLE, *WAITS, "one_rank_has_other_layers"]
TRAINED = ["magnitude", "weights_that_stand_still", "random", "drawn_from_the_generator", "snip", "uneven"]
TRAINED += ["unused_parameters", "static_graph", "gradients_in_buckets", "rank_local", "straight"]
TRAINED += POLICIES


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks of two and of four processes saw, all in one folder."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "2").mkdir(), (folder / "4").mkdir()
    names = {2: [n for n in RUNS if n != "resumed_by_more"], 4: [n for n in RUNS if n not in ONLY_2]}
    results = {world: processes(world, folder, names[world]) for world in (2, 4)}
    failed = {
        f"{name} of {world}: {rank['failed']}"
        for world, runs in results.items()
        for name, ranks in runs.items()
        for rank in ranks
        if isinstance(rank, dict) and "failed" in rank
    }
    assert not failed, "\n".join(failed)
    return {**results, "folder": folder}


def equal(ranks, *keys):
    first, *others = ranks
    return all(same(rank[key], first[key]) for rank in others for key in keys)


@pytest.mark.parametrize(
    ("name", "world"), [(name, w) for name in TRAINED for w in (2, 4) if w == 2 or name not in ONLY_2]
)
def test_ranks_agree(name, world, seen):
    ranks = seen[world][name]
    # they began with other random numbers and saw other data; DDP made their weights one
    assert not any(same(a["random"], b["random"]) for a, b in itertools.combinations(ranks, 2))
    if name != "snip":  # without dropout
        assert not any(same(a["batches"], b["batches"]) for a, b in itertools.combinations(ranks, 2))
    assert not any(same(a["start"], b["start"]) for a, b in itertools.combinations(ranks, 2))
    assert equal(ranks, "masks", "prunings", "before", "round")
    buffers = {"norm.running_mean", "norm.running_var"}  # which DDP keeps apart
    for rank in ranks:
        assert dead_are_zero(rank["weights"], rank["masks"])
        mine, first = ({n: v for n, v in r["weights"].items() if n not in buffers} for r in (rank, ranks[0]))
        assert same(mine, first)
    expected = 200 if name == "snip" else round(0.7**2 * sum(m.numel() for m in ranks[0]["masks"].values()))
    assert alive(ranks[0]["masks"]) == expected


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["magnitude", "uneven", "static_graph", "straight"])
def test_masks_are_those_that_one_process_makes_of_these_weights(name, world, seen):
    masks = None
    diary = seen[world][name][0]
    step = 2 if name == "straight" else 1  # epochs a round
    for r, expected in enumerate(diary["prunings"], 1):
        before = diary["before"][step * r - 1]
        dense = {n: torch.ones_like(p, dtype=torch.bool) for n, p in before.items()}
        scores = {n: p.abs().masked_fill(~(masks or dense)[n], -torch.inf) for n, p in before.items()}
        masks = global_selection(scores, round(0.7**r * 400))
        assert same(masks, expected)


def alone(seed, start, pruner, **options):
    """The same training on one process."""
    torch.manual_seed(seed)
    model = Net(**options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    fitter(pruner, epochs=3).fit(model)
    return pruner.masks


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", POLICIES)
def test_every_rank_begins_a_round_with_what_the_policy_says(name, world, seen):
    ranks = seen[world][name]
    assert equal(ranks, "after", "optimizers")
    rank = ranks[0]
    length = 2 if name == "policy_early_bird" else 3  # epochs
    for round, (masks, after) in enumerate(zip(rank["prunings"], rank["after"], strict=True), 1):
        final = rank["before"][length * round - 1]
        early = {"policy_everything": "early", "policy_weights": "start", "policy_early_bird": "start"}
        weights = rank[early[name]] if name in early else final
        assert same(after["weights"], {n: weights[n].where(m, 0.0) for n, m in masks.items()})
        epochs = {"policy_weights": length * round, "policy_nothing": length * round}
        epochs["policy_fine_tune"] = length - 1
        assert after["optimizers"][0]["param_groups"][0]["lr"] == 0.1 * 0.5 ** epochs.get(name, 0)


@pytest.mark.parametrize("world", [2, 4])
def test_masks_of_equal_weights_equal_those_of_one_process(world, seen):
    ranks = seen[world]["weights_that_stand_still"]
    start = ranks[0]["start"]
    assert same(alone(1000 * world, start, pruning(), make=still), ranks[0]["masks"])


@pytest.mark.parametrize("world", [2, 4])
def test_random_masks_equal_those_of_one_process(world, seen):
    for name, criterion in (("random", lp.criteria.Random(seed=3)), ("drawn_from_the_generator", drawn)):
        first = seen[world][name][0]
        expected = alone(first["seed"], first["start"], pruning(criterion=criterion))
        assert same(expected, first["masks"])
        assert first["seed"] == 1000 * world  # of rank 0


@pytest.mark.parametrize("world", [2, 4])
def test_scores_from_data_are_those_of_all_ranks_data_on_one_process(world, seen):
    ranks = seen[world]["snip"]
    evidence, masks = ranks[0]["seen"], ranks[0]["masks"]
    assert len(evidence["batches"]) == 2 * world or len(evidence["batches"]) == world
    assert all(same(rank["seen"], evidence) for rank in ranks)
    assert len({tuple(x.flatten().tolist()) for x, _ in evidence["batches"]}) == len(evidence["batches"])
    model = Net(dropout=0.0)
    model.norm = nn.Identity()
    model.load_state_dict(evidence["weights"], strict=False)
    total = {n: torch.zeros_like(p) for n, p in evidence["weights"].items()}
    for x, y in evidence["batches"]:
        model.zero_grad()
        with torch.no_grad():
            for name, p in ranks[0]["start"].items():
                model.get_parameter(name).copy_(p)
        nn.functional.cross_entropy(model(x), y).backward()
        for name, g in total.items():
            g += model.get_parameter(name).grad
    scores = {n: (evidence["weights"][n] * g / len(evidence["batches"])).abs() for n, g in total.items()}
    expected = next_masks(
        evidence["weights"],
        {n: torch.ones_like(m) for n, m in masks.items()},
        [(list(masks), 0.5)],
        criterion=lambda params: scores,
    )
    assert same(masks, expected)


def test_channels_are_the_same_on_every_rank(seen):
    ranks = seen[2]["channels"]
    assert equal(ranks, "masks", "weights")
    assert alive(ranks[0]["masks"]) == 8
    assert ranks[0]["weights"]["stem.0.weight"].shape == (8, 6)


@pytest.mark.parametrize("name", ["magnitude", "static_graph", "gradients_in_buckets"])
def test_gradients_of_the_dead_are_zero_after_they_were_averaged(name, seen):
    for rank in seen[2][name]:
        assert len(rank["gradients"]) >= 9
        assert not any(rank["gradients"])


def test_a_rank_local_random_mask_would_fail_these_tests(seen):
    for world in (2, 4):
        ranks = seen[world]["rank_local"]
        assert not any(same(a["alone"], b["alone"]) for a, b in itertools.combinations(ranks, 2))
        for rank in ranks:
            assert "masks differ between processes: those of process 1" in rank["error"]


def test_masks_that_differ_between_ranks_are_refused_on_all_of_them(seen):
    for rank in seen[4]["other_masks_on_every_rank"]:
        assert "masks: process 1 has " in rank["error"]


# -------------------------------------------------------------------------------------- ranks decide together


def test_all_ranks_stop_where_the_first_one_does(seen):
    ranks = seen[2]["stopped_by_a_metric_of_each_rank"]
    assert equal(ranks, "masks", "round", "prunings")
    assert ranks[0]["round"] == 1  # by its own metric, rank 1 would have gone on to round 2


def test_a_round_ends_for_all_ranks_where_the_patience_of_one_does(seen):
    ranks = seen[2]["patience_of_each_rank"]
    assert equal(ranks, "masks", "round", "prunings")
    assert all(rank["round"] == 1 and len(rank["prunings"]) == 1 for rank in ranks)


@pytest.mark.parametrize("name", TROUBLE)
def test_no_rank_waits_for_one_that_failed(name, seen):
    """Each ends with an error; the others say which rank it was, and all are as they were."""
    said, round, rows = TROUBLE[name]
    first, second = seen[2][name]
    assert second["error"].startswith(said)
    assert first["error"].startswith(
        f"RuntimeError: process 1 failed, and all are needed. Look at its error: {said}"
    )
    assert [rank["round"] for rank in (first, second)] == [round] * 2
    assert [rank["history"] for rank in (first, second)] == [rows] * 2
    assert same(first["masks"], second["masks"])


def test_arguments_that_differ_between_processes_are_refused_on_all_of_them(seen):
    for rank in seen[2]["one_rank_has_other_layers"]:
        assert rank["error"].startswith("ValueError: include: process 1 has ['nothing*'], and process 0 has")
        assert rank["round"] == 0


# ----------------------------------------------------------------------------------- checkpoints and resuming


ENDS = ("masks", "weights", "optimizers", "random", "round")


@pytest.mark.parametrize("world", [2, 4])
def test_a_resumed_run_of_several_processes_ends_with_the_same_bits_on_each(world, seen):
    """Dropout, shuffling by a generator of the loader, and what is left of the random numbers."""
    straight = seen[world]["straight"]
    for place, epoch in enumerate((0, 1, 4)):
        for rank, expected in zip(seen[world]["resumed"], straight, strict=True):
            result = rank[place]
            assert same(result["prunings"], expected["prunings"][epoch // 2 :])
            assert not {key for key in ENDS if not same(result[key], expected[key])}
            assert same(result["batches"], expected["batches"][3 * (epoch + 1) :])


def test_rank_0_writes_and_nobody_else(seen):
    for world in (2, 4):
        (seen["folder"] / str(world) / "end.safetensors").unlink()  # save_sparse, by rank 0, too
        files = sorted(path.name for path in (seen["folder"] / str(world)).iterdir())
        assert files == [*(f"epoch={epoch}.ckpt" for epoch in range(6))]
        file = torch.load(seen["folder"] / str(world) / "epoch=5.ckpt", weights_only=True)
        assert same(dict(file["state_dict"]), seen[world]["straight"][0]["weights"])
        state = next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))
        assert len(state["resumption"]["ranks"]) == world
        assert same(
            [s["torch"] for s in state["resumption"]["ranks"]], [r["random"] for r in seen[world]["straight"]]
        )


def test_a_checkpoint_goes_on_with_more_processes_and_says_what_does_not(seen):
    ranks = seen[4]["resumed_by_more"]
    assert equal(ranks, "masks", "prunings", "round")
    assert same(ranks[0]["prunings"][0], seen[2]["straight"][0]["prunings"][0])  # of the checkpoint's weights
    assert alive(ranks[0]["masks"]) == round(0.49 * 400)
    for rank in ranks:
        assert dead_are_zero(rank["weights"], rank["masks"])
    told = [text for text in ranks[0]["warnings"] if "2 processes, and here are 4" in text]
    assert len(told) == 1


def test_a_checkpoint_goes_on_with_one_process(seen):
    pruner, model = pruning(every_n_epochs=2), Loaded(0)
    model.schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)
    path = seen["folder"] / "2" / "epoch=1.ckpt"
    be_aware = pytest.warns(UserWarning, match="Be aware that")  # of ModelCheckpoint, which is not here
    with be_aware, pytest.warns(UserWarning, match="generators of 2 processes, and here are 1"):
        fitter(pruner, lp.LotteryTicketRewind(2), epochs=6).fit(model, ckpt_path=path)
    assert alive(pruner.masks) == round(0.49 * 400)
    assert dead_are_zero(dict(model.state_dict()), pruner.masks)


# --------------------------------------------------------------------------------------------------- refusals


KINDS = [lp.IterativeMagnitudePruning, lp.StructuredChannelPruning, lp.DynamicSparseTraining]


def said_of(kind, strategy):
    pruner, trainer = kind(), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = strategy  # an instance takes devices, or a package, that are not here
    with pytest.raises(ValueError, match=f"strategy: {strategy.__name__} ") as error:
        pruner.setup(trainer, Net(), "fit")
    return str(error.value)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("kind", KINDS)
def test_strategies_that_shard_parameters_where_no_mask_can_be_put_are_refused(kind, strategy):
    instead = " and DDP" if kind is lp.StructuredChannelPruning else ", DDP and ModelParallelStrategy"
    assert (
        f"may shard parameters over devices, and masks need whole ones, or such as FSDP2 and tensor parallel \
make. Allowed are a single device{instead}"
        in said_of(kind, strategy)
    )


def test_what_needs_whole_weights_is_refused_on_shards():
    said = said_of(lp.StructuredChannelPruning, ModelParallelStrategy)
    assert "Allowed are a single device and DDP. Use one of them, or IterativeMagnitudePruning." in said


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", GROWN)
def test_ranks_grow_the_same_by_the_mean_of_their_gradients(name, world, seen):
    ranks, pattern = seen[world][name], GROWN[name]
    assert equal(ranks, "masks", "prunings", "round", "explored")
    assert not same(ranks[0]["labelled"], ranks[1]["labelled"])
    masks, *updates = ranks[0]["prunings"]
    assert len(updates) == ranks[0]["round"] > 1
    for update, found in enumerate(updates, 1):
        of_ranks = []
        for rank in ranks:
            model = Net(dropout=0.0)
            model.load_state_dict(rank["states"][2 * update])
            weights = {n: model.get_parameter(n) for n in masks}
            loss = lambda net, batch: torch.nn.functional.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
            of_ranks.append(gradients(weights, model, loss, rank["labelled"][2 * update]))
        grow = {n: (sum(g[n] for g in of_ranks) / world).abs() for n in masks}
        drop = {n: w.detach().abs() for n, w in weights.items()}
        number = growth.in_exchange(masks, 0.5)
        if name == "rigl":
            masks = growth.exchanged(masks, number, drop, grow)
        else:
            masks = growth.exchanged_within(pattern, masks, number, drop, grow, layouts(model, masks))
        assert same(masks, found)
    for rank in ranks:
        assert dead_are_zero(rank["weights"], masks)


STEPS = {  # between two updates, the first of which is at step 2 if nothing is wrong
    "without_loss_on_0": [3, 1, 2, 6],
    "without_loss_on_1": [5, 1, 6],
    "without_loss_on_both": [3, 1, 2, 6],
    "failing_on_1": [2],
}


@pytest.mark.parametrize("name", WAITS)
def test_an_update_waits_on_all_ranks_where_one_has_no_evidence(name, seen):
    """And where one fails, none waits for it."""
    first, second = seen[2][name]
    kind = next(kind for kind in STEPS if name.endswith(kind))
    if kind == "failing_on_1":
        assert second["error"] == "OSError: no space left"
        assert first["error"].startswith(
            "RuntimeError: process 1 failed, and all are needed. Look at its err"
        )
    else:
        assert first["error"] == second["error"] == "nothing"
    assert first["steps"] == second["steps"] == STEPS[kind]
    assert same(first["masks"], second["masks"])


def test_bits_are_compared(seen):
    """Equal here means bit for bit: the comparison of these tests can fail."""
    first = seen[2]["magnitude"][0]["weights"]
    other = {n: v.clone() for n, v in first.items()}
    bits_of(other["head.weight"]).view(-1)[0] += 1
    assert not same(first, other)
