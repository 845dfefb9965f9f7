"""Fits whose masks grow: networks with several optimizers, what is refused, and what is said."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation, criteria, growth, schedules
from tests.naming import in_words
from tests.networks import Gan, Net, dead_are_zero, fitter


class Shared(Gan):
    """It generates once a batch, for the critic's step and then for the generator's."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        of_generator, of_critic = self.optimizers()
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        bce = nn.functional.binary_cross_entropy_with_logits
        fake = self.generator(torch.randn(len(x), 4))
        of_critic.zero_grad()
        self.manual_backward(bce(self.critic(x), ones) + bce(self.critic(fake.detach()), zeros))
        of_critic.step()
        of_generator.zero_grad()
        self.manual_backward(bce(self.critic(fake), ones))
        of_generator.step()


@pytest.mark.parametrize(
    "pruner",
    [
        lp.IterativeMagnitudePruning(schedules.OneShot(0.5), rounds=1),
        lp.DynamicSparseTraining(every_n_train_steps=4, grow=criteria.Random()),
        lp.DynamicSparseTraining(every_n_train_steps=3, grow=criteria.Random()),
    ],
    ids=["pruned", "grown", "grown-between-steps"],
)
def test_what_a_generator_made_is_used_after_the_critics_step(pruner):
    model = Shared()
    fitter(pruner, epochs=4).fit(model)
    assert pruner.round
    assert dead_are_zero(dict(model.named_parameters()), pruner.masks)


def grows(**options):
    return lp.DynamicSparseTraining(**{"sparsity": 0.8, "every_n_train_steps": 2, **options})


@pytest.mark.parametrize("every", [1, 2])
def test_what_would_end_dense_is_refused_with_a_step_after_which_it_is_sparse(every):
    """The step that the error names is taken, and the fit ends sparse."""
    wrong = grows(
        sparsity=schedules.Alternating(0.8), fraction=0.0, every_n_train_steps=every, until_step=3 * every
    )
    with pytest.raises(ValueError, match=f"allowed is what ends sparse. Give until_step={2 * every} "):
        fitter(wrong, epochs=4).fit(Net())
    right = grows(
        sparsity=schedules.Alternating(0.8), fraction=0.0, every_n_train_steps=every, until_step=2 * every
    )
    fitter(right, epochs=4).fit(Net())
    assert right.sparsity == 0.8


def test_a_ramp_longer_than_the_updates_is_said():
    pruner = grows(sparsity=schedules.Cubic(0.9, rounds=20, initial=0.5))
    with pytest.warns(UserWarning, match=r"in update 4, the last one, .* reaches 0.9 only in update 20"):
        fitter(pruner, epochs=4).fit(Net())
    assert pruner.round == 4


def test_a_checkpoint_that_compares_over_several_sparsities_is_said(tmp_path, caplog):
    def said(**options):
        caplog.clear()
        best = ModelCheckpoint(tmp_path, monitor="val_loss")
        fitter(grows(**options), best, epochs=4, enable_checkpointing=True).fit(Net())
        return "compares over all updates" in caplog.text

    assert said(sparsity=schedules.Cubic(0.9, rounds=4, initial=0.5))
    assert not said()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"allocate": allocation.uniform}], ids=in_words)
def test_what_has_no_effect_on_a_resumed_fit_ends_none(options, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1, save_top_k=1)
    fitter(grows(until_step=8), kept, epochs=1, enable_checkpointing=True).fit(Net())
    again = grows(until_step=8, **options)
    with pytest.warns(UserWarning, match="has no effect"):
        fitter(again, epochs=4).fit(Net(), ckpt_path=tmp_path / "one.ckpt")
    assert (again.round, again.sparsity) == (3, 0.8)


def test_the_control_of_a_gan_needs_no_gradients_and_a_remedy_is_one():
    pruner = grows(fraction=0.0)
    fitter(pruner, epochs=2).fit(Gan())
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ValueError, match=r"criteria.Random\(\). Use one"):
        fitter(grows(grow=criteria.momentum), epochs=2).fit(Gan())
    fitter(grows(grow=criteria.Random()), epochs=2).fit(Gan())


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (lambda p, q: 0.3, "it needs q, too"),
        (schedules.Geometric(0.2), r"Geometric\(.*it takes a round"),
    ],
    ids=in_words,
)
def test_a_fraction_is_a_function_of_progress_alone(fraction, message):
    with pytest.raises(ValueError, match=f"fraction=.*{message}, and it is called with progress alone"):
        grows(fraction=fraction)


@pytest.mark.parametrize("argument", ["criterion", "drop", "grow"])
def test_a_criterion_of_the_weights_at_initialization_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}: movement compares with the weights at initialization"):
        fitter(grows(**{argument: criteria.movement}), epochs=4).fit(Net())


def test_a_criterion_that_can_do_without_the_weights_at_initialization_is_taken():
    def own(params, initial=None):
        return criteria.magnitude(params)

    pruner = grows(drop=own)
    fitter(pruner, epochs=4).fit(Net())
    assert pruner.round == 4


def test_a_list_of_sparsities_may_fall():
    pruner = grows(sparsity=schedules.Explicit([0.5, 0.8, 0.6]))
    fitter(pruner, epochs=4).fit(Net())
    assert [round(row.sparsity, 2) for row in pruner.history] == [0.5, 0.8, 0.6, 0.6, 0.6]


def of_zero_weights(params, model, batches):
    return {name: p.abs() * len(batches) for name, p in params.items()}


@pytest.mark.parametrize("grow", [criteria.magnitude, of_zero_weights], ids=in_words)
def test_what_gives_all_the_dead_one_score_is_refused_with_the_first_batch(grow):
    model = Net()
    with pytest.raises(ValueError, match="gives all dead weights of a layer the same score"):
        fitter(grows(grow=grow), epochs=4).fit(model)
    assert int(model.seen) == 0


def test_a_fit_says_what_it_will_do_and_what_it_did(caplog):
    pruner = grows(granularity=growth.FanIn(0.9))
    fitter(pruner, epochs=4).fit(Net())
    assert "4 updates are to come, every 2 steps, before step 9" in caplog.text
    grown = sum(row.metrics.get("grown", 0) for row in pruner.history)
    assert grown
    assert f"after 4 of 4 updates: 80 weights left (20.00 %), {grown:.0f} grown in all" in caplog.text
    assert repr(pruner) == "DynamicSparseTraining(update 4 of 4, sparsity 0.8000)"
    dead = sum(int((~mask.any(1)).sum()) for mask in pruner.masks.values())
    assert pruner.history[-1].metrics["ablated"] == dead > 0
