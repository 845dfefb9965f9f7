"""Every optimizer's steps are held, whoever made it and when; what bypasses all of it is found and named."""

import functools
import gc
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler
from torch.optim import optimizer as torch_optimizer

import lightning_prune as lp
from lightning_prune.schedules import Explicit, Geometric
from tests.networks import Net, bits_of, dead_are_zero, fitter, same, samples, sgd

# --- optimizers of other people ---


@pytest.fixture(autouse=True)
def _no_hooks_of_other_tests():
    """What other tests hold to their end is no trace of what is tested here."""
    gc.collect()
    torch_optimizer._global_optimizer_post_hooks.clear()


class SAM(Optimizer):
    """Sharpness-aware minimization: up the gradient, and from there a step of an optimizer within."""

    def __init__(self, params, make=sgd, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = make(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm() + 1e-12
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class Lookahead(Optimizer):
    """Slow weights that follow fast ones; like the published ones it skips `super().__init__`."""

    def __init__(self, params, make=sgd, k=2, alpha=0.5):
        self.optimizer = make(params)
        self.param_groups, self.state, self.defaults = self.optimizer.param_groups, self.optimizer.state, {}
        self.k, self.alpha, self.steps = k, alpha, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)
        return loss

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class ScheduleFree(Optimizer):
    """Schedule-free SGD: a step at z, an average x of the z, and gradients in between, at y."""

    def __init__(self, params, lr=0.1, beta=0.9, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.detach().clone())
                    x = self.state[p].setdefault("x", p.detach().clone())
                    z.sub_(p.grad + group["weight_decay"] * p, alpha=group["lr"])
                    x.lerp_(z, 1 / group["k"])
                    p.copy_(torch.lerp(z, x, group["beta"]))
        return loss


class Quiet(SGD):
    """Calls no hook after the last thing it writes, and has the mark that torch gives to those that do."""

    def step(self, closure=None):
        loss = super().step(closure)
        if self.awake:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1.0)
        return loss

    awake, step.hooked = True, True


def nested(params):
    return SAM(params, make=lambda p: Lookahead(p, make=lambda q: Adam(q, lr=0.01)))


MAKERS = {
    "SAM": SAM,
    "SAM of Adam": lambda p: SAM(p, make=lambda q: Adam(q, lr=0.01, weight_decay=0.1)),
    "Lookahead": Lookahead,
    "Lookahead of Adam": lambda p: Lookahead(p, make=lambda q: Adam(q, lr=0.01, weight_decay=0.1), k=1),
    "schedule-free": ScheduleFree,
    "SAM of Lookahead": nested,
}


class Look(Callback):
    """The dead weights after each batch, and that something was trained."""

    def __init__(self, pruner):
        self.pruner, self.alive = pruner, []

    def on_train_batch_end(self, trainer, model, *_):
        assert dead_are_zero(dict(model.named_parameters()), self.pruner.masks)
        self.alive.append(model.body.weight.detach().clone())


def pruning(schedule=None, **options):
    return lp.IterativeMagnitudePruning(schedule or Geometric(0.4), **{"rounds": 2, **options})


def fitted(model, *others, epochs=3, **options):
    pruner = pruning(**options)
    look = Look(pruner)
    fitter(pruner, *others, look, epochs=epochs).fit(model)
    assert dead_are_zero(dict(model.named_parameters()), pruner.masks)
    assert pruner.round == 2
    assert len(look.alive) == 3 * epochs
    assert not any(torch.equal(a, b) for a, b in zip(look.alive, look.alive[1:], strict=False))
    assert not torch_optimizer._global_optimizer_post_hooks
    return pruner


@pytest.mark.parametrize("name", MAKERS)
def test_dead_weights_stay_dead_under_optimizers_of_other_people(name):
    fitted(Net(MAKERS[name]))


class ByHand(Net):
    """Manual optimization, in the ways that people write it."""

    def __init__(self, make, way):
        super().__init__(make)
        self.automatic_optimization, self.way = False, way

    def configure_optimizers(self):
        self.own = self.make(self.parameters())
        return None if self.way == "its own" else self.own

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = lambda: nn.functional.cross_entropy(self(x), y)  # noqa: E731
        optimizer = self.own if self.way == "its own" else self.optimizers()
        if self.way == "two steps":
            self.zero_grad()
            self.manual_backward(loss())
            optimizer.first_step()
            self.manual_backward(loss())
            optimizer.second_step()
        elif self.way == "the inner one":
            self.manual_backward(loss())
            optimizer.optimizer.base_optimizer.step()
            self.zero_grad()
        elif self.way == "closure":

            def closure():
                optimizer.zero_grad()
                value = loss()
                self.manual_backward(value)
                return value

            optimizer.step(closure)
        else:
            self.manual_backward(loss())
            optimizer.step()
            optimizer.zero_grad()  # after the step, so that a gradient of this batch would be there no more


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize(
    ("name", "way"),
    [("SAM", "two steps"), ("SAM of Adam", "closure"), ("SAM", "the inner one"), ("SAM", "closure")]
    + [(name, way) for name in ("Lookahead", "schedule-free") for way in ("plain", "its own", "closure")],
)
def test_dead_weights_stay_dead_under_them_by_hand(name, way):
    if name == "Lookahead" and way == "its own":  # nobody tells us of it: found, see below
        with pytest.raises(RuntimeError, match="dead weights are not 0"):
            fitted(ByHand(lambda p: Lookahead(p, k=1), way))
        return
    fitted(ByHand(MAKERS[name], way))


