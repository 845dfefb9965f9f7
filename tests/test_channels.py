"""Coupled channels are found, what cannot go stays, and a cut network computes what the masked one did."""

import re
import sys
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import load_pruned
from lightning_prune.structured import discover
from lightning_prune.structured import units as structure
from lightning_prune.structured.surgery import cut
from lightning_prune.structured.targets import next_units
from lightning_prune.structured.trial import Through
from tests.networks import same

ROOT = Path(__file__).parents[1]
IMAGE = (2, 3, 16, 16)


def conv(a, b, k=3, norm=nn.BatchNorm2d, **options):
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=False, **options), norm(b), nn.ReLU())


class Residual(nn.Module):
    """A residual stream of 16 channels through three blocks of different insides, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 16)
        self.plain = nn.Sequential(conv(16, 12), conv(12, 16))
        self.grouped = nn.Sequential(conv(16, 24, 1), conv(24, 24, groups=4), conv(24, 16, 1))
        self.depthwise = nn.Sequential(conv(16, 20, 1), conv(20, 20, groups=20), conv(20, 16, 1))
        self.gate = nn.Sequential(nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.full((16, 1, 1), 1e-6))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.plain(x)
        x = x + self.scale * self.grouped(x)
        x = x + self.depthwise(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """Concatenations, a flattening into linear layers, a transposed convolution, two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 10)
        self.down = nn.Conv2d(16, 7, 3, stride=4, padding=1)
        self.act = nn.PReLU(7)
        self.up = nn.ConvTranspose2d(7, 9, 2, stride=2)
        self.mask = nn.Conv2d(9, 2, 1)
        self.fc = nn.Sequential(nn.Linear(7 * 16, 12), nn.Sigmoid(), nn.Linear(12, 4))

    def forward(self, x):
        a = self.a(x)
        x = self.act(self.down(torch.cat([a, self.b(a)], 1)))
        return {"mask": self.mask(self.up(x)), "class": self.fc(x.flatten(1))}


def randomized(model):
    """Weights and statistics as after a training: nothing is zero or one."""
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            t.uniform_(*((0.5, 1.5) if "var" in name or t.dim() == 1 else (-0.3, 0.3)))
    return model.eval()


def tensors(output):
    return list(output.values()) if isinstance(output, dict) else [output]


def alive(groups, fraction=0.4):
    return {n: torch.rand(g.units).argsort() >= max(1, int(g.units * fraction)) for n, g in groups.items()}


def masked(model, removed):
    twin = deepcopy(model)
    for (module, name, dim), gone in removed.items():
        tensor = getattr(twin.get_submodule(module), name)
        if isinstance(tensor, nn.Parameter):
            tensor.data.index_fill_(dim, gone, 0)
    return twin


