"""What a fit tells of its rounds: history, its table, the best of a round; and patience that ends rounds."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_prune as lp
from tests.naming import in_words
from tests.networks import Net, fitter, loader, same, state

BEST = {"filename": "{round:.0f}-{sparsity:.3f}", "monitor": "score", "mode": "max"}


class Scripted(Callback):
    """Log a score for each epoch, and note the round that it was for."""

    def __init__(self, scores, pruner):
        self.scores, self.pruner, self.rounds = scores, pruner, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rounds.append(self.pruner.round)
        trainer.callback_metrics["score"] = torch.tensor(float(self.scores[trainer.current_epoch]))


def pruning(rounds=2, **options):
    return lp.IterativeMagnitudePruning(lp.schedules.Geometric(0.5), rounds=rounds, **options)


def fitted(scores, folder, pruner, *others, epochs=None, ckpt_path=None, model=None):
    torch.manual_seed(0)
    script = Scripted(scores, pruner)
    best = ModelCheckpoint(folder, save_on_train_epoch_end=True, **BEST)
    trainer = fitter(pruner, script, *others, best, epochs=epochs or len(scores), enable_checkpointing=True)
    trainer.fit(model or Net(), ckpt_path=ckpt_path)
    return trainer, script


def test_history_names_the_best_checkpoint_of_each_round(tmp_path):
    pruner = pruning(every_n_epochs=2)
    fitted([1, 5, 4, 3, 1, 2], tmp_path, pruner)
    assert [row.best for row in pruner.history] == [5, 4, 2]
    for row, epoch in zip(pruner.history, [1, 2, 5], strict=True):
        file = torch.load(pruner.best(round=row.round))
        assert file["epoch"] == epoch
        bare = Net()
        bare.load_state_dict(file["state_dict"])
        dead = sum(int((bare.get_parameter(name) == 0).sum()) for name in pruner.masks)
        assert dead >= row.total - row.alive
    assert pruner.best() == pruner.best(round=2)
    assert pruner.best(sparsity=0.5) == pruner.best(round=1)
    assert pruner.best(sparsity=0.6) == pruner.best(round=2)
    assert pruner.best(sparsity=0) == pruner.best(round=0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"round": 3}, r"round=3: there was no such round\. Allowed are .*: 0 \(0\.0000\), 1 \(0\.5"),
        ({"sparsity": 0.9}, r"sparsity=0\.9: no round was so sparse"),
        ({"sparsity": 1.5}, "sparsity=1.5: allowed are fractions"),
        ({"sparsity": "a"}, "sparsity='a': allowed are fractions"),
        ({"round": "a"}, "round='a': allowed are whole numbers"),
        ({"round": True}, "round=True: allowed are whole numbers"),
        ({"round": 1, "sparsity": 0.5}, "allowed is one of them"),
    ],
    ids=in_words,
)
def test_a_round_that_was_not_has_no_best(asked, said, tmp_path):
    pruner = pruning()
    with pytest.raises(ValueError, match="no round is over yet; allowed is after a fit"):
        pruner.best()
    fitted([1, 2, 3], tmp_path, pruner)
    with pytest.raises(ValueError, match=said):
        pruner.best(**asked)


def test_without_a_checkpoint_of_each_round_it_is_said_how_to_have_one():
    pruner = pruning()
    fitter(pruner, epochs=3).fit(Net())
    with pytest.raises(ValueError, match=r"round 2 has no checkpoint.*ModelCheckpoint\(filename='{round"):
        pruner.best()
    assert [(row.best, row.checkpoint) for row in pruner.history] == [(None, "")] * 3


def test_a_fit_that_ends_shows_its_rounds(tmp_path, caplog):
    pruner = pruning()
    with caplog.at_level("INFO", logger="lightning_prune"):
        fitted([1, 5, 4], tmp_path, pruner)
    told = caplog.messages[-1].splitlines()
    assert told[0] == "the rounds (alive: weights, best: score):"
    assert re.split(r"\s{2,}", told[1].strip()) == [
        "round",
        "sparsity",
        "alive",
        "steps",
        "best",
        "checkpoint",
    ]
    rows = [re.split(r"\s{2,}", line.strip()) for line in told[3:]]
    for row, line in zip(pruner.history, rows, strict=True):
        name = f"round={row.round}-sparsity={row.sparsity:.3f}.ckpt"
        percent = f"{100 * row.sparsity:.2f} %"
        assert line == [str(row.round), percent, str(row.alive), "3", f"{row.best:.4g}", name]


def test_a_resumed_fit_knows_the_checkpoints_of_earlier_rounds(tmp_path):
    straight = pruning()
    fitted([1, 5, 4], tmp_path / "a", straight)
    resumed = pruning()
    fitted([1, 5, 4], tmp_path / "a", resumed, ckpt_path=straight.best(round=1))
    assert [(r.best, r.checkpoint) for r in resumed.history[:2]] == [
        (r.best, r.checkpoint) for r in straight.history[:2]
    ]


def test_a_finished_run_that_is_resumed_still_knows_the_best_of_its_last_round(tmp_path):
    straight = pruning()
    trainer, _ = fitted([1, 5, 4], tmp_path / "a", straight)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = pruning()
    fitted([1, 5, 4], tmp_path / "a", resumed, ckpt_path=tmp_path / "end.ckpt")
    assert resumed.best() == straight.best()
    assert [(r.round, r.best) for r in resumed.history] == [(r.round, r.best) for r in straight.history]


def test_a_finished_run_that_is_resumed_still_knows_that_patience_cut_its_last_round(tmp_path):
    straight, scores = pruning(rounds=1, every_n_epochs=4), [1, 2, 3, 4, 9, 8, 7, 6]
    trainer, _ = fitted(scores, tmp_path / "a", straight, stopping())
    assert [row.cut for row in straight.history] == [False, True]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = pruning(rounds=1, every_n_epochs=4)
    fitted(scores, tmp_path / "a", resumed, stopping(), ckpt_path=tmp_path / "end.ckpt")
    assert [row.cut for row in resumed.history] == [False, True]


@pytest.mark.parametrize("look", ["test", "validate"])
def test_what_is_looked_at_later_changes_nothing_of_the_history(look, tmp_path):
    pruner = pruning()
    model = Net()
    model.test_step = lambda batch, batch_idx: None
    trainer, _ = fitted([1, 5, 4], tmp_path, pruner, model=model)
    expected, best = list(pruner.history), pruner.best()
    for round in (1, 0, 2):
        path = pruner.best(round=round)
        getattr(trainer, look)(trainer.lightning_module, loader(shuffle=False), ckpt_path=path, verbose=False)
        assert pruner.history == expected
        assert pruner.best() == best
        assert pruner.round == round  # masks and round go with the weights


def test_updates_of_growth_have_no_best_of_their_own(tmp_path):
    pruner = lp.DynamicSparseTraining(0.5, every_n_train_steps=2, include=["body*"])
    fitted([1, 5, 4], tmp_path, pruner)
    assert {(row.best, row.checkpoint) for row in pruner.history} == {(None, "")}
    with pytest.raises(ValueError, match=r"updates of one training, and no rounds.*best_model_path"):
        pruner.best()


# --- patience that ends rounds ---


def test_patience_that_can_end_no_round_is_said():
    with pytest.warns(
        UserWarning, match="end_round_on_early_stop=True ends no round: there is no EarlyStopp"
    ):
        fitter(pruning(rounds=1, end_round_on_early_stop=True), epochs=2).fit(Net())


def stopping(**options):
    return EarlyStopping("score", mode="max", patience=2, check_on_train_epoch_end=True, **options)


@pytest.mark.parametrize("clock", [{"every_n_epochs": 5}, {"every_n_train_steps": 15}], ids=in_words)
@pytest.mark.parametrize("rewind", [False, True])
def test_patience_ends_a_round_and_in_the_last_round_the_fit(clock, rewind, tmp_path):
    pruner, stopper = pruning(**clock, end_round_on_early_stop=True), stopping()
    others = [lp.LotteryTicketRewind()] if rewind else []
    #         round 0    round 1         round 2
    scores = [5, 4, 3] + [2, 3, 1, 1] + [9, 8, 7] + [0] * 10
    trainer, script = fitted(scores, tmp_path, pruner, stopper, *others)
    assert script.rounds == [0] * 3 + [1] * 4 + [2] * 3
    assert [row.best for row in pruner.history] == [5, 3, 9]
    assert stopper.patience == 2
    assert stopper.stopped_epoch == 9
    assert trainer.current_epoch == 10


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_round_that_patience_cuts_is_said_in_the_table_and_what_that_did_to_the_schedule(
    scheduled, tmp_path, caplog
):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)] if scheduled else []

    pruner = pruning(every_n_epochs=4, end_round_on_early_stop=True)
    scores = [5, 4, 3] + [1, 2, 3, 4] + [9, 8, 7] + [0] * 10
    with caplog.at_level("INFO", logger="lightning_prune"):
        fitted(scores, tmp_path, pruner, stopping(), model=Scheduled())
    assert [row.cut for row in pruner.history] == [True, False, True]
    shown = next(m for m in caplog.messages if m.startswith("the rounds (")).splitlines()[3:]
    assert ["by patience" in line for line in shown] == [True, False, True]
    assert any("ended rounds 0, 2 early" in m for m in caplog.messages) == scheduled


def test_patience_that_ends_the_fit_is_said_in_the_table_too(tmp_path, caplog):
    pruner = pruning(every_n_epochs=4, rounds=1)
    with caplog.at_level("INFO", logger="lightning_prune"):
        fitted([1, 2, 3, 4, 5, 4, 3, 2], tmp_path, pruner, stopping())
    assert [row.cut for row in pruner.history] == [False, True]
    assert "by patience" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("how", "mixes"),
    [
        ({"monitor": "score", "mode": "max"}, True),
        ({"monitor": "score", "filename": "{epoch}-{score:.2f}"}, True),
        ({"monitor": "score", "filename": "{round:.0f}"}, False),
        ({"monitor": "score", "save_top_k": -1}, False),
        ({}, False),
    ],
    ids=in_words,
)
def test_a_checkpoint_that_compares_networks_of_several_sparsities_is_spoken_of_once(
    how, mixes, tmp_path, caplog
):
    pruner = pruning(rounds=1)
    keeps = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, **how)
    trainer = fitter(pruner, Scripted([1, 2], pruner), keeps, epochs=2, enable_checkpointing=True)
    with caplog.at_level("INFO", logger="lightning_prune"):
        trainer.fit(Net())
    told = [m for m in caplog.messages if "compares over all rounds" in m]
    assert len(told) == mixes
    assert all("monitor='score'" in m and "{round:.0f}" in m for m in told)


def test_a_round_that_goes_on_improving_has_its_length_and_so_has_the_last(tmp_path):
    pruner = pruning(every_n_epochs=3, end_round_on_early_stop=True)
    _, script = fitted(range(30), tmp_path, pruner, stopping())
    assert script.rounds == [0] * 3 + [1] * 3 + [2] * 3


def test_rounds_that_patience_ends_are_those_of_a_fit_with_that_length(tmp_path):
    pruner = pruning(every_n_epochs=9, end_round_on_early_stop=True)
    trainer, _ = fitted([1, 0, 0] * 3, tmp_path / "a", pruner, stopping(), lp.LotteryTicketRewind())
    oracle = pruning(every_n_epochs=3)
    expected, _ = fitted([1, 0, 0] * 3, tmp_path / "b", oracle, lp.LotteryTicketRewind())
    assert same(pruner.masks, oracle.masks)
    assert same(state(trainer)["params"], state(expected)["params"])


@pytest.mark.parametrize("epoch", range(6))
def test_resume_equals_straight_run_where_patience_ends_rounds(epoch, tmp_path):
    def run(folder, ckpt_path=None):
        pruner = pruning(every_n_epochs=5, end_round_on_early_stop=True)
        every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer, _ = fitted([1, 0, 0] * 3, folder, pruner, stopping(), every, ckpt_path=ckpt_path)
        return pruner, trainer

    straight, trainer = run(tmp_path / "a")
    saved = tmp_path / "a" / f"epoch={epoch}.ckpt"
    kept = next(v for k, v in torch.load(saved)["callbacks"].items() if k.startswith("EarlyStopping"))
    assert kept["patience"] == 2
    resumed, again = run(tmp_path / "b", saved)
    assert same(resumed.masks, straight.masks)
    assert same(state(again)["params"], state(trainer)["params"])
    assert [(r.round, r.steps) for r in resumed.history] == [(r.round, r.steps) for r in straight.history]


def test_what_is_no_matter_of_patience_still_ends_the_fit(tmp_path):
    pruner = pruning(every_n_epochs=5, end_round_on_early_stop=True)
    stopper = stopping(check_finite=True)
    _, script = fitted([1, float("nan"), 1, 1], tmp_path, pruner, stopper)
    assert script.rounds == [0, 0]
    assert stopper.patience == 2


def test_patience_ends_rounds_of_channels(tmp_path):
    pytest.importorskip("torch_pruning")
    schedule = lp.schedules.Linear(0.5, rounds=2)
    pruner = lp.StructuredChannelPruning(schedule, 2, every_n_epochs=5, end_round_on_early_stop=True)
    _, script = fitted([1, 0, 0] * 3, tmp_path, pruner, stopping())
    assert script.rounds == [0] * 3 + [1] * 3 + [2] * 3


def test_a_fit_that_fails_gives_patience_back(tmp_path):
    class Fails(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise KeyError("no")

    pruner, stopper = pruning(end_round_on_early_stop=True), stopping()
    with pytest.raises(KeyError):
        fitted([1, 1], tmp_path, pruner, stopper, Fails())
    assert stopper.patience == 2


def test_only_yes_or_no_says_whether_patience_ends_rounds():
    with pytest.raises(ValueError, match="end_round_on_early_stop='yes': allowed are True and False"):
        pruning(end_round_on_early_stop="yes")


@pytest.mark.parametrize(("first", "second"), [(2, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("every", [1, 2])
def test_a_round_has_the_steps_of_all_the_fits_that_it_took(first, second, every):
    pruner, rewind, model = pruning(every_n_epochs=every), lp.LotteryTicketRewind(), Net()
    for epochs in (first, second):
        fitter(pruner, rewind, epochs=epochs).fit(model)
    rows = pruner.history
    assert [row.steps for row in rows[:-1]] == [3 * every] * (len(rows) - 1)
    assert sum(row.steps for row in rows) == 3 * (first + second)


def test_between_validations_no_checkpoint_is_compared_by_the_round_before(tmp_path):
    pruner = pruning(every_n_epochs=2)
    name = "{round:.0f}-{step}-{val_loss:.6f}"
    best = ModelCheckpoint(tmp_path, name, monitor="val_loss", every_n_train_steps=2, save_top_k=-1)
    seen = {}

    class Seen(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.setdefault(pruner.round, []).append(f"{float(trainer.callback_metrics['val_loss']):.6f}")

    fitter(pruner, lp.LotteryTicketRewind(), Seen(), best, epochs=6, enable_checkpointing=True).fit(Net())
    found = [
        re.match(r"round=(\d)-step=\d+-val_loss=([\d.]+)\.ckpt", p.name) for p in tmp_path.glob("*.ckpt")
    ]
    assert {match[1] for match in found} == {"0", "1", "2"}
    assert all(match[2] in seen[int(match[1])] for match in found)


def test_a_metric_that_a_schedule_waits_for_stays():
    class Waits(Net):
        def on_train_start(self):
            self.trainer.callback_metrics["val_loss"] = torch.tensor(1.0)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    pruner = pruning(every_n_epochs=1)
    best = ModelCheckpoint(filename="{round:.0f}", monitor="val_loss", every_n_train_steps=2)
    options = {"enable_checkpointing": True, "check_val_every_n_epoch": 2}
    fitter(pruner, lp.LotteryTicketRewind(), best, epochs=3, **options).fit(Waits())
    assert pruner.round == 2
