"""Targets: what they count is what there is, what has no effect is said, and what cannot be is refused."""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune import criteria, filters, prune_channels, schedules
from lightning_prune.structured import discover, speed, targets
from lightning_prune.structured import units as structure
from tests.naming import in_words
from tests.networks import Net, fitter, same


def layers():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def said(work):
    """What is warned of in a call, but by Lightning and torch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught if re.search("nothing goes|units stay", str(w.message))]


@pytest.fixture
def counted_speed(monkeypatch):
    """What a clock says is replaced by what is computed, and a hundredth of noise."""

    def computed(works, at_least):
        counts = {
            name: float(sum(p.numel() for p in work.args[0].args[0].parameters()))
            for name, work in works.items()
        }
        return {"dense": [1.01 * counts["dense"]] * 5, "cut": [counts["cut"]] * 5}

    monkeypatch.setattr(speed, "settled", computed)


# ------------------------------------------------------------------------------------- without effect


FULL = sum(t.nbytes for t in Net().state_dict().values())
MET = {
    "Smaller(bytes=10000)": (
        filters.Smaller(10_000),
        r"at most 10000 bytes are wanted, and the weights take \d+",
    ),
    "Faster(times=1.005)": (
        filters.Faster(1.005),
        "1.005 times as fast is wanted, and it is 1.01 times as fast",
    ),
    "OneShot(sparsity=0.001)": (schedules.OneShot(0.001), "0.001 of them is less than one with round_to=1"),
}


@pytest.mark.parametrize("remove", ["end", "each_round"])
@pytest.mark.parametrize("name", MET)
def test_a_target_that_is_met_already_is_named_once(name, remove, counted_speed):
    schedule, why = MET[name]
    pruner = lp.StructuredChannelPruning(schedule, rounds=2, remove=remove)
    found = said(lambda: fitter(pruner, epochs=3).fit(Net()))
    assert len(found) == 1, found
    assert re.search(rf"schedule={re.escape(name)}: nothing goes of 32 units, since {why}", found[0])
    assert pruner.sparsity == 0


@pytest.mark.parametrize("name", MET)
def test_a_target_that_is_met_already_is_named_without_a_trainer(name, counted_speed):
    schedule, why = MET[name]
    found = said(lambda: prune_channels(layers(), schedule, [2, 6]))
    assert len(found) == 1
    assert re.search(rf"sparsity={re.escape(name)}: nothing goes of 32 units, since {why}", found[0])


def grouped():
    """Two layers of 16 channels whose normalizations have four groups: units are groups."""
    layers = (nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def test_it_is_said_once_that_units_stay_which_were_to_go():
    message = "sparsity=0.99: 2 of 8 units stay, where 0 were asked for, since one is left of each of 2 "
    found = said(lambda: prune_channels(grouped(), 0.99, [2, 3, 8, 8]))
    assert len(found) == 1
    assert found[0].startswith(message)
    assert not said(lambda: prune_channels(grouped(), 0.7, [2, 3, 8, 8]))
    assert not said(lambda: prune_channels(grouped(), 0.99, [2, 3, 8, 8], at_least=2))  # that is what it says
    pruner = lp.StructuredChannelPruning(schedules.OneShot(0.97), rounds=2, remove="each_round")
    found = said(lambda: fitter(pruner, epochs=4).fit(Net()))
    assert len(found) == 1
    assert re.search(r"schedule=OneShot.*: 2 of 32 units stay, where 1 were asked for", found[0])


def test_of_several_patterns_the_one_without_effect_is_named():
    by_pattern = {"stem.*": schedules.OneShot(0.5), "*": filters.Smaller(10_000)}
    found = said(lambda: fitter(lp.StructuredChannelPruning(by_pattern), epochs=2).fit(Net()))
    assert len(found) == 1
    assert found[0].startswith("schedule['*']=Smaller(bytes=10000): nothing goes of 16 units")


@pytest.mark.parametrize(
    "schedule",
    [
        filters.Removed(0.0),
        filters.Faster(1),
        schedules.OneShot(0.5),
        filters.Smaller([float("inf"), FULL, 0.6 * FULL].__getitem__),
        schedules.Explicit([0, 0.5, 0.5]),
        filters.Removed([0, 0.3, 0.3].__getitem__),
    ],
    ids=in_words,
)
def test_a_round_that_asks_for_nothing_more_is_no_news(schedule):
    pruner, model = lp.StructuredChannelPruning(schedule, rounds=2), Net()
    assert said(lambda: fitter(pruner, epochs=3).fit(model)) == []
    assert said(lambda: fitter(pruner, epochs=1).fit(model)) == []


# ---------------------------------------------------------------------------------------- what counts


class Stores(nn.Module):
    """A network whose state dict takes something else than its elements do."""

    def __init__(self, change):
        super().__init__()
        self.net = layers()
        change(self)

    def forward(self, x):
        return self.net(x)


def with_part(model):
    model.register_buffer("table", torch.zeros(5000)[10:30])


def with_part_of_a_weight(model):
    model.net[0].weight = nn.Parameter(torch.randn(4000)[100:196].view(16, 6))


def with_shared_memory(model):
    memory = torch.randn(2 * 96 + 1000)
    model.net[0].weight = nn.Parameter(memory[:96].view(16, 6))
    model.register_buffer("a", memory[96:192])
    model.register_buffer("b", memory[150:1192])


def with_flat_weights(model):
    """All of them in one memory, as some optimizers and wrappers keep them."""
    memory = torch.cat([p.detach().flatten() for p in model.net.parameters()])
    for p in model.net.parameters():
        p.data, memory = memory[: p.numel()].view_as(p), memory[p.numel() :]


def with_expanded(model):
    model.register_buffer("scale", torch.ones(1).expand(3000))


def with_sparse(model):
    model.register_buffer("graph", torch.eye(500).to_sparse())


def with_tied(model):
    model.net[2].weight = nn.Parameter(torch.randn(16, 16))
    model.again = model.net[2]


def with_names_of_its_own(model):
    model.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"my.{k}": state.pop(k) for k in list(state)})
    )


class Remembers(nn.Module):
    def get_extra_state(self):
        return {"seen": torch.arange(1000), "words": ["some"] * 10, "text": "x" * 3000}

    def set_extra_state(self, state):
        pass


def with_extra_state(model):
    model.memory = Remembers()


CHANGES = [
    with_part,
    with_part_of_a_weight,
    with_shared_memory,
    with_flat_weights,
    with_expanded,
    with_sparse,
    with_tied,
    with_names_of_its_own,
    with_extra_state,
]


def counted(model):
    return targets.cost({}, {}, targets.elements(model, [2, 6], {}, "bytes"), targets.memories(model))


def written(model, path):
    torch.save(model.state_dict(), path)
    return path.stat().st_size


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_size_that_is_counted_is_that_of_the_file(change, tmp_path):
    torch.manual_seed(0)
    model, x = Stores(change), [2, 6]
    couplings = discover(model, x)
    dense = structure.all_units(couplings)
    sizes, memories = targets.elements(model, x, couplings, "bytes"), targets.memories(model)

    def size(units):
        return targets.cost(couplings, units, sizes, memories)

    names = 1000 + 400 * len(model.state_dict())
    assert 0 < written(model, tmp_path / "full") - size(dense) < names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        units = prune_channels(model, 0.5, x)
    left = size({name: units[name] for name in dense})
    assert 0 < written(model, tmp_path / "small") - left < names
    assert counted(model) == left


@pytest.mark.parametrize("change", [with_part, with_expanded, with_extra_state], ids=lambda f: f.__name__)
def test_a_target_on_the_size_is_met_by_the_file(change, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model = Stores(change)
    wanted = counted(model) - 900
    prune_channels(model, filters.Smaller(wanted), [2, 6])
    names = 1000 + 400 * len(model.state_dict())
    assert written(model, tmp_path / "small") <= wanted + names
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    lp.save_sparse(tensors, tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size <= wanted + names


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_the_size_of_each_round_is_that_of_its_file(remove, tmp_path):
    class Part(Net):
        def __init__(self):
            super().__init__()
            with_part(self)
            self.memory = Remembers()

    model = Part()
    full = counted(model)
    schedule = filters.Smaller([float("inf"), full - 600, full - 1200].__getitem__)
    fitter(lp.StructuredChannelPruning(schedule, rounds=2, remove=remove), epochs=3).fit(model)
    assert full - 1300 < counted(model) <= full - 1200
    assert 0 < written(model, tmp_path / "small") - counted(model) < 1000 + 400 * len(model.state_dict())


def test_what_cannot_be_written_has_no_size():
    class Odd(Remembers):
        def get_extra_state(self):
            return lambda: 0

    model = layers()
    model.append(nn.Identity())
    model[5] = Odd()
    model[5].forward = lambda x: x
    with pytest.raises(ValueError, match=r"bytes: torch.save cannot write 5._extra_state of the state dict"):
        targets.memories(model)


# ------------------------------------------------------------------------------------ several patterns


def stored(model):
    return sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_sizes_of_several_patterns_are_those_of_the_whole_network(remove):
    full = stored(Net())
    first, both = Net(), Net()
    half = filters.Smaller(0.85 * full)
    fitter(
        lp.StructuredChannelPruning({"stem.*": half, "*": filters.Removed(0.0)}, remove=remove), epochs=2
    ).fit(first)
    by_pattern = {"stem.*": half, "*": filters.Smaller(0.6 * full)}
    fitter(lp.StructuredChannelPruning(by_pattern, remove=remove), epochs=2).fit(both)
    assert both.stem.out_features == first.stem.out_features < 16
    assert 0.53 * full < stored(both) <= 0.6 * full


def test_speeds_of_several_patterns_are_those_of_the_whole_network(counted_speed):
    model, before = Net(), sum(p.numel() for p in Net().parameters())
    by_pattern = {"stem.*": filters.Faster(1.2), "*": filters.Faster(1.6)}
    fitter(lp.StructuredChannelPruning(by_pattern), epochs=2).fit(model)
    assert 1.6 <= 1.01 * before / sum(p.numel() for p in model.parameters()) < 1.8
    assert model.stem.out_features < 16


def test_a_size_that_a_speed_before_it_decides_is_not_drawn_beforehand(counted_speed):
    """Alone, the second pattern's channels could not make the network that small."""
    model, full = Net(), stored(Net())
    by_pattern = {"stem.*": filters.Faster(2.0), "*": filters.Smaller(0.45 * full)}
    fitter(lp.StructuredChannelPruning(by_pattern), epochs=2).fit(model)
    assert stored(model) <= 0.45 * full
    with pytest.raises(ValueError, match=r"schedule\['\*'\]: bytes: 100 are wanted"):
        fitter(
            lp.StructuredChannelPruning({"stem.*": filters.Faster(1.1), "*": filters.Smaller(100)}), epochs=2
        ).fit(Net())


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (filters.Smaller(10), "bytes: 10 are wanted in round 1"),
        (filters.Removed(0.99), "schedule: 0.99 of the parameters is to be removed in round 1"),
        (filters.Faster(100), "times: 100 times as fast is wanted in round 1"),
    ],
    ids=in_words,
)
def test_the_pattern_is_named_whose_target_cannot_be_met(target, why, counted_speed):
    by_pattern = {"stem.*": schedules.OneShot(0.1), "*": target}
    with pytest.raises(ValueError, match=rf"^schedule\['\*'\]: {why}"):
        fitter(lp.StructuredChannelPruning(by_pattern), epochs=2).fit(Net())
    with pytest.raises(ValueError, match=rf"^{why}"):
        fitter(lp.StructuredChannelPruning(target), epochs=2).fit(Net())