@pytest.mark.parametrize("gradients", ["optimizer", "model"])
@pytest.mark.parametrize("name", MAKERS)
def test_dead_weights_stay_dead_under_them_in_a_plain_loop(name, gradients):
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    masks, (x, y) = lp.prune(model, 0.6), samples().tensors
    optimizer = MAKERS[name](model.parameters())
    handle = lp.hold(model, optimizer, masks)

    def closure():
        (optimizer if gradients == "optimizer" else model).zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for i in range(6):
        optimizer.step(closure)
        assert dead_are_zero(dict(model.named_parameters()), masks)
        if i == 3:
            masks = {n: m & (torch.rand(m.shape) < 0.7) for n, m in masks.items()}
            handle.set(masks)
    handle.remove()
    assert not torch_optimizer._global_optimizer_post_hooks
    assert "step" not in vars(optimizer)


# --- made anew in mid-fit ---


def by_the_strategy(trainer):
    trainer.strategy.setup_optimizers(trainer)


def by_assignment(trainer):
    params = trainer.lightning_module.parameters()
    trainer.strategy.optimizers = [Adam(params, lr=0.01, weight_decay=0.1)]


def in_place(trainer):
    trainer.optimizers[0] = Lookahead(trainer.lightning_module.parameters(), k=1)


class Anew(Callback):
    def __init__(self, hook, how):
        setattr(self, hook, lambda trainer, *_: how(trainer))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("make", [sgd, Lookahead], ids=["sgd", "Lookahead"])
@pytest.mark.parametrize("how", [by_the_strategy, by_assignment, in_place])
@pytest.mark.parametrize("hook", ["on_prune", "on_round_start", "on_train_epoch_start", "on_train_batch_end"])
def test_dead_weights_stay_dead_under_optimizers_made_anew(hook, how, make, first):
    pruner, model = pruning(), Net(make)
    look = Look(pruner)
    order = [Anew(hook, how), pruner] if first else [pruner, Anew(hook, how)]
    trainer = fitter(*order, look, epochs=3)
    trainer.fit(model)
    assert pruner.round == 2
    assert not torch_optimizer._global_optimizer_post_hooks
    assert all("step" not in vars(o) for o in trainer.optimizers)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_optimizers_made_anew_have_masked_gradients_where_they_mix_weights():
    class Norms(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step > 3:
                grads = {n: model.get_parameter(n).grad for n in pruner.masks}
                seen.append(dead_are_zero(grads, pruner.masks))

    def anew(trainer):
        trainer.strategy.optimizers = [torch.optim.Muon([trainer.lightning_module.body.weight])]

    seen, pruner = [], pruning(rounds=1, include=["body*"])
    fitter(pruner, Anew("on_prune", anew), Norms(), epochs=2).fit(Net())
    assert seen == [True] * 3


def test_a_group_that_an_optimizer_gets_later_is_held():
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    masks = lp.prune(model, 0.5, include=["0.*"])
    optimizer = sgd(model[1].parameters())
    handle = lp.hold(model, sgd(model[1].parameters()), masks)
    for added in (False, True):
        if added:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.1})
        for _ in range(2):
            model[0].weight.grad, model[1].weight.grad = torch.ones(6, 6), torch.ones(6, 6)
            optimizer.step()
            assert dead_are_zero({"0.weight": model[0].weight}, masks)
    assert bool((model[0].weight[masks["0.weight"]] != 0).all())
    handle.remove()


def test_a_step_of_an_optimizer_with_other_weights_touches_nothing():
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    masks = lp.prune(ours, 0.5)
    handle = lp.hold(ours, sgd(ours.parameters()), masks)
    with torch.no_grad():
        ours.weight.fill_(1.0)
    theirs(torch.ones(1, 4)).sum().backward()
    sgd(theirs.parameters()).step()
    assert bool((ours.weight == 1).all())
    handle.remove()


# --- what bypasses everything ---


