"""In which order data reach layers: whatever the network, and at the cost of a block, not of the network."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_prune.reaching import in_order


class Block(nn.Module):
    """A block of a transformer, more or less: arguments by position and keyword, and a cache it writes to."""

    def __init__(self, width=6, out_of_place=True):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x, scale=None, cache=None):
        h = torch.tanh(x)
        attended = torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h) * scale
        if cache is not None:
            cache.append(attended)
            assert len(cache) < 5
        x = x + self.o(attended)
        return x + self.down(torch.relu_(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth=3, way="plain"):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.way, self.ran = way, 0
        for block in self.blocks:
            block.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.ran += 1

    def forward(self, x):
        x = self.embed(x)
        first, scale = x, torch.full((1,), 0.5)
        cache = [] if self.way == "cache" else None
        for i, block in enumerate(self.blocks):
            if self.way == "between":
                x = x * 1.5
            if self.way == "side":  # what blocks get beside their input comes from the block before
                scale = x.mean().reshape(1)
            if self.way == "each":  # made anew for each block, and not from the block before
                scale = torch.full((1,), 0.5 + i)
            if self.way == "wrapped":
                x = block(x + 0, scale, cache=cache)
                continue
            x = block(x, scale, cache=cache)
            if self.way == "skip" and i == 1:
                x = x + first
            if self.way == "in place":
                x.mul_(1.0)
        return self.head(x)


def named(model):
    return [name for name, p in model.named_parameters() if p.dim() > 1]


def seen(model, names, batches, forward=lambda m, x: m(x), change=True):
    """What reaches each layer as it is seen, and the order; each weight is changed when it was seen."""
    parameters, inputs, order = dict(model.named_parameters()), {}, []
    for reached in in_order(model, names, batches, forward):
        order.append(reached.names)
        owners = {n: model.get_submodule(n.rpartition(".")[0]) for n in reached.names}
        for name, layer in owners.items():
            inputs[name] = []
            see = lambda m, args, name=name: inputs[name].append(args[0].clone())  # noqa: E731
            owners[name] = layer.register_forward_pre_hook(see)
        for batch in reached.batches:
            reached.forward(model, batch)
        for name, handle in owners.items():
            handle.remove()
            if change:
                parameters[name].data.mul_(0.5)
    return inputs, order


def slowly(model, names, order, batches):
    """The same by running the whole model for each layer."""
    parameters, inputs = dict(model.named_parameters()), {}
    for group in order:
        for name in group:
            inputs[name] = []
            layer = model.get_submodule(name.rpartition(".")[0])
            see = lambda m, args, name=name: inputs[name].append(args[0].clone())  # noqa: E731
            handle = layer.register_forward_pre_hook(see)
            for batch in batches:
                model(batch)
            handle.remove()
        for name in group:
            parameters[name].data.mul_(0.5)
    return inputs


def same_inputs(model, batches):
    names, twin = named(model), deepcopy(model)
    inputs, order = seen(model, names, batches)
    assert sorted(name for group in order for name in group) == sorted(names)
    with torch.no_grad():
        expected = slowly(twin, names, order, batches)
    for name in names:
        assert len(inputs[name]) == len(expected[name]), name
        for a, b in zip(inputs[name], expected[name], strict=True):
            assert torch.allclose(a, b, atol=1e-6), name
    return order


CHAINS = ("plain", "cache", "each")
OTHERS = ("between", "side", "skip", "wrapped")


@pytest.mark.parametrize("way", [*CHAINS, *OTHERS, "in place"])
def test_each_layer_is_seen_with_what_the_changed_ones_before_it_give(way):
    torch.manual_seed(0)
    order = same_inputs(Stack(way=way).eval(), [torch.randn(2, 5, 4) for _ in range(3)])
    of_block = [["q", "k", "v"], ["o"], ["up"], ["down"]]
    blocks = [[f"blocks.{i}.{n}.weight" for n in group] for i in range(3) for group in of_block]
    assert order == [["embed.weight"], *blocks, ["head.weight"]]


@pytest.mark.parametrize("way", [*CHAINS, *OTHERS])
def test_only_the_block_in_hand_runs_where_blocks_follow_on_each_other(way):
    batches, ran = [torch.randn(2, 5, 4) for _ in range(4)], {}
    for depth in (2, 4, 8):
        model = Stack(depth, way)
        if way == "cache" and depth == 8:
            return  # its cache holds four
        seen(model, named(model), batches, change=False)
        ran[depth] = model.ran
    grows = (ran[8] - ran[4]) / (ran[4] - ran[2])
    assert grows == pytest.approx(2, abs=0.1) if way in CHAINS else grows > 2.5


class Residual(nn.Module):
    """A small residual network: lists of blocks one after the other, convolutions, operations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.first = nn.Sequential(*(Basic() for _ in range(2)))
        self.second = nn.Sequential(*(Basic() for _ in range(2)))
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.second(self.first(self.stem(x))).mean((2, 3)))


