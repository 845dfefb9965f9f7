"""Fits whose masks grow: networks with several optimizers, what is refused, and what is said."""

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import criteria, schedules
from tests.networks import Gan, dead_are_zero, fitter


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