@pytest.mark.parametrize("since", [0, 1, 2])
@pytest.mark.parametrize("manual", [False, True])
def test_an_optimizer_that_bypasses_everything_is_found_after_the_first_step_of_a_round(since, manual):
    class Since(Callback):
        def on_train_batch_start(self, trainer, *_):
            Quiet.awake = pruner.round >= since

    make = functools.partial(Quiet, lr=0.1)
    model = ByHand(make, "plain") if manual else Net(make)
    pruner = pruning(Explicit([0.2, 0.4, 0.6]), rounds=2)
    look = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, *_):
            look.append(pruner.round)

    with pytest.raises(
        RuntimeError, match=r"weight: \d+ of \d+ dead weights are not 0\. An optimizer's step"
    ):
        fitter(Since(), Count(), pruner, epochs=3).fit(model)
    assert look == [r for r in range(since) for _ in range(3)] + [
        since
    ]  # at once, not at the next checkpoint
    assert dead_are_zero(dict(model.named_parameters()), pruner.masks)


def test_what_a_callback_writes_after_a_step_is_found():
    class Write(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            with torch.no_grad():
                model.body.weight.add_(1.0)

    with pytest.raises(RuntimeError, match=r"body\.weight: \d+ of \d+ dead weights are not 0"):
        fitter(Write(), pruning(Explicit([0.5]), rounds=0), epochs=1).fit(Net())
    fitter(Write(), pruning(Explicit([0.5]), rounds=0, verify=False), epochs=1).fit(Net())  # nobody looks


# --- gradients of before ---


def step_of(model, x, y, scale=1.0):
    (scale * nn.functional.cross_entropy(model(x), y)).backward()


def test_masks_set_between_backward_and_step_hold_for_the_gradients_that_are_there():
    x, y = samples().tensors
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    dense = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.dim() > 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = lp.hold(model, optimizer, dense)
    step_of(model, x, y)
    optimizer.step()
    optimizer.zero_grad()
    step_of(model, x, y)
    masks = {n: torch.rand(m.shape) < 0.5 for n, m in dense.items()}
    there = {n: model.get_parameter(n).grad.clone() for n in masks}
    handle.set(masks)
    assert dead_are_zero({n: model.get_parameter(n).grad for n in masks}, masks)
    norm = nn.utils.clip_grad_norm_([model.get_parameter(n) for n in masks], 1e9)
    living = torch.cat([there[n][m] for n, m in masks.items()])
    torch.testing.assert_close(norm, living.norm())
    for n, m in masks.items():
        assert not bits_of(optimizer.state[model.get_parameter(n)]["momentum_buffer"])[~m].any()
    optimizer.step()
    assert dead_are_zero(dict(model.named_parameters()), masks)
    handle.remove()


@pytest.mark.parametrize("way", ["plain", "accumulated"])
@pytest.mark.parametrize("rewind", [False, True])
def test_no_gradient_crosses_a_pruning_or_a_rewind(way, rewind):
    """Modules that zero gradients after the step, or not at all in the last batch of a round."""

    class Left(ByHand):
        def training_step(self, batch, batch_idx):
            at_start = [p.grad for p in self.parameters()]
            if self.trainer.global_step == start[-1]:
                seen.append(all(g is None for g in at_start))
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if way == "plain" or batch_idx != 2:  # the last gradient of an epoch waits for the next one
                self.optimizers().step()

    class Start(Callback):
        def on_round_start(self, trainer, *_):
            start.append(trainer.global_step)

    seen, start = [], [-1]
    others = [lp.LotteryTicketRewind()] if rewind else []
    pruner = pruning(rounds=2)
    # Lightning itself drops gradients before a validation.
    fitter(pruner, *others, Start(), epochs=3, limit_val_batches=0).fit(Left(sgd, "plain"))
    assert seen
    assert all(seen)


# --- and nothing else ---


@pytest.mark.parametrize("scheduler", ["before", "after", "none"])
def test_an_optimizer_whose_step_was_wrapped_gets_it_back(scheduler):
    model = nn.Linear(4, 4)
    optimizer = Lookahead(model.parameters())
    optimizer._optimizer_step_pre_hooks = {}
    schedule = lambda: lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    if scheduler == "before":
        schedule()
    before = vars(optimizer).get("step")
    masks = lp.prune(model, 0.5)
    handle = lp.hold(model, optimizer, masks)
    handle.watch([optimizer, optimizer], gradients=True)  # once is enough
    if scheduler == "after":
        schedule()
    model.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert dead_are_zero(dict(model.named_parameters()), masks)
    handle.remove()
    if scheduler != "after":  # which holds on to the function that it found
        assert vars(optimizer).get("step") is before
    model.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert bool((model.weight[~masks["weight"]] != 0).any())


def test_holding_changes_no_result_of_another_optimizer_of_the_process():
    """Bit for bit: two networks train in turn, one of them held."""
    x, y = samples().tensors
    results = []
    for held in (False, True):
        torch.manual_seed(1)
        ours, theirs = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2))
        masks = lp.prune(ours, 0.5)
        optimizers = [Adam(m.parameters(), lr=0.01) for m in (ours, theirs)]
        handle = lp.hold(ours, optimizers[0], masks) if held else None
        for _ in range(4):
            for m, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                step_of(m, x, y)
                optimizer.step()
        results.append(deepcopy(theirs.state_dict()))
        if handle:
            handle.remove()
    assert same(*results)