# -------------------------------------------------------------------------------------------- arguments


def two(round, x):
    return 0.5


def of_scores(round, scores):
    return 0.5


ASKED = [
    (
        lambda: filters.Removed(filters.Smaller(3)),
        r"schedule=Smaller\(bytes=3\): a target is given to a target",
    ),
    (lambda: filters.Smaller(filters.Faster(3)), r"bytes=Faster\(times=3\): a target is given to a target"),
    (lambda: filters.Faster(filters.Removed), r"times=Removed: a target is given to a target"),
    (lambda: filters.Removed(schedules.OneShot), r"schedule=OneShot: a class is given"),
    (
        lambda: filters.Removed(of_scores),
        r"schedule=of_scores: it asks for `scores`, which a target does not have",
    ),
    (lambda: filters.Smaller(partial(two, x=1)), None),
    (lambda: filters.Smaller(two), r"bytes=two: it asks for `x`, which a target does not have"),
    (lambda: lp.StructuredChannelPruning(filters.Removed), r"a class is given.* Give Removed\(schedule\)"),
    (lambda: lp.StructuredChannelPruning(two), r"schedule=two asks for `x`, which nobody has"),
    (lambda: lp.StructuredChannelPruning({"a": two, "*": two}), r"schedule\['a'\]=two asks for `x`"),
]