class Basic(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.across = (nn.Conv2d(4, 4, k, padding=k // 2) for k in (3, 3, 1))

    def forward(self, x):
        x = nn.functional.relu(x, inplace=True)
        return (self.two(torch.relu(self.one(x))) + self.across(x)).relu_()


def test_convolutions_and_operations_in_place():
    torch.manual_seed(0)
    order = same_inputs(Residual().eval(), [torch.randn(2, 3, 6, 6) for _ in range(2)])
    assert order[:2] == [["stem.0.weight"], ["first.0.one.weight"]]
    assert order[-1] == ["out.weight"]


def transformer(name):
    library = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}
    more = {"GPT2": {"n_layer": 3, "n_head": 2, "n_embd": 8, "vocab_size": 20}}.get(name, sizes)
    if name != "GPT2":
        more |= {"intermediate_size": 12}
    if name in ("Llama", "Mistral"):
        more |= {"num_key_value_heads": 1}
    return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")(**more)).eval()


@pytest.mark.filterwarnings("ignore")  # those of transformers
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Bert"])
def test_transformers_are_chains_of_blocks(name):
    torch.manual_seed(0)
    model, batches = transformer(name), [torch.randint(0, 20, (2, 7)) for _ in range(3)]
    layers = [n for n in named(model) if "emb" not in n and "wte" not in n and "wpe" not in n]
    first = model.get_submodule({"GPT2": "h.0", "Bert": "encoder.layer.0"}.get(name, "layers.0"))
    inputs, order = seen(deepcopy(model), layers, batches)
    with torch.no_grad():
        expected = slowly(deepcopy(model), layers, order, batches)
    for layer in layers:
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(inputs[layer], expected[layer], strict=True)
        )
    ran = []
    first.register_forward_pre_hook(lambda *_: ran.append(1))
    seen(model, layers, batches, change=False)
    assert len(ran) < 16 + 3 * len([group for group in order if any(".0." in n for n in group)])


def test_a_chain_of_layers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    assert same_inputs(model, [torch.randn(3, 4)]) == [["0.weight"], ["2.weight"], ["4.weight"]]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for _ in range(2):
            for layer in self.layers:
                x = torch.tanh(layer(x))
        return x


def test_a_layer_that_is_called_twice_is_seen_twice():
    model = Twice()
    inputs, order = seen(model, named(model), [torch.randn(3, 4) for _ in range(2)])
    assert order == [["layers.0.weight"], ["layers.1.weight"]]
    assert all(len(calls) == 4 for calls in inputs.values())


class Routed(nn.Module):
    """Experts of which each batch reaches one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        return self.experts[int(x[0, 0])](x)


def test_layers_that_only_later_batches_reach_are_found():
    model, batches = Routed(), [torch.full((2, 4), float(i)) for i in (2, 0, 1)]
    inputs, order = seen(model, named(model), batches)
    assert order == [[f"experts.{i}.weight"] for i in (2, 0, 1)]
    assert all(len(calls) == 1 for calls in inputs.values())


def test_layers_that_no_data_reach_are_named():
    model = Routed()
    with pytest.raises(ValueError, match=r"no data reach the layers of experts.0.weight, experts.2.weight"):
        next(iter(in_order(model, named(model), [torch.full((2, 4), 1.0)], lambda m, x: m(x))))


def test_gradients_are_not_switched_off_outside_and_no_hook_stays():
    model = Stack()
    for _ in in_order(model, named(model), [torch.randn(2, 5, 4)], lambda m, x: m(x)):
        assert torch.is_grad_enabled()
        break
    for module in model.modules():
        assert not module._forward_hooks
        assert len(module._forward_pre_hooks) == isinstance(module, Block)
