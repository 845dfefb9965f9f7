"""What others stumbled over with channels, each as a law; more of them are in the tests of the parts."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune import filters, schedules
from lightning_prune.structured import discover
from tests.networks import Net, fitter
from tests.test_channels import IMAGE, Halves, Recurrence, Residual


class Looked(Net):
    """Says its loss in every kind of evaluation."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return self.val_dataloader()


@pytest.mark.parametrize("fresh", [False, True], ids=["the model in hand", "a fresh one"])
@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_evaluation_of_any_checkpoint_after_a_fit_gives_what_was_validated(remove, fresh, tmp_path):
    pruner = lp.StructuredChannelPruning(schedules.Linear(sparsity=0.5, rounds=2), rounds=2, remove=remove)
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)
    model, validated = Looked(), []
    model.on_validation_epoch_end = lambda: validated.append(
        float(model.trainer.callback_metrics["val_loss"])
    )
    trainer = fitter(pruner, best, epochs=3, enable_checkpointing=True)
    trainer.fit(model)
    del model.on_validation_epoch_end
    assert len(validated) == 3
    which = {"best": min(validated), "last": validated[-1]}
    which |= {str(tmp_path / f"epoch={epoch}.ckpt"): loss for epoch, loss in enumerate(validated)}
    for path, want in which.items():
        net = Looked() if fresh else model
        (found,) = trainer.validate(net, ckpt_path=path, verbose=False)
        assert found["val_loss"] == pytest.approx(want, rel=1e-5)
        (found,) = trainer.test(net, ckpt_path=path, verbose=False)
        assert found["test_loss"] == pytest.approx(want, rel=1e-5)
        assert len(trainer.predict(net, ckpt_path=path)) == 2


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_a_cut_checkpoint_does_not_fit_the_bare_class_and_the_fit_says_what_loads_it(
    remove, tmp_path, caplog
):
    trainer = fitter(lp.StructuredChannelPruning(schedules.OneShot(0.5), remove=remove), epochs=2)
    with caplog.at_level("INFO", logger="lightning_prune"):
        trainer.fit(Net())
    assert "lightning_prune.load_pruned(Net(...), path) loads its checkpoints" in caplog.text
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net.load_from_checkpoint(tmp_path / "small.ckpt")
    assert lp.load_pruned(Net(), tmp_path / "small.ckpt").stem.out_features == 8
    caplog.clear()
    with caplog.at_level("INFO", logger="lightning_prune"):
        fitter(lp.StructuredChannelPruning(schedules.Hold()), epochs=1).fit(Net())  # nothing goes
    assert "load_pruned" not in caplog.text


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_targets_of_several_patterns_are_met_in_a_fit(remove):
    model, full = Net(), sum(p.numel() for p in Net().parameters())
    by_pattern = {"stem.*": filters.Removed(0.2), "*": filters.Removed(0.2)}
    fitter(lp.StructuredChannelPruning(by_pattern, remove=remove), epochs=2).fit(model)
    one = Net()
    one.stem, one.norm = (
        torch.nn.Linear(6, model.stem.out_features),
        torch.nn.BatchNorm1d(model.stem.out_features),
    )
    one.body = torch.nn.Linear(model.stem.out_features, 16)
    other = Net()
    other.body, other.head = (
        torch.nn.Linear(16, model.body.out_features),
        torch.nn.Linear(model.body.out_features, 3),
    )
    for alone in (one, other):
        assert 0.2 <= 1 - sum(p.numel() for p in alone.parameters()) / full < 0.27


@pytest.mark.parametrize(
    ("make", "most"), [(Residual, 16), (Halves, 30), (Recurrence, 30)], ids=lambda v: str(v)
)
def test_planning_takes_few_forward_passes(make, most):
    """It took 16 to 20 times as long as torch-pruning alone; passes can be counted on any machine."""
    model, passes = make(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        discover(model, torch.randn(IMAGE))
    assert 0 < len(passes) <= most


def test_forward_hooks_run_on_copies_and_see_no_other_model():
    model, seen = Residual(), []
    model.register_forward_hook(lambda module, *_: seen.append(module is model))
    before = dict(model.named_parameters())
    discover(model, torch.randn(IMAGE))
    assert seen
    assert not any(seen)
    assert dict(model.named_parameters()) == before