def relative(model, twin, x):
    with torch.no_grad():
        pairs = list(zip(tensors(model(x)), tensors(twin(x)), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("make", [Residual, Joined])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_a_cut_network_computes_what_the_masked_one_did(make, fraction):
    model, x = randomized(make()), torch.randn(IMAGE)
    groups = discover(model, x)
    removed = structure.cut_of(groups, alive(groups, fraction))
    twin, before = masked(model, removed), deepcopy(model)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5
    assert relative(model, before, x) > 1e-3


def test_what_is_coupled_goes_together():
    groups = discover(Residual(), torch.randn(IMAGE))
    units = {name: (g.units, g.per_unit) for name, g in groups.items()}
    assert units == {
        "stem.0.weight": (16, 1),  # with every block's last convolution, and the gate's
        "plain.0.0.weight": (12, 1),
        "grouped.0.0.weight": (6, 4),
        "grouped.1.0.weight": (6, 4),
        "depthwise.0.0.weight": (20, 1),
        "gate.0.weight": (4, 1),
    }
    stream = {structure.parameter(site) for site in groups["stem.0.weight"].filters}
    assert stream >= {f"{b}.0.weight" for b in ("plain.1", "grouped.2", "depthwise.2", "stem")}
    assert ("", "scale", 0) in groups["stem.0.weight"].sites
    assert ("stem.1", "running_var", 0) in groups["stem.0.weight"].sites


def test_nothing_is_changed_by_looking():
    model = Residual().train()
    model.stem.requires_grad_(False)
    x = torch.randn(IMAGE)
    before, rng = deepcopy(model.state_dict()), torch.get_rng_state()
    needs = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        groups = discover(model, x)
    assert "stem.0.weight" in groups  # frozen channels are found, too
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_patterns_name_the_weights_that_make_channels():
    x = torch.randn(IMAGE)
    assert list(discover(Residual(), x, include=["plain.*"])) == [
        "stem.0.weight",
        "plain.0.0.weight",
    ]
    assert "stem.0.weight" not in discover(Residual(), x, exclude=["plain.1.*"])
    with pytest.raises(ValueError, match="'nothing' matches no prunable weight"):
        discover(Residual(), x, include=["nothing"])


# ---------------------------------------------------------------------------------- groups that are normed


class Diffusion(nn.Module):
    """As diffusion networks do it: a stream, a shortcut over a concatenation, a width that is checked."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.n1, self.n2, self.n3 = nn.Conv2d(3, 16, 3, padding=1), norm(16), norm(24), norm(40)
        self.down = Checked(16)
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.up, self.time = nn.Conv2d(40, 16, 1), nn.Linear(5, 24)
        self.head = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        stem = self.stem(x)
        x = self.a(torch.relu(self.n1(self.down(stem))))
        x = x + self.time(torch.ones(len(x), 5))[:, :, None, None]
        x = x + self.b(torch.relu(self.n2(x)))
        return self.head(stem + self.up(torch.relu(self.n3(torch.cat([x, stem], 1)))))


class Checked(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


def resnet(norm):
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5, norm_layer=norm)


NORMS = {
    "GroupNorm": lambda width: nn.GroupNorm(width // 4, width),
    "InstanceNorm": lambda width: nn.InstanceNorm2d(width, affine=True),
}


@pytest.mark.parametrize("make", [Diffusion, resnet])
@pytest.mark.parametrize("norm", NORMS)
def test_normed_groups_go_as_a_whole_and_load_again(norm, make, tmp_path):
    model, x = randomized(make(NORMS[norm])), torch.randn(2, 3, 64, 64)
    groups = discover(model, x)
    stem = groups["stem.weight" if make is Diffusion else "conv1.weight"]
    assert (stem.per_unit > 1) == (norm == "GroupNorm")
    assert len(groups) == (3 if make is Diffusion else 12)
    removed = structure.cut_of(groups, alive(groups))
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5
    torch.save(model.state_dict(), tmp_path / "small.pt")
    loaded = load_pruned(make(NORMS[norm]), tmp_path / "small.pt").eval()
    assert torch.equal(loaded(x), model(x))
    assert [vars(m).get("num_groups") for m in loaded.modules()] == [
        vars(m).get("num_groups") for m in model.modules()
    ]


def test_a_layer_keeps_a_channel_where_others_go_with_all_of_it():
    """Groups of ten of 24 and 16 channels: what goes together is all of one and some of the other."""
    model, x = randomized(Diffusion(lambda width: nn.GroupNorm(4, width))), torch.randn(2, 3, 8, 8)
    groups = discover(model, x)
    (stem,) = [g for g in groups.values() if g.parts]
    for seed in range(8):
        torch.manual_seed(seed)
        scores = {name: torch.rand(g.units) for name, g in groups.items()}
        dense = structure.all_units(groups)
        units = next_units(groups, scores, dense, [(list(groups), 0.99)])
        assert all(units[stem.name][part].any() for part in stem.parts)
        small = deepcopy(model)
        cut(small, structure.cut_of(groups, units))
        assert relative(small, masked(model, structure.cut_of(groups, units)), x) < 1e-5


# ------------------------------------------------------------------------------------------------------ traps


class Around(nn.Module):
    """A network of two convolutions with something in between and after."""

    def __init__(self, middle, width=8, out=8, after=None):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, width, 3, padding=1), middle
        self.extra = nn.Conv2d(3, 6, 1)
        self.inner = nn.Conv2d(6, 4, 1)
        self.last = nn.Conv2d(out, 4, 3)
        self.after = after or (lambda x: x)

    def forward(self, x):
        y = self.last(self.middle(self.first(x))).mean((2, 3))
        return self.after(y + self.inner(self.extra(x)).mean((2, 3)))


class Lambda(nn.Module):
    def __init__(self, f, *modules):
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(modules)

    def forward(self, x):
        return self.f(x, *self.parts)


def tied(x, a, b):
    b.weight = a.weight
    return b(torch.relu(a(x)))


def shuffle(x):
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


STAY = {  # what cannot be cut: a reason that the warning gives
    "GroupNorm": (lambda: nn.GroupNorm(1, 8), "GroupNorm takes its mean over them"),
    "bare GroupNorm": (lambda: nn.GroupNorm(2, 8, affine=False), "GroupNorm takes its mean over them"),
    "LayerNorm": (
        lambda: Lambda(lambda x, n: n(x.movedim(1, -1)).movedim(-1, 1), nn.LayerNorm(8)),
        "its mean",
    ),
    "multiplier": (lambda: nn.Conv2d(8, 8, 1), None),
    "view": (lambda: Lambda(lambda x: x.view(-1, 8, 16, 16) * 1.0), "fails|lost|another shape"),
    "softmax": (lambda: nn.Softmax(1), "not that in which they are zero"),
    "norm": (lambda: Lambda(lambda x: x / x.norm(dim=1, keepdim=True)), None),
    "first": (lambda: Lambda(lambda x: x * x[:, :1].sigmoid()), "not that in which they are zero"),
    "last": (lambda: Lambda(lambda x: x * x[:, -1:].sigmoid()), "first.weight"),
    "raw": (lambda: Lambda(lambda x, c: torch.conv2d(x, c.weight[:, :, :1, :1]), nn.Conv2d(8, 8, 3)), None),
    "shuffle": (lambda: Lambda(shuffle), None),
    "affine buffer": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), None),
    "branch": (lambda: Lambda(lambda x, a: a(x) if x.shape[1] < 8 else x, nn.Conv2d(8, 8, 1)), None),
    "tied": (lambda: Lambda(tied, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), None),
    "reused": (lambda: Lambda(lambda x, a: a(torch.relu(a(x))), nn.Conv2d(8, 8, 1)), None),
}


@pytest.mark.parametrize("name", STAY)
def test_channels_that_cannot_go_stay_and_the_rest_is_right(name):
    make, reason = STAY[name]
    model, x = randomized(Around(make())), torch.randn(IMAGE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = discover(model, x)
    said = " ".join(str(w.message) for w in caught)
    assert "extra.weight" in groups, said
    if reason:
        assert "first.weight" not in groups
        assert re.search(reason, said), said
        assert "first.weight" in said
    removed = structure.cut_of(groups, alive(groups))
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5
    model.train()(x)


@pytest.mark.parametrize("width", range(2, 20))
def test_a_channel_that_is_singled_out_shows_in_every_width(width):
    """Whichever channels a trial takes, the first is one of them."""
    gated = Around(Lambda(lambda x: x * x[:, :1].sigmoid()), width, width)
    with pytest.warns(UserWarning, match=r"not that in which they are zero: first\.weight"):
        assert "first.weight" not in discover(gated, IMAGE)


def test_what_a_depthwise_convolution_makes_of_a_channel_goes_with_it(tmp_path):
    def make():
        return Around(nn.Conv2d(8, 16, 3, padding=1, groups=8), out=16)

    model, x = randomized(make()), torch.randn(IMAGE)
    groups = discover(model, x)
    assert {name: group.units for name, group in groups.items()} == {"extra.weight": 6, "first.weight": 8}
    removed = structure.cut_of(groups, alive(groups))
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5
    assert (model.middle.out_channels, model.middle.groups) == (
        2 * model.middle.in_channels,
        model.first.out_channels,
    )
    torch.save(model.state_dict(), tmp_path / "small.pt")
    assert torch.equal(load_pruned(make(), tmp_path / "small.pt").eval()(x), model(x))


def test_outputs_may_be_none_or_without_a_gradient():
    class Odd(Residual):
        def forward(self, x):
            return {"logits": super().forward(x), "none": None, "sizes": (torch.tensor(x.shape), 3)}

    assert len(discover(Odd(), torch.randn(IMAGE))) == 6


def test_branches_of_training_are_seen():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = conv(3, 8), conv(8, 8)
            self.head, self.aux = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            y = self.head(self.body(x).mean((2, 3)))
            return (y, self.aux(x.mean((2, 3)))) if self.training else y

    model = Aux()
    groups = discover(model, torch.randn(IMAGE))
    assert ("aux", "weight", 1) in groups["stem.0.weight"].sites
    cut(model, structure.cut_of(groups, alive(groups)))
    assert [t.shape for t in model.train()(torch.randn(IMAGE))] == [(2, 4), (2, 4)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_what_cannot_be_traced_is_refused_with_a_reason():
    x = torch.randn(IMAGE)
    with pytest.raises(ValueError, match="is not initialized yet"):
        discover(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2)), torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"Residual is refused: its channels cannot be traced"):
        discover(Residual(), torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"Linear has no channels to remove: all are its outputs"):
        discover(nn.Linear(3, 4), torch.randn(2, 3))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    for model in (scripted, nn.Sequential(nn.Linear(3, 3), scripted, nn.Linear(4, 2))):
        with pytest.raises(ValueError, match=r"is a torch.jit.ScriptModule, whose layers cannot be traced"):
            discover(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        discover(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta"), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"no channels to remove: `include` and `exclude` leave none"):
        discover(Residual(), x, exclude=["*"])


def mlp(*more):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), *more)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return x @ self.weight


NOTHING = {  # what has no channels to remove, and the reason that is said
    "no parameters": (nn.ReLU, "ReLU has no channels, as it has no parameters"),
    "argmax": (lambda: mlp(Lambda(lambda y: y.argmax(-1))), "none of its outputs has a gradient.*argmax"),
    "no_grad": (lambda: Lambda(torch.no_grad()(lambda x, net: net(x)), mlp()), "computed under no_grad"),
    "NumPy": (lambda: mlp(Lambda(lambda y: y.detach().numpy())), "no tensor in its output, a ndarray"),
    "own layer": (Own, "the channels of Own cannot be traced"),
    "one unit": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 2)), "its layers have one unit each"),
    "zero outputs": (lambda: mlp(Lambda(lambda y: y * 0)), "outputs are all zero or empty on the example"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_go_the_true_reason_is_said(name):
    make, reason = NOTHING[name]
    with pytest.raises(ValueError, match=reason):
        discover(make(), torch.randn(2, 6))


class Sequence(nn.Module):
    """A layer, a recurrent one, and another layer: what goes into the second stays."""

    def __init__(self, recurrent):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))
        self.recurrent = recurrent
        self.last = nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x):
        x = self.first(x)
        if isinstance(self.recurrent, nn.RNNCellBase):
            return self.last(self.recurrent(x[:, 0]))
        return self.last(self.recurrent(x)[0])


WHY = (
    r"{} is not supported: first.2.weight\.",
    r"{} is recurrent, and its layers are not cut: first.2.weight\.",
)


class RootMeanSquare(nn.Module):
    """As transformers' models have it: a scale for each channel, by the mean over all of them."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()  # NaN where it is negative


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (RootMeanSquare(8), "RootMeanSquare computes something else without some of them"),
        (
            Noisy(),
            "the model's outputs differ from one evaluation to the next, so nothing can be compared",
        ),
    ],
)
def test_the_reason_names_what_mixes_channels_or_is_random(between, why):
    model = nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=rf"{why}: 0\.weight\."):
        assert list(discover(model, torch.randn(4, 6))) == ["2.weight"]


