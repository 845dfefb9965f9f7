"""The doctor finds each failure where it really happens, says what to do, and stops the training."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune as lp
from lightning_prune import doctor
from lightning_prune.allocation import AtLeast, global_rank
from lightning_prune.masks import alive
from lightning_prune.schedules import Explicit, OneShot
from tests.naming import in_words
from tests.networks import Net, fitter, same, sgd


def pruning(sparsity=0.5, **options):
    return lp.IterativeMagnitudePruning(OneShot(sparsity), **{"rounds": 1, **options})


def found(message, *callbacks, model=None, epochs=2, **options):
    """The fit stops with this message; with verify=False it does not."""
    with pytest.raises(RuntimeError, match=message) as error:
        fitter(*callbacks, epochs=epochs, **options).fit(model or Net())
    assert "verify=False does not look" in str(error.value)
    return str(error.value)


class OnPrune(Callback):
    def __init__(self, act):
        self.act = act

    def on_prune(self, trainer, model, masks):
        self.act(trainer, model, masks)


# ---------------------------------------------------------------------------------------- after each pruning


def test_a_layer_emptied_without_consent():
    """Two weights are to be left, and there are three layers."""
    with pytest.raises(ValueError, match=r"\.weight: no weight is left, and nothing passes.*AtLeast\(0"):
        fitter(pruning(0.995), epochs=2).fit(Net())  # before anything is trained
    empty = OnPrune(lambda trainer, model, masks: masks["body.weight"].fill_(False))
    found(r"body\.weight: no weight is left, and nothing passes.*allocate=AtLeast\(0", pruning(), empty)
    pruner = pruning(0.995, allocate=AtLeast(0, of=global_rank))  # consent
    fitter(pruner, epochs=2).fit(Net())
    assert alive(pruner.masks) == 2


def test_a_layer_that_was_empty_before_is_no_news():
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in Net().named_parameters() if p.dim() > 1}
    masks["head.weight"][:] = False
    pruner = pruning(0.5, masks=masks)
    fitter(pruner, epochs=2).fit(Net())
    assert alive(pruner.masks) == 200


def test_a_parameter_replaced_during_the_fit():
    class Replace(Callback):
        def on_train_epoch_end(self, trainer, model):
            model.body.weight = nn.Parameter(model.body.weight.detach().clone())

    found(r"body\.weight: the model has another parameter there.*Change it in place", pruning(), Replace())
    fitter(pruning(verify=False), Replace(), epochs=2).fit(Net())


def test_a_parameter_that_no_optimizer_holds():
    def copies(params):  # as some mixed-precision optimizers have them
        return sgd([nn.Parameter(p.detach().clone()) for p in params])

    with pytest.raises(ValueError, match="no optimizer trains any of the prunable weights"):
        fitter(pruning(), epochs=2).fit(Net(copies))

    class Dropped(Callback):
        def on_train_epoch_end(self, trainer, model):
            group = trainer.optimizers[0].param_groups[0]
            group["params"] = [p for p in group["params"] if p is not model.body.weight]

    found(r"body\.weight: no optimizer holds it.*freeze or exclude it", pruning(), Dropped())


@pytest.mark.parametrize("value", [True, False])
def test_masks_that_another_callback_changed(value):
    def change(trainer, model, masks):
        masks["body.weight"][0] = value

    message = "weights are alive, 200 were asked for. Callbacks may look at masks, not change them"
    found(message, pruning(), OnPrune(change))


def test_weights_that_came_back_to_life():
    def revive(trainer, model, masks):
        if trainer.current_epoch == 2:  # one back, another one gone
            mask = masks["body.weight"].view(-1)
            mask[int((~mask).nonzero()[0])], mask[int(mask.nonzero()[-1])] = True, False

    pruner = lp.IterativeMagnitudePruning(Explicit([0, 0.4, 0.5]), rounds=2)
    text = found(r"body\.weight: weights are alive again that were dead", pruner, OnPrune(revive), epochs=3)
    assert "asked for" not in text


def test_every_finding_is_told_at_once():
    class Replace(Callback):
        def on_train_epoch_end(self, trainer, model):
            for layer in (model.body, model.head):
                layer.weight = nn.Parameter(layer.weight.detach().clone())

    text = found("another parameter", pruning(), Replace())
    assert "body.weight" in text
    assert "head.weight" in text


# ------------------------------------------------------------------------------------------- in checkpoints


def saving(folder):
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


class Average(Callback):
    """Stores other weights than those that are masked."""

    def on_save_checkpoint(self, trainer, model, checkpoint):
        if trainer.current_epoch:
            state = {n: v.clone() for n, v in checkpoint["state_dict"].items()}
            state["body.weight"] += 1
            checkpoint["state_dict"] = state


def test_a_checkpoint_whose_dead_weights_are_not_zero(tmp_path):
    with pytest.raises(RuntimeError, match=r"body\.weight: \d+ of \d+ dead weights are not 0.*not written"):
        fitter(Average(), pruning(), saving(tmp_path), epochs=2, enable_checkpointing=True).fit(Net())
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_a_checkpoint_and_a_log_that_disagree(tmp_path):
    class Log(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("sparsity", 0.25)

    with pytest.raises(RuntimeError, match=r"sparsity: 0.25 was logged, and the checkpoint says 0.0"):
        fitter(pruning(), saving(tmp_path), epochs=2, enable_checkpointing=True).fit(Log())


def test_a_checkpoint_whose_weights_are_not_those_of_its_masks(tmp_path):
    trainer = fitter(pruning(), epochs=2)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    file["state_dict"] = Net().state_dict()
    torch.save(file, tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="of this checkpoint are not of one training; resume from another"):
        fitter(pruning(), epochs=3).fit(Net(), ckpt_path=tmp_path / "x.ckpt")


# ------------------------------------------------------------------------------------------------ the doctor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=in_words)
def test_dead_weights_are_counted_wherever_they_are_and_whatever_they_hold(dtype):
    mask = torch.rand(3, 1 << 17) < 0.5  # more than what is looked at together
    mask[0, 0] = mask[2, 5] = mask[2, -1] = False
    weight = torch.randn(mask.shape).to(dtype).masked_fill(~mask, 0)
    assert doctor.awake({"w": weight}, {"w": mask}, "") == []
    for value in (-0.0, 1.0, torch.nan, torch.inf, torch.finfo(dtype).smallest_normal):
        weight[0, 0] = weight[2, 5] = weight[2, -1] = value
        (finding,) = doctor.awake({"w": weight}, {"w": mask}, "")
        assert finding.startswith(f"w: 3 of {int((~mask).sum())} dead")


def test_masks_have_one_hash_each():
    masks = {"a": torch.rand(4, 5) < 0.5, "b": torch.rand(7) < 0.5}
    others = [
        {"a": masks["a"].reshape(5, 4), "b": masks["b"]},
        {"a": masks["a"], "c": masks["b"]},
        {"a": ~masks["a"], "b": masks["b"]},
        {"a": masks["a"]},
    ]
    assert doctor.digest({n: m.clone() for n, m in masks.items()}) == doctor.digest(masks)
    assert len({doctor.digest(other) for other in (masks, *others)}) == 5


def test_a_healthy_training_is_what_it_is_without_the_doctor(tmp_path):
    results = []
    for verify in (True, False):
        torch.manual_seed(0)
        pruner, model = pruning(rounds=2, verify=verify), Net()
        callbacks = pruner, lp.LotteryTicketRewind(1), saving(tmp_path / str(verify))
        fitter(*callbacks, epochs=3, enable_checkpointing=True).fit(model)
        results.append((pruner.masks, dict(model.state_dict()), torch.get_rng_state()))
    assert same(*results)
