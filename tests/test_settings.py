"""With the rest of torch and Lightning: the laws hold in each setting, or the setting is refused."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import lightning_prune as lp
from lightning_prune.masks import alive, unpack
from lightning_prune.schedules import Geometric
from tests.networks import Gan, Manual, Net, Watch, dead_are_zero, fitter, loader, same, samples, sgd

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* a round (ends at|takes it to)",
    "ignore:.*dropout option adds dropout after all but last recurrent layer",
)

ALL = (*lp.pruning.LAYERS, "LSTM", "GRU", "MultiheadAttention", "Embedding", "ParameterList", "ParameterDict")


def pruning(**options):
    return lp.IterativeMagnitudePruning(Geometric(0.3), **{"rounds": 2, **options})


# ------------------------------------------------------------------------------------------------- the models


class Around(Net):
    """The network of the tests around a part of another kind, 16 features to 16."""

    def __init__(self, part=None, make=sgd):
        super().__init__(make)
        if part is not None:
            self.body = part

    def part(self, h):
        return self.body(h)

    def forward(self, x):
        return self.head(torch.relu(self.part(torch.relu(self.stem(x)))))


class Recomputed(Around):
    def part(self, h):
        return checkpoint(self.body, h, use_reentrant=False)


class Ordered(Net):
    def train_dataloader(self):
        return loader(shuffle=False)


class Tied(Around):
    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.body.weight

    def part(self, h):
        return self.twin(torch.relu(self.body(h)))


class Recurrent(Around):
    def part(self, h):
        return self.body(h.view(-1, 4, 4))[0].reshape(-1, 16)


class Attending(Around):
    def part(self, h):
        h = h.view(-1, 4, 4)
        return self.body(h, h, h, need_weights=False)[0].reshape(-1, 16)


class Embedded(Around):
    def part(self, h):
        return h + self.body((h * 10).long().clamp(0, 9)[:, :4]).reshape(-1, 16)


class Listed(Around):
    def part(self, h):
        weights = self.body.values() if isinstance(self.body, nn.ParameterDict) else self.body
        for w in weights:
            h = h @ w if w.dim() > 1 else h + w
        return h


class Compiled(Around):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.Tanh()))


class InPlace(Around):
    """`Module.compile` keeps the names of the parameters."""

    def __init__(self):
        super().__init__()
        self.body.compile()


def weights(*shapes):
    return [nn.Parameter(torch.randn(shape) / 4) for shape in shapes]


def optimizer(name, **options):
    return lambda params: getattr(torch.optim, name)(params, **options)


class Muon(Around):
    """Takes matrices only."""

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() == 2]
        others = [p for p in self.parameters() if p.dim() != 2]
        self.automatic_optimization = False
        return torch.optim.Muon(matrices, lr=0.05), torch.optim.SGD(others, lr=0.05)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for each in self.optimizers():
            each.zero_grad()
        self.manual_backward(loss)
        for each in self.optimizers():
            each.step()


SCALER = torch.amp.GradScaler("cpu", init_scale=2.0**10)

# name: what is trained, and options of the Trainer or of the callback
SETTINGS = {
    "torch.compile, inductor": (Compiled, {}),
    "Module.compile, inductor": (InPlace, {}),
    "16-mixed with a GradScaler": (Net, {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", SCALER)]}),
    "bf16-mixed": (Net, {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: Net().bfloat16(), {"precision": "bf16-true"}),
    "accumulation": (Net, {"accumulate_grad_batches": 2}),
    "clipping by norm": (Net, {"gradient_clip_val": 0.1}),
    "clipping by value": (Net, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "manual optimization, two optimizers": (Manual, {}),
    "a GAN": (Gan, {}),
    "LBFGS": (lambda: Net(optimizer("LBFGS", lr=0.1, max_iter=3)), {}),
    "Muon": (Muon, {}),
    "Adafactor": (lambda: Net(optimizer("Adafactor")), {}),
    "fused SGD": (lambda: Net(optimizer("SGD", lr=0.1, momentum=0.9, fused=True)), {}),
    "fused AdamW": (lambda: Net(optimizer("AdamW", fused=True)), {}),
    "foreach Adam": (lambda: Net(optimizer("Adam", foreach=True, weight_decay=0.1)), {}),
    "foreach SGD": (lambda: Net(optimizer("SGD", lr=0.1, momentum=0.9, foreach=True)), {}),
    "gradient checkpointing": (Recomputed, {"gradient_clip_val": 0.1}),
    "tied weights": (Tied, {"size": 400}),
    "ParameterList": (lambda: Listed(nn.ParameterList(weights((16, 16), (16,)))), {"size": 400}),
    "ParameterDict": (lambda: Listed(nn.ParameterDict({"a": weights((16, 16))[0]})), {"size": 400}),
    "LSTM": (lambda: Recurrent(nn.LSTM(4, 4, 2, batch_first=True)), {"size": 144 + 4 * 64}),
    "GRU": (lambda: Recurrent(nn.GRU(4, 4, 2, batch_first=True)), {"size": 144 + 4 * 48}),
    "MultiheadAttention": (lambda: Attending(nn.MultiheadAttention(4, 2, batch_first=True)), {"size": 208}),
    "embedding": (lambda: Embedded(nn.Embedding(10, 4)), {"size": 184}),
    "sparse gradients": (lambda: Embedded(nn.Embedding(10, 4, sparse=True), optimizer("SGD", lr=0.1)), {}),
    "EMA": (Net, {"callbacks": lambda: [EMAWeightAveraging(decay=0.5)]}),
    "overfit_batches": (Ordered, {"overfit_batches": 1}),
    "limit_train_batches": (Net, {"limit_train_batches": 2}),
    "val_check_interval": (Net, {"val_check_interval": 1}),
    "a time limit": (Net, {"max_time": {"hours": 1}}),
    "a sanity check": (Net, {"num_sanity_val_steps": 2}),
}
if not hasattr(torch.optim, "Muon"):  # torch before 2.9
    del SETTINGS["Muon"]


def layers_of(model):
    """Those of ALL that the model has: others are refused, lest a typing error goes unseen."""
    return [
        name
        for name in ALL
        if any(name in [cls.__name__ for cls in type(m).__mro__] for m in model.modules())
    ]


def train(name, folder, *more, first=False):
    make, options = SETTINGS[name]
    options, torch_options = dict(options), {}
    size = options.pop("size", None)
    for key in ("plugins", "callbacks"):
        if key in options:
            torch_options[key] = options.pop(key)()
    others = torch_options.pop("callbacks", [])
    model = make()
    pruner = pruning(layers=layers_of(model))
    watch = Watch(pruner)
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [*others, pruner, *more] if first else [pruner, *more, *others]
    options |= {**torch_options, "enable_checkpointing": True}
    trainer = fitter(*callbacks, watch, save, epochs=3, **options)
    before = {n: id(p) for n, p in model.named_parameters()}
    trainer.fit(model)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert watch.rounds == [0, 1, 2]
    total = sum(mask.numel() for mask in pruner.masks.values())
    assert size in (None, total)
    assert [alive(masks) for masks in watch.masks] == [round(0.7**r * total) for r in range(3)]
    assert dead_are_zero(model.state_dict(), pruner.masks)
    for epoch in range(3):
        file = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)
        masks = unpack(next(v for k, v in file["callbacks"].items() if k.startswith("Iterative"))["masks"])
        assert same(masks, watch.masks[epoch])
        assert dead_are_zero(file["state_dict"], masks)
        make().load_state_dict(file["state_dict"], strict=True)
    return trainer, model, pruner


@pytest.mark.parametrize("rewinding", [False, True], ids=["", "rewinding"])
@pytest.mark.parametrize("name", [n for n in SETTINGS if "inductor" not in n])
def test_the_laws_hold(name, rewinding, tmp_path):
    rewinder = [lp.LotteryTicketRewind(0)] if rewinding else []
    trainer, model, pruner = train(name, tmp_path, *rewinder, first=rewinding)
    trained = {n: p for n, p in model.named_parameters() if n in pruner.masks}
    assert any(bool((p[pruner.masks[n]] != 0).any()) for n, p in trained.items())
    if name.startswith("16-mixed"):  # the plain flag would fall back to bfloat16
        assert trainer.precision_plugin.scaler is SCALER
        assert SCALER.is_enabled()
        assert SCALER._scale is not None
    if name == "tied weights":
        assert model.twin.weight is model.body.weight
        assert list(pruner.masks) == ["stem.weight", "body.weight", "head.weight"]


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about what it looks at
@pytest.mark.parametrize("name", [n for n in SETTINGS if "inductor" in n])
def test_the_laws_hold_in_a_compiled_module(name, tmp_path):
    torch._dynamo.reset()
    _, model, pruner = train(name, tmp_path, lp.LotteryTicketRewind(0))
    assert any(n.startswith("body") for n in pruner.masks)
    x, _ = samples().tensors
    model.eval()
    compiled = model(x)
    torch.compiler.set_stance("force_eager")
    try:
        torch.testing.assert_close(compiled, model(x))  # it computes with the masked weights
    finally:
        torch.compiler.set_stance("default")


class Plain(Around):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()  # with batch normalization SWA trains an epoch more


@pytest.mark.filterwarnings("ignore:.*SWA is currently only supported every epoch")
@pytest.mark.parametrize("first", [False, True])
def test_stochastic_weight_averaging_within_the_last_round_leaves_zeros(first):
    averaging, pruner, model = StochasticWeightAveraging(0.01, swa_epoch_start=6), pruning(), Plain()
    pruner.every_n_epochs = 2
    ours = [pruner, lp.LotteryTicketRewind(0)]
    fitter(*([averaging, *ours] if first else [*ours, averaging]), epochs=7).fit(model)
    assert averaging.n_averaged == 2
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_stochastic_weight_averaging_over_a_rewind_is_refused():
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    with pytest.raises(ValueError, match="StochasticWeightAveraging replaces the learning rate scheduler"):
        fitter(averaging, pruning(), lp.LotteryTicketRewind(0), epochs=4).fit(Plain())


# ------------------------------------------------------------------------------------- other ways to use them


def test_a_fast_dev_run_prunes_nothing_and_breaks_nothing():
    pruner, model = pruning(), Net()
    fitter(pruner, lp.LotteryTicketRewind(), fast_dev_run=True).fit(model)
    assert (pruner.round, pruner.sparsity) == (0, 0.0)
    fitter(fresh := pruning(every_n_train_steps=1), fast_dev_run=3).fit(Net())
    assert fresh.round == 2


def test_a_fit_that_runs_out_of_time_ends_as_a_fit_ends():
    class Slow(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                timer = next(c for c in trainer.callbacks if type(c).__name__ == "Timer")
                timer._duration = 0.0

    pruner, model = pruning(), Net()
    trainer = fitter(pruner, Slow(), epochs=9, max_time={"hours": 1})
    trainer.fit(model)
    assert trainer.global_step < 9
    assert pruner.round == 1
    assert dead_are_zero(model.state_dict(), pruner.masks)


class Tunable(Net):
    lr = 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_tuning_changes_nothing(tmp_path):
    """A learning rate range test fits the model and puts it back; so are rounds, masks and clock."""
    results = []
    for tune in (False, True):
        torch.manual_seed(0)
        model, pruner = Tunable(), pruning()
        if tune:
            generators = torch.get_rng_state()
            trainer = fitter(pruner, lp.LotteryTicketRewind(1), epochs=3, default_root_dir=tmp_path)
            Tuner(trainer).lr_find(model, num_training=20, attr_name="lr", update_attr=False)
            assert (pruner.round, pruner.sparsity) == (0, 0.0)
            torch.set_rng_state(generators)
        else:
            trainer = fitter(pruner, lp.LotteryTicketRewind(1), epochs=3)
        trainer.fit(model)
        results.append((pruner.round, pruner.masks, dict(model.state_dict())))
    assert results[0][0] == 2
    assert same(*results)


def test_validate_test_and_predict_see_the_sparse_network():
    class Whole(Net):
        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        test_dataloader = predict_dataloader = Net.val_dataloader

    pruner, model = pruning(), Whole()
    trainer = fitter(pruner, lp.LotteryTicketRewind(), epochs=3)
    trainer.fit(model)
    state, masks = {n: v.clone() for n, v in model.state_dict().items()}, pruner.masks
    (validated,), (tested,) = trainer.validate(model, verbose=False), trainer.test(model, verbose=False)
    assert validated["val_loss"] == tested["val_loss"]
    x, _ = samples(16, seed=1).tensors
    model.eval()
    torch.testing.assert_close(torch.cat(trainer.predict(model)), model(x))
    assert same(dict(model.state_dict()), state)
    assert (pruner.masks, pruner.round) == (masks, 2)


def test_a_loop_in_fabric_holds_masks():
    """The lines that the README shows for a plain loop, in Fabric."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    masks = lp.prune(net, sparsity=0.5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    handle = lp.hold(net, optimizer, masks)  # before Fabric wraps them
    model, optimizer = fabric.setup(net, optimizer)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    for x, y in fabric.setup_dataloaders(loader()):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        assert dead_are_zero(dict(net.named_parameters()), masks)
    handle.remove()
    assert all(bool((p != start[n]).any()) for n, p in net.named_parameters())