@pytest.mark.parametrize(("make", "message"), ASKED, ids=in_words)
def test_what_a_target_cannot_aim_at_is_refused_as_it_is_given(make, message):
    if message is None:
        make()
        return
    with pytest.raises(ValueError, match=message):
        make()


OTHER = layers()
REFUSED = [
    ({"sparsity": filters.Smaller}, r"sparsity=Smaller: a class is given.* Give Smaller\(bytes\)"),
    ({"sparsity": two}, r"sparsity=two asks for `x`, which nobody has"),
    ({"sparsity": {"0*": 0.5, "*": 0.2}}, r"a schedule for each pattern is given; .* include=\[pattern\]"),
    ({"sparsity": lambda: 0.5}, r"sparsity: its signature is \(\)"),
    ({"optimizer": torch.optim.SGD}, r"optimizer: SGD is given; allowed is one that has stepped the model"),
    ({"optimizer": [torch.optim.SGD(OTHER.parameters())]}, r"optimizer: a list is given; allowed"),
    ({"optimizer": "sgd"}, r"optimizer: 'sgd' is given; allowed"),
    (
        {"optimizer": torch.optim.Adam(OTHER.parameters())},
        r"optimizer: none of the 6 parameters of this Adam is one of Sequential; allowed is",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=in_words)
def test_what_is_no_sparsity_or_no_optimizer_of_the_model_is_refused_before_anything(options, message):
    model = layers()
    before, calls = {n: p.clone() for n, p in model.named_parameters()}, []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        prune_channels(model, **{"sparsity": 0.5, "example_input": [2, 6], **options})
    assert same(before, dict(model.named_parameters()))
    assert not calls


def test_an_optimizer_of_a_part_of_the_model_goes_on():
    model = layers()
    optimizer = torch.optim.Adam(model[2:].parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"optimizer: 0.weight, 0.bias lose channels and are not in it"):
        prune_channels(model, 0.5, [2, 6], optimizer=optimizer)
    model.zero_grad()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    model = layers()
    model[:2].requires_grad_(False)
    optimizer = torch.optim.Adam(model[2:].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_channels(model, 0.5, [2, 6], optimizer=optimizer)


def test_partial_functions_are_called_by_their_names():
    def one_score(params, channels, seed):
        return {name: torch.ones(1) for name in channels}

    with pytest.raises(ValueError, match=r"criterion: .*one_score\(seed=3\) must give 16 scores"):
        fitter(lp.StructuredChannelPruning(criterion=partial(one_score, seed=3)), epochs=2).fit(Net())
    taylor = partial(criteria.taylor)
    with pytest.raises(ValueError, match=r"^taylor\(\) asks for `batches`"):
        prune_channels(layers(), 0.5, [2, 6], taylor)
    with pytest.warns(UserWarning, match=r"the last one, .*late\(by=3\) is at sparsity 0"):
        lp.StructuredChannelPruning(Late(3), rounds=1)


class Late:
    """A schedule whose repr is an address."""

    def __new__(cls, by):
        def late(round, by):
            return 0.5 * (round > by)

        schedule = partial(late, by=by)
        schedule.last = by + 1
        return schedule