def test_outputs_that_are_no_numbers_are_said():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), Logarithm())
    with pytest.raises(ValueError, match="outputs hold NaN where some of them are zero"):
        discover(model, torch.randn(4, 6))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN, nn.GRUCell])
def test_what_goes_into_a_recurrent_layer_stays_and_the_rest_goes(kind):
    options = {} if issubclass(kind, nn.RNNCellBase) else {"batch_first": True, "num_layers": 2}
    model, x = Sequence(kind(8, 7, **options)), torch.randn(2, 5, 6)
    with pytest.warns(UserWarning, match=WHY[issubclass(kind, nn.RNNBase)].format(kind.__name__)):
        couplings = discover(model, x)
    assert list(couplings) == ["first.0.weight", "last.0.weight"]
    removed = structure.cut_of(couplings, alive(couplings))
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5


def pruned(layer):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "torch.nn.utils.prune": pruned,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_layer_that_computes_its_weight_keeps_its_own_channels_and_no_others(name):
    model, x = randomized(Around(COMPUTED[name](nn.Conv2d(8, 8, 1)))), torch.randn(IMAGE)
    model(x)  # leaves a weight with a graph on the layer
    said = r"a layer computes its weight from others .*: first.weight, middle.weight\."
    with pytest.warns(UserWarning, match=said):
        couplings = discover(model, x)
    assert list(couplings) == ["extra.weight"]
    removed = structure.cut_of(couplings, alive(couplings))
    twin = deepcopy_of(model)
    cut(model, removed)
    assert relative(model, masked(twin, removed), x) < 1e-5
    with pytest.warns(UserWarning, match=r": first.weight\."):
        discover(twin, x, exclude=["middle.weight"])  # what comes to it stays, too
    assert list(discover(twin, x, exclude=["middle.weight", "first.weight"])) == ["extra.weight"]