# --------------------------------------------------------------------------------------------------- refusals


def normed(layer):
    return parametrizations.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        lambda layer: nn.utils.prune.identity(layer, "weight"),
    ],
    ids=["weight_norm", "spectral_norm", "the older weight_norm", "torch's own pruning"],
)
def test_a_weight_that_is_computed_is_refused_or_left_alone(norm):
    model = Around(norm(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"body\.weight is computed from others.* first, or exclude it"):
        fitter(pruning(), epochs=2).fit(model)
    pruner = pruning(exclude=["body*"])
    fitter(pruner, epochs=3).fit(model)
    assert list(pruner.masks) == ["stem.weight", "head.weight"]
    assert dead_are_zero(model.state_dict(), pruner.masks)


def test_a_parametrization_that_is_removed_is_no_obstacle():
    model = Around(parametrizations.weight_norm(nn.Linear(16, 16)))
    parametrize.remove_parametrizations(model.body, "weight")
    pruner = pruning()
    fitter(pruner, epochs=3).fit(model)
    assert alive(pruner.masks) == round(0.49 * 400)


def test_a_lazy_layer_is_refused_until_it_is_there():
    model = Around(nn.LazyLinear(16))
    with pytest.raises(
        ValueError, match=r"body\.weight is not there yet; run a batch through the lazy layer"
    ):
        fitter(pruning(), epochs=2).fit(model)
    model(torch.ones(1, 6))
    pruner = pruning()
    fitter(pruner, epochs=3).fit(model)
    assert alive(pruner.masks) == round(0.49 * 400)
    assert dead_are_zero(model.state_dict(), pruner.masks)
