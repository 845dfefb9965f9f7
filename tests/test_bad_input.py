"""Bad input is refused before training, by argument, what was given and what is allowed; nothing changes."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

import lightning_prune as lp
from lightning_prune.masks import alive
from lightning_prune.schedules import Geometric, OneShot
from tests.naming import in_words
from tests.networks import Net, fitter, same


def all_of(model):
    params = {n: p.detach() for n, p in model.named_parameters()}
    return deepcopy({**params, **dict(model.named_buffers())})


class Never(Callback):
    """Training must not begin."""

    def on_train_batch_start(self, *_):
        pytest.fail("training began")


def refused(message, *callbacks, model=None, error=ValueError, **options):
    """Fitting fails with this message before any batch, in every order, and leaves all as it was."""
    for ordered in ([*callbacks], [*reversed(callbacks)]):
        net = deepcopy(model) if model is not None else Net()
        before = all_of(net)
        pruners = [c for c in ordered if isinstance(c, lp.IterativeMagnitudePruning)]
        trainer = fitter(*ordered, Never(), epochs=4, num_sanity_val_steps=2, **options)
        with pytest.raises(error, match=message):
            trainer.fit(net)
        assert same(all_of(net), before)
        assert all((c.round, c.sparsity) == (0, 0.0) for c in pruners)
        assert not any(o._optimizer_step_post_hooks for o in trainer.optimizers)
        assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def pruning(**options):
    return lp.IterativeMagnitudePruning(**{"schedule": Geometric(0.3), "rounds": 2, **options})


def sparse_masks(model=None, value=0.5):
    return lp.prune(deepcopy(model or Net()), value)


# at construction


@pytest.mark.parametrize("rate", [0, 1, -0.2, 1.2, float("nan")])
def test_rates_outside_0_and_1(rate):
    with pytest.raises(
        ValueError, match=rf"rate={rate}: allowed are fractions between 0 and 1, both excluded"
    ):
        lp.IterativeMagnitudePruning(Geometric(rate))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "Linear"}, r"layers='Linear': a list of class names is needed; write \['Linear'\]"),
        ({"layers": None}, "layers=None: allowed are class names in a list"),
        ({"rounds": -1}, "rounds=-1: allowed are whole numbers from 0"),
        ({"rounds": 2.5}, "rounds=2.5: allowed are whole numbers from 0"),
        ({"rounds": "3"}, "rounds='3': allowed are whole numbers from 0"),
        ({"rounds": None}, "rounds=None: allowed are whole numbers from 0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0: allowed are whole numbers from 1"),
        ({"every_n_epochs": 1.0}, "every_n_epochs=1.0: allowed are whole numbers from 1"),
        ({"every_n_train_steps": 0}, "every_n_train_steps=0: allowed are whole numbers from 1"),
        ({"every_n_train_steps": -5}, "every_n_train_steps=-5: allowed are whole numbers from 1"),
        ({"max_sparsity": 0}, "max_sparsity=0: allowed is above 0 and at most 1"),
        ({"max_sparsity": 1.5}, "max_sparsity=1.5: allowed is above 0 and at most 1"),
        ({"max_sparsity": float("nan")}, "max_sparsity=nan: allowed is above 0 and at most 1"),
        ({"schedule": lambda r: 1.0}, r"schedule: .* gives sparsity 1.0 in round 0; allowed is from 0 up to"),
        ({"schedule": lambda r: -0.1}, r"schedule: .* gives sparsity -0.1 in round 0; allowed"),
        ({"schedule": lambda r: float("nan")}, r"schedule: .* gives sparsity nan in round 0; allowed"),
        ({"schedule": lambda r: 0.5 - r / 10}, r"schedule: .* falls from sparsity 0.5 to 0.4 in round 1"),
        ({"schedule": {"*": lambda r: r / 2}}, r"schedule\['\*'\]: .* gives sparsity 1.0 in round 2"),
        ({"schedule": 0.5}, r"schedule: 0.5 is given; allowed are callables"),
        ({"schedule": lambda r, x: 0.5}, r"schedule=.* asks for `x`, which nobody has; allowed are"),
        ({"schedule": {"*": 0.5}}, r"schedule\['\*'\]: 0.5 is given; allowed are callables"),
    ],
    ids=in_words,
)
def test_arguments_of_the_pruning_callback(options, message):
    with pytest.raises(ValueError, match=message):
        pruning(**options)


@pytest.mark.parametrize("to_step", [-1, 0.5, "0", None])
def test_a_to_step_that_is_no_step(to_step):
    with pytest.raises(ValueError, match=f"to_step={to_step!r}: allowed are whole numbers from 0 on"):
        lp.LotteryTicketRewind(to_step)


# as a fit starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["conv*"]}, r"include: the pattern 'conv\*' matches no prunable weight.*stem\.weight"),
        (
            {"exclude": ["stem*", "nope"]},
            r"exclude: the pattern 'nope' matches no prunable weight.*head\.weight",
        ),
        ({"include": ["*.bias"]}, r"include: the pattern '\*\.bias' matches no prunable weight"),
        (
            {"include": ["stem*"], "exclude": ["stem*"]},
            r"include=\['stem\*'\], exclude=\['stem\*'\] leave nothing",
        ),
        ({"exclude": ["*"]}, r"exclude=\['\*'\] leave nothing to prune.*stem\.weight"),
        ({"include": []}, r"include=\[\].* leave nothing to prune"),
        ({"include": "stem*"}, r"include='stem\*': a list of patterns is needed"),
        ({"exclude": "stem*"}, r"exclude='stem\*': a list of patterns is needed"),
        (
            {"schedule": {"conv*": Geometric(0.2), "*": Geometric(0.1)}},
            r"schedule: the pattern 'conv\*' matches no",
        ),
        ({"schedule": {"stem*": Geometric(0.2)}}, r"schedule: no pattern matches body\.weight, head\.weight"),
        (
            {"schedule": {"*": Geometric(0.2), "head*": OneShot(0.1)}},
            r"schedule: the pattern 'head\*' matches no",
        ),
        ({"schedule": {}}, "schedule"),
    ],
    ids=in_words,
)
def test_patterns_that_match_nothing(options, message):
    refused(message, pruning(**options), lp.LotteryTicketRewind())


def test_a_model_with_nothing_to_prune():
    class Small(LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.norm = nn.LayerNorm(3)

        def training_step(self, batch, batch_idx):
            return (batch[0][:, :3] * self.scale).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        train_dataloader = Net.train_dataloader
        n, batch = 24, 8

    refused("Small has nothing to prune: no weight belongs to a layer of the types", pruning(), model=Small())
    refused(r"layers=\('Conv2d',\)", pruning(layers=["Conv2d"]))
    with pytest.raises(ValueError, match="LayerNorm has nothing to prune"):
        lp.prune(nn.LayerNorm(3), 0.5)


def test_to_step_beyond_the_first_round():
    refused("to_step=6: allowed is 0 to 5", pruning(every_n_epochs=2), lp.LotteryTicketRewind(6))
    rewinder = lp.LotteryTicketRewind(5)
    refused("to_step=5: allowed is 0 to 4", pruning(every_n_train_steps=5, masks=sparse_masks()), rewinder)


def test_a_rewind_without_a_pruner_or_with_two():
    refused("goes with exactly one pruning callback; here are 0", lp.LotteryTicketRewind())
    two = pruning(include=["stem*"], masks="zeros"), pruning(exclude=["stem*"])
    refused("goes with exactly one pruning callback; here are 2", *two, lp.LotteryTicketRewind())


def test_two_pruning_callbacks_over_the_same_weights():
    refused(
        r"two pruning callbacks hold the same weights: head\.weight\. Divide them with include=",
        pruning(include=["head*", "stem*"]),
        pruning(include=["head*", "body*"]),
    )
    refused("hold the same weights: body.weight, head.weight, stem.weight", pruning(), pruning(include=["*"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("body.weight"), r"masks: body\.weight is in the model, not in the masks"),
        (lambda m: m.update(other=m["body.weight"]), r"masks: other is in the masks, not in the model"),
        (
            lambda m: m.update({"body.weight": m["head.weight"]}),
            r"masks: body\.weight is .*\(3, 16\); allowed is .*\(16, 16\)",
        ),
        (
            lambda m: m.update({"body.weight": m["body.weight"].float()}),
            r"masks: body\.weight is torch\.float32",
        ),
        (lambda m: m.update({"body.weight": [1, 0]}), r"masks: body\.weight is a list"),
    ],
)
@pytest.mark.parametrize("form", ["dict", "file"])
def test_masks_that_do_not_fit_the_model(change, message, form, tmp_path):
    masks = sparse_masks()
    change(masks)
    if form == "file":
        torch.save(masks, tmp_path / "masks")
        all_bool = all(torch.is_tensor(m) and m.dtype == torch.bool for m in masks.values())
        message = message if all_bool else r"masks='.*masks': allowed is a checkpoint written with"
    refused(message, pruning(masks=tmp_path / "masks" if form == "file" else masks), lp.LotteryTicketRewind())


def test_a_file_that_holds_no_masks(tmp_path):
    for i, content in enumerate(
        ({"callbacks": {"Other": {}}}, {}, {"a": torch.ones(2)}, torch.ones(2), [1], 3)
    ):
        torch.save(content, tmp_path / str(i))
        refused(rf"masks='.*{i}': allowed is a checkpoint written with", pruning(masks=tmp_path / str(i)))
    (tmp_path / "text").write_text("no file of torch.save")
    refused(r"masks='.*text': allowed is a checkpoint", pruning(masks=tmp_path / "text"))
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "folder.ckpt" / "meta.pt").touch()
    refused(r"masks='.*folder.ckpt': it is a folder", pruning(masks=tmp_path / "folder.ckpt"))
    refused(r"masks='zeroes': allowed is .*zeros", pruning(masks="zeroes"))
    refused(r"masks='3': allowed is", pruning(masks=3))


def test_a_checkpoint_of_another_network(tmp_path):
    donor = pruning(rounds=1)

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 32)
            self.head = nn.Linear(32, 3)

    trainer = fitter(donor, epochs=2)
    trainer.fit(Wide())
    trainer.save_checkpoint(tmp_path / "wide")
    refused(r"masks: body\.weight is torch.bool \(32, 16\); allowed is", pruning(masks=tmp_path / "wide"))


def test_a_checkpoint_whose_masks_do_not_fit_on_resume(tmp_path):
    pruner, model = pruning(rounds=1), Net()
    trainer = fitter(pruner, epochs=2)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))
    state["masks"]["body.weight"] = state["masks"]["head.weight"]
    torch.save(file, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"masks: body\.weight is torch.bool \(3, 16\); allowed is"):
        fitter(pruning(rounds=1), Never(), epochs=4).fit(Net(), ckpt_path=tmp_path / "x.ckpt")


def test_a_second_fit_with_another_model():
    pruner = pruning(rounds=1)
    fitter(pruner, epochs=2).fit(Net())
    masks = pruner.masks
    other = Net()
    other.body = nn.Linear(16, 8)
    other.head = nn.Linear(8, 3)
    before = all_of(other)
    with pytest.raises(ValueError, match=r"it is in round 1 at sparsity 0\.3000 of another network"):
        fitter(pruner, Never(), epochs=2).fit(other)
    assert same(all_of(other), before)
    assert same(pruner.masks, masks)


# as a round begins


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clock", [{"every_n_epochs": 1}, {"every_n_train_steps": 2}], ids=in_words)
def test_weights_that_are_not_finite_at_a_pruning(clock, value):
    class Diverge(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == (6 if "every_n_epochs" in clock else 4):
                with torch.no_grad():
                    model.body.weight[0, 0] = value

    pruner, rewinder, model = pruning(**clock), lp.LotteryTicketRewind(), Net()
    trainer = fitter(pruner, rewinder, Diverge(), epochs=4)
    with pytest.raises(
        ValueError, match=r"the weight body\.weight holds NaN or infinity; allowed are finite"
    ):
        trainer.fit(model)
    assert (pruner.round, alive(pruner.masks)) == (1, round(0.7 * 400))  # those of the round that failed
    assert not any(o._optimizer_step_post_hooks for o in trainer.optimizers)
    rewinder.snapshot.restore(model, trainer.optimizers, [])  # nothing is lost
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_metric_to_stop_by_that_nobody_logged():
    pruner = pruning(stop_below={"nothing": 1.0})
    with pytest.raises(ValueError, match=r"stop_below: no metric 'nothing' was logged.*val_loss"):
        fitter(pruner, epochs=3).fit(Net())
    assert (pruner.round, pruner.sparsity) == (0, 0.0)


def test_a_snapshot_of_another_step_cannot_be_taken():
    pruner, model = pruning(rounds=4, every_n_train_steps=5), Net()
    trainer = fitter(pruner, epochs=2)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 4
    trainer.callbacks.append(lp.LotteryTicketRewind(3))
    with pytest.raises(ValueError, match=r"to_step=3: training is at step 6 without a snapshot\. Allowed is"):
        trainer.fit(model)