def deepcopy_of(model):
    from lightning_prune.structured.trial import copied

    return copied(model)


class Windows(nn.Module):
    """Attention in windows of an image, on tensors of five and six dimensions."""

    def __init__(self, dim=12, heads=3, window=4):
        super().__init__()
        self.heads, self.window = heads, window
        self.embed, self.norm = nn.Conv2d(3, dim, 1), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 20), nn.GELU(), nn.Linear(20, dim))
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        n = self.window
        x = x.view(b, h // n, n, w // n, n, c).transpose(2, 3).reshape(b, -1, n * n, c)
        parts = self.qkv(self.norm(x)).reshape(*x.shape[:3], 3, self.heads, c // self.heads)
        q, k, v = parts.permute(3, 0, 1, 4, 2, 5).unbind(0)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.proj(y.transpose(2, 3).reshape(x.shape))
        return self.head((x + self.mlp(x)).mean((1, 2)))


class Halves(nn.Module):
    """The block of YOLO: half of the channels pass, half go through more layers, all meet again."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = conv(3, 16), conv(16, 16, 1)
        self.more = nn.ModuleList([nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(2)])
        self.last, self.head = conv(32, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = list(self.first(self.stem(x)).split((8, 8), 1))
        for block in self.more:
            y.append(block(y[-1]))
        return self.head(self.last(torch.cat(y, 1)))


class Recurrence(nn.Module):
    """A convolutional LSTM, which runs the same layer on what it made, and a layer beside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.head = conv(3, 8), nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.beside = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1))

    def forward(self, x):
        seen = self.stem(x)
        h = c = torch.zeros_like(seen)
        for _ in range(2):
            i, f, o, g = self.gates(torch.cat([seen, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h) + self.beside(x)


class Expanded(nn.Module):
    """Two heads of two channels are repeated, as keys and values are in attention of grouped queries."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 8), nn.Linear(8, 4)
        self.beside = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        heads = self.first(x).unflatten(2, (2, 2)).transpose(1, 2)[:, :, None]
        repeated = heads.expand(-1, -1, 2, -1, -1).flatten(1, 2).transpose(1, 2).flatten(2)
        return self.last(repeated + self.second(x)) + self.beside(x)


PART = {  # model -> channels that stay, and some that go
    Windows: ({"qkv.weight", "embed.weight"}, {"mlp.0.weight"}),
    Halves: ({"first.0.weight"}, {"stem.0.weight", "more.0.0.0.weight", "last.0.weight"}),
    Expanded: ({"first.weight"}, {"beside.0.weight"}),
    Recurrence: ({"stem.0.weight", "gates.weight"}, {"beside.0.weight"}),
}


@pytest.mark.parametrize("make", PART)
def test_what_torch_pruning_cannot_read_stays_and_the_rest_goes(make):
    stay, go = PART[make]
    model, x = randomized(make()), torch.randn(IMAGE)
    with pytest.warns(UserWarning, match="channels left as they are") as caught:
        couplings = discover(model, x)
    said = " ".join(str(warning.message) for warning in caught)
    assert all(name in said and name not in couplings for name in stay)
    assert go <= set(couplings)
    removed = structure.cut_of(couplings, alive(couplings))
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5


def test_layers_that_no_output_depends_on_are_named():
    class Partly(Residual):
        def __init__(self):
            super().__init__()
            self.unused, self.teacher = nn.Linear(3, 4), nn.Linear(3, 5)

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x.mean((2, 3)))
            return super().forward(x) + target

    with pytest.warns(UserWarning, match="channels left as they are") as caught:
        assert len(discover(Partly(), torch.randn(IMAGE))) == 6
    said = str(caught[0].message)
    assert "no gradient reaches them from an output (no_grad, detach, argmax): teacher.weight" in said
    assert "their layer does not run on the example input: unused.weight" in said


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_compiled_network_is_cut_as_the_plain_one(how):
    model, x = randomized(Residual()), torch.randn(IMAGE)
    plain = deepcopy(model)
    if how == "in place":
        model.compile(backend="aot_eager")
    network = torch.compile(model, backend="aot_eager") if how == "wrapper" else model
    couplings = discover(network, x)
    assert [name.replace("_orig_mod.", "") for name in couplings] == list(discover(plain, x))
    masks = alive(couplings)
    cut(network, structure.cut_of(couplings, masks))
    bare = {name.replace("_orig_mod.", ""): mask for name, mask in masks.items()}
    cut(plain, structure.cut_of(discover(plain, x), bare))
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(x))


def test_a_module_may_keep_what_it_computed():
    class Keeps(Residual):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = Keeps()
    model(torch.randn(IMAGE))
    assert len(discover(model, torch.randn(IMAGE))) == 6
    model.all = {"last": [Residual()(torch.randn(IMAGE))]}
    assert len(discover(model, torch.randn(IMAGE))) == 6
    model.all = {Residual()(torch.randn(IMAGE))}
    with pytest.raises(ValueError, match=r"Keeps cannot be copied.*detach"):
        discover(model, torch.randn(IMAGE))


def test_an_example_is_an_input_or_a_shape():
    want = list(discover(Residual(), torch.randn(IMAGE)))
    for example in (list(IMAGE), IMAGE, torch.Size(IMAGE), (torch.randn(IMAGE),), {"x": torch.randn(IMAGE)}):
        assert list(discover(Residual(), example)) == want
    for example in ([0, 3, 8, 8], [2, -3, 8, 8]):
        with pytest.raises(ValueError, match=r"example_input=\[.*\]: allowed are sizes from 1 on"):
            discover(Residual(), example)


def test_dropout_in_training_branches_decides_nothing():
    class Drops(Residual):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    example = Through(lambda model, batch: model(batch).square().mean(), torch.randn(IMAGE))
    assert len(discover(Drops(), example)) == 6


def test_outputs_may_be_dataclasses():
    @dataclass
    class Output:
        logits: torch.Tensor
        name: str = "five classes"

    class Named(Residual):
        def forward(self, x):
            return Output(super().forward(x))

    assert len(discover(Named(), torch.randn(IMAGE))) == 6


class Attention(nn.Module):
    """What timm's attention has: queries, keys and values at once, and how many heads there are."""

    def __init__(self, dim=12, heads=4):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, 3, 3 * heads
        self.qkv, self.proj = nn.Linear(dim, 9 * heads), nn.Linear(3 * heads, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def attending(attention):
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), attention, nn.LayerNorm(12), nn.Linear(12, 3))


def test_attention_heads_go_as_a_whole(tmp_path):
    model, x = randomized(attending(Attention())), torch.randn(2, 7, 5)
    with pytest.warns(UserWarning, match="LayerNorm takes its mean over them"):
        groups = discover(model, x)
    assert {name: g.units for name, g in groups.items()} == {"2.qkv.weight": 4}
    rows = model[2].qkv.weight.detach().view(3, 4, 3, 12)
    removed = structure.cut_of(groups, {"2.qkv.weight": torch.tensor([True, False, True, True])})
    twin = masked(model, removed)
    cut(model, removed)
    assert relative(model, twin, x) < 1e-5
    assert torch.equal(model[2].qkv.weight.view(3, 3, 3, 12), rows[:, [0, 2, 3]])
    assert (model[2].num_heads, model[2].attn_dim, model[2].proj.in_features) == (3, 9, 9)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    loaded = load_pruned(attending(Attention()), tmp_path / "small.pt").eval()
    assert torch.equal(loaded(x), model(x))


def test_cutting_twice_equals_cutting_once():
    model, x = randomized(Residual()), torch.randn(IMAGE)
    groups = discover(model, x)
    first = alive(groups, 0.3)
    second = {
        n: m & (torch.rand(len(m)) > 0.3) | (torch.arange(len(m)) == m.int().argmax())
        for n, m in first.items()
    }
    once, twice = deepcopy(model), deepcopy(model)
    cut(once, structure.cut_of(groups, second))
    cut(twice, structure.cut_of(groups, first))
    here = structure.after(groups, first)
    cut(twice, structure.cut_of(here, {n: m[first[n]] for n, m in second.items()}))
    assert same(once.state_dict(), twice.state_dict())


def test_without_torch_pruning_it_says_which_one_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    pinned = re.search(r'"(torch-pruning==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    with pytest.raises(ImportError, match=f"pip install {re.escape(pinned[1])}"):
        discover(nn.Sequential(conv(3, 8), conv(8, 8)), torch.zeros(IMAGE))
