"""StructuredChannelPruning: channels really go away, and resumption, rewinding and precision still work."""

import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate

import lightning_prune as lp
from lightning_prune.structured import discover, speed
from tests.naming import in_words
from tests.networks import Manual, Net, Watch, fitter, same, state
from tests.test_surgery import OPTIMIZERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:StepLR. a round ends at"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 on torch 2.14
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
HALF = lp.schedules.OneShot(0.5)
WAYS = ("end", "each_round")


def gradual(**options):
    options = {"schedule": lp.schedules.Linear(sparsity=0.5, rounds=2), "rounds": 2, **options}
    return lp.StructuredChannelPruning(**options)


def widths(model):
    return model.stem.out_features, model.body.out_features


@pytest.mark.parametrize("remove", WAYS)
def test_channels_really_go_away(remove):
    model, pruner = Net(), gradual(remove=remove)
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((*widths(pl_module), pruner.sparsity))

    trainer = fitter(Look(), pruner, epochs=3)
    trainer.fit(model)
    assert widths(model) == (8, 8)
    assert pruner.sparsity == 0.5
    if remove == "each_round":
        assert seen == [(16, 16, 0.0), (12, 12, 0.25), (8, 8, 0.5)]
    else:
        assert seen == [(16, 16, 0.0), (16, 16, 0.25), (16, 16, 0.5)]
    (optimizer,) = trainer.optimizers
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert all(s.shape == p.shape for p, memory in optimizer.state.items() for s in memory.values())


def test_the_cut_at_the_end_computes_what_was_trained():
    model, pruner, kept = Net(), gradual(), {}

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            kept["model"] = deepcopy(pl_module).eval()

    watch = Watch(pruner)
    fitter(Keep(), watch, pruner, epochs=3).fit(model)
    x = torch.randn(9, 6)
    assert widths(kept["model"]) == (16, 16)
    torch.testing.assert_close(model.eval()(x), kept["model"](x), rtol=1e-5, atol=1e-6)
    assert watch.checked


@pytest.mark.parametrize("remove", WAYS)
@pytest.mark.parametrize("clock", [{}, {"every_n_train_steps": 4}], ids=["epochs", "steps"])
@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW", "AdamW amsgrad fused"])
def test_resume_equals_straight_run(remove, name, clock, tmp_path):
    def run(folder, epochs, path=None):
        torch.manual_seed(len(folder))  # a resumed run starts from other weights and another seed
        model, pruner = Net(make=OPTIMIZERS[name], schedule=step_lr), gradual(remove=remove, **clock)
        saver = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        trainer = fitter(saver, pruner, epochs=epochs, enable_checkpointing=True)
        trainer.fit(model, ckpt_path=path, weights_only=True)
        found = state(trainer)
        del found["buffers"]["seen"]  # not persistent: no checkpoint has it
        return found, pruner

    straight, pruner = run("straight", 4)
    for epoch in range(3):
        resumed, again = run(f"again {epoch}", 4, tmp_path / "straight" / f"epoch={epoch}.ckpt")
        assert same(resumed, straight), epoch
        assert same(again.channels, pruner.channels)
        assert again.round == pruner.round


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)


@pytest.mark.parametrize("remove", WAYS)
def test_a_cut_checkpoint_loads_anywhere_and_trains_on(remove, tmp_path):
    model, pruner = Net(), gradual(remove=remove)
    trainer = fitter(pruner, epochs=3)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    loaded = lp.load_pruned(Net(), tmp_path / "small.ckpt")
    assert same(loaded.state_dict(), model.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    further = Net()
    trainer = fitter(gradual(remove=remove), epochs=4)
    trainer.fit(further, ckpt_path=tmp_path / "small.ckpt")
    assert trainer.current_epoch == 4
    assert widths(further) == (8, 8)


@pytest.mark.parametrize("to_step", [0, 2])
@pytest.mark.parametrize("remove", WAYS)
def test_a_structured_ticket_is_the_early_state_without_its_channels_bit_for_bit(remove, to_step):
    """Weights, buffers, momentum and learning rate, in every round."""
    pruner, rewind = gradual(remove=remove), lp.LotteryTicketRewind(to_step)
    early, found = {}, []

    class Early(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == to_step and not early:
                early.update(state(trainer))

    class After(Callback):  # of a round's first batch start
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pruner.round and not batch_idx:
                found.append((state(trainer), deepcopy(pruner.channels)))

    fitter(Early(), pruner, rewind, After(), epochs=3).fit(Net(schedule=step_lr))
    assert len(found) == 2
    for now, units in found:
        out = {"stem": units["stem.weight"], "norm": units["stem.weight"], "body": units["body.weight"]}
        into = {"body": units["stem.weight"], "head": units["body.weight"]}

        def ticket(name, t, out=out, into=into):
            layer, _, tensor = name.partition(".")
            cut = [(0, out.get(layer))] if t.dim() else []
            cut += [(1, into.get(layer))] if t.dim() == 2 else []
            for dim, alive in cut:
                if alive is not None and remove == "each_round":
                    t = t[alive] if dim == 0 else t[:, alive]
                elif alive is not None and tensor in ("weight", "bias"):
                    t = torch.where(alive[:, None] if dim == 0 and t.dim() == 2 else alive, t, 0.0)
            return t

        for kind in ("params", "buffers"):
            assert same(now[kind], {name: ticket(name, t) for name, t in early[kind].items()})
        assert now["schedulers"] == early["schedulers"]
        before, after = early["optimizers"][0]["state"], now["optimizers"][0]["state"]
        for i, name in enumerate(early["params"]):
            momentum = before[i]["momentum_buffer"] if to_step else None
            assert momentum is None or same(after[i]["momentum_buffer"], ticket(name, momentum))


@pytest.mark.parametrize("remove", WAYS)
def test_with_manual_optimization_and_rounds_of_steps(remove):
    model = Manual()
    fitter(gradual(remove=remove, every_n_train_steps=2), epochs=5).fit(model)
    assert widths(model) == (8, 8)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_clip_val": 0.1}, 1e-5),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 1e-5),
        ({"accumulate_grad_batches": 2}, 1e-5),
        ({"precision": "bf16-mixed"}, 1e-2),
        ({"gradient_clip_val": 0.1, "accumulate_grad_batches": 3, "precision": "bf16-mixed"}, 1e-2),
    ],
    ids=in_words,
)
def test_masked_channels_train_as_if_they_were_cut(options, tolerance):
    """What is dead counts nothing, in a norm either: both ways train the same network."""
    ends = []
    for remove in WAYS:
        torch.manual_seed(0)
        model = Net(dropout=0.0)
        fitter(gradual(remove=remove), epochs=3, **options).fit(model)
        assert widths(model) == (8, 8)
        ends.append([*model.parameters(), model.eval()(torch.ones(2, 6))])
    for masked, cut in zip(*ends, strict=True):
        torch.testing.assert_close(masked, cut, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "criterion",
    [lp.criteria.taylor, lp.criteria.Ln(2), lp.filters.geometric_median, lp.filters.RandomChannels()],
    ids=lambda c: getattr(c, "__name__", repr(c)),
)
@pytest.mark.parametrize("allocate", [lp.allocation.global_rank, lp.filters.isomorphic])
def test_every_criterion_and_allocation_runs_through_all_rounds(criterion, allocate):
    model = Net()
    pruner = gradual(remove="each_round", criterion=criterion, allocate=allocate)
    fitter(pruner, epochs=3).fit(model)
    assert sum(widths(model)) == 16


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_shrink_with_the_network_and_resume(first, tmp_path):
    def run(epochs, path=None):
        model, average, pruner = Net(dropout=0.0), WeightAveraging(), gradual(remove="each_round")
        trainer = fitter(*([average, pruner] if first else [pruner, average]), epochs=epochs)
        trainer.fit(model, ckpt_path=path, weights_only=True)
        assert widths(average._average_model.module) == widths(model) == (8, 8)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return {n: p.detach() for n, p in average._average_model.named_parameters()}

    run(3)
    resumed = run(5, tmp_path / "3.ckpt")
    assert [p.shape for p in resumed.values()] == [p.shape for p in run(5).values()]


def test_built_from_yaml_by_type_hints():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(lp.StructuredChannelPruning, "pruner")
    config = parser.parse_args(["--pruner.remove=each_round", "--pruner.example_input=[2, 6]"])
    pruner = parser.instantiate(config).pruner
    assert (pruner.remove, pruner.example_input) == ("each_round", [2, 6])


def test_slimming_drives_scales_to_zero():
    scales = []
    for slimming in (0.0, 0.05):
        torch.manual_seed(0)
        model = Net()
        options = {"criterion": lp.filters.batch_norm_scale, "include": ["stem.*"], "slimming": slimming}
        fitter(lp.StructuredChannelPruning(HALF, every_n_epochs=5, **options), epochs=6).fit(model)
        assert widths(model) == (8, 16)
        scales.append(float(model.norm.weight.detach().abs().sum()))
    assert scales[1] < scales[0] - 0.1


def test_a_schedule_for_each_pattern_and_a_second_fit():
    model = Net()
    schedule = {"stem.*": HALF, "*": lp.schedules.OneShot(0.25)}
    pruner = lp.StructuredChannelPruning(schedule)
    fitter(pruner, epochs=2).fit(model)
    assert widths(model) == (8, 12)
    fitter(pruner, epochs=1).fit(model)
    assert widths(model) == (8, 12)


@pytest.mark.parametrize("remove", WAYS)
@pytest.mark.parametrize("of", ["parameters", "multiply_adds"])
def test_a_target_on_parameters_or_multiply_adds_is_met_by_the_fewest_channels(remove, of):
    def size(model):
        weights = [p for p in model.parameters() if p.dim() > 1 or of == "parameters"]
        return sum(p.numel() for p in weights)

    model = Net()
    full = size(model)
    schedule = lp.filters.Removed(lp.schedules.Linear(sparsity=0.5, rounds=2), of)
    fitter(gradual(schedule=schedule, remove=remove), epochs=3).fit(model)
    assert 0.5 <= 1 - size(model) / full < 0.6  # a channel more or less is 0.06
    hard = lp.filters.Removed(lp.schedules.OneShot(0.99), of)
    with pytest.raises(ValueError, match=r"schedule: 0.99 of the .* is to be removed in round 1"):
        fitter(gradual(schedule=hard), epochs=2).fit(Net())


@pytest.mark.parametrize("remove", WAYS)
def test_a_target_on_the_bytes_of_the_weights_is_met_in_each_round(remove):
    stored = lambda model: sum(t.nbytes for t in model.state_dict().values())  # noqa: E731
    model = Net()
    full = stored(model)
    table = {0: full, 1: 0.8 * full, 2: 0.5 * full}
    pruner = gradual(schedule=lp.filters.Smaller(table.__getitem__), remove=remove)
    fitter(pruner, epochs=3).fit(model)
    assert 0.4 * full < stored(model) <= 0.5 * full  # a channel more or less is 0.06
    assert len(pruner.history) == 3
    with pytest.raises(ValueError, match=r"bytes: 10 are wanted in round 1"):
        fitter(gradual(schedule=lp.filters.Smaller(10)), epochs=2).fit(Net())


def test_an_example_may_be_given():
    for example in ([2, 6], torch.ones(2, 6)):
        model = Net()
        fitter(lp.StructuredChannelPruning(HALF, example_input=example), epochs=2).fit(model)
        assert widths(model) == (8, 8)


def test_the_training_is_not_disturbed_before_the_first_pruning():
    runs = []
    for callbacks in ([], [lp.StructuredChannelPruning(HALF, every_n_epochs=9)]):
        torch.manual_seed(0)
        model = Net()
        trainer = fitter(*callbacks, epochs=2)
        trainer.fit(model)
        runs.append({n: p.detach() for n, p in model.named_parameters()})
    assert same(*runs)


@pytest.mark.parametrize("remove", WAYS)
def test_calibration_leaves_the_order_of_the_batches_as_it_was(remove):
    def seen(calibrate):
        batches, states = [], []

        class Look(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                batches.append(batch[0].clone())
                states.append(torch.get_rng_state())

        torch.manual_seed(0)
        model = Net()
        fitter(gradual(remove=remove, calibrate=calibrate), Look(), epochs=3).fit(model)
        return batches, states

    for with_it, without in zip(seen(2), seen(0), strict=True):
        assert same(with_it, without)


def test_bad_input_is_refused():
    for options, message in (
        ({"remove": "now"}, r"remove='now': allowed are 'end' and 'each_round'"),
        ({"round_to": 0}, r"round_to=0: allowed are whole numbers from 1 on"),
        ({"at_least": 0}, r"at_least=0: allowed"),
        ({"slimming": -1.0}, r"slimming=-1.0: allowed"),
        ({"rounds": -1}, r"rounds=-1: allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            lp.StructuredChannelPruning(**options)
    with pytest.raises(ValueError, match=r"LBFGS keeps state"):
        fitter(gradual(), epochs=1).fit(Net(make=torch.optim.LBFGS))
    with pytest.raises(ValueError, match=r"goes alone; IterativeMagnitudePruning is here"):
        fitter(gradual(), lp.IterativeMagnitudePruning(), epochs=1).fit(Net())
    with pytest.raises(ValueError, match=r"pattern 'x' matches no prunable weight"):
        fitter(gradual(include=["x"]), epochs=1).fit(Net())
    trainer = fitter(strategy="ddp")
    with pytest.raises(ValueError, match=r"remove='each_round': the strategy is DDPStrategy"):
        gradual(remove="each_round").setup(trainer, Net(), "fit")


def test_two_processes_cut_the_same_channels(tmp_path):
    """DDP over gloo, real processes: Lightning starts the script a second time."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ddp_channels", str(tmp_path), "ddp"]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, timeout=600)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world"] == 2
    assert same(first, second)
    assert first["state"]["body.weight"].shape == (8, 8)
    torch.testing.assert_close(*first["outputs"], rtol=1e-5, atol=1e-6)
    assert same(lp.load_pruned(Net(), tmp_path / "small.ckpt").state_dict(), first["state"])


def test_processes_that_hand_their_weights_back_are_refused():
    trainer = fitter(strategy="ddp_fork", devices=2)
    with pytest.raises(ValueError, match=r"Allowed is strategy='ddp'"):
        gradual().setup(trainer, Net(), "fit")


def test_the_head_keeps_its_classes():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    groups = discover(model, torch.randn(2, 6))
    assert list(groups) == ["0.weight"]


@pytest.mark.parametrize("remove", WAYS)
def test_the_sparse_file_is_that_of_the_smaller_network(remove, tmp_path):
    model = Net()
    trainer = fitter(gradual(remove=remove, save_sparse=str(tmp_path / "small")), epochs=3)
    trainer.fit(model)
    written = lp.load_sparse(tmp_path / "small")
    assert same(written, dict(model.state_dict()))
    assert len(written["stem.weight"]) == 8


# ------------------------------------------------------------------------------- frozen, copied, kept


def test_channels_of_layers_in_no_optimizer_stay_unless_they_are_included():
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.stem.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    model = Frozen()
    with pytest.warns(UserWarning, match=r"stem\.weight: no optimizer trains them, so their channels stay"):
        fitter(gradual(), epochs=3).fit(model)
    assert widths(model) == (16, 8)
    model = Frozen()
    fitter(gradual(include=["stem.*", "body.*"]), epochs=3).fit(model)
    assert widths(model) == (8, 8)
    model = Frozen()
    model.body.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no optimizer trains the layers.*include=: stem\.weight, body\.weight"
    ):
        fitter(gradual(), epochs=3).fit(model)


class Averaging(Net):
    """An average of two layers, as a module of its own."""

    def __init__(self):
        super().__init__()
        self.average = AveragedModel(nn.ModuleList([self.stem, self.body]))

    def on_train_batch_end(self, *_):
        self.average.update_parameters(nn.ModuleList([self.stem, self.body]))


@pytest.mark.parametrize("remove", WAYS)
def test_averages_that_a_module_keeps_follow_the_cut(remove):
    model = Averaging()
    follow = {"average.module.0.*": "stem.*", "average.module.1.*": "body.*"}
    fitter(gradual(remove=remove, follow=follow), epochs=3).fit(model)
    stem, body = model.average.module
    assert widths(model) == (stem.out_features, body.out_features) == (8, 8)
    model.average.update_parameters(nn.ModuleList([model.stem, model.body]))
    with pytest.raises(ValueError, match="no parameter is such a copy"):
        fitter(gradual(follow={"other.*": "stem.*"}, exclude=["average.*"]), epochs=3).fit(Averaging())


class Target(Net):
    """A copy of a part, in no optimizer; no cut touches the bias of its last layer, which is the output's."""

    def __init__(self):
        super().__init__()
        self.own = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.target = deepcopy(self.own)

    def forward(self, x):
        return super().forward(x) + self.own(x)

    def configure_optimizers(self):
        own = [p for name, p in self.named_parameters() if not name.startswith("target")]
        return torch.optim.SGD(own, lr=0.1)


def test_copies_that_would_not_follow_are_named_and_those_that_do_are_not():
    with pytest.warns(UserWarning, match=r"follow=\{'target\.\*': 'own\.\*'\}"):
        fitter(gradual(exclude=["target.*"]), epochs=1).fit(Target())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter(gradual(follow={"target.*": "own.*"}), epochs=3).fit(model := Target())
    assert not [w for w in caught if "look like copies" in str(w.message)]
    assert model.target[0].out_features == model.own[0].out_features == 4


@pytest.mark.parametrize("where", ["module", "elsewhere"])
def test_a_graph_that_is_kept_over_a_cut_is_named(where):
    kept = []

    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if where == "module":
                self.last = {"loss": loss}
            elif not kept:
                kept.append(loss)
            return loss

    model = Keeps()
    if where == "module":
        with pytest.warns(UserWarning, match="last keeps a graph of the network before the cut"):
            fitter(gradual(remove="each_round"), epochs=3).fit(model)
        assert widths(model) == (8, 8)
        return
    with pytest.raises(ValueError, match=r"stem\.weight.*: a graph of the network before the cut is kept"):
        fitter(gradual(remove="each_round"), epochs=3).fit(model)
    assert widths(model) == (16, 16)


# ------------------------------------------------------------------------------- speed, calibration


@pytest.mark.parametrize("remove", WAYS)
def test_a_target_on_the_speed_is_met_in_each_round(remove, monkeypatch):
    """What a clock says is replaced by what is computed."""

    def computed(works, at_least):
        models = {name: work.args[0].args[0] for name, work in works.items()}
        return {n: [float(m.stem.out_features * m.body.out_features)] * 5 for n, m in models.items()}

    monkeypatch.setattr(speed, "settled", computed)
    model = Net()
    schedule = lp.filters.Faster(lambda round: 2.0**round)
    fitter(gradual(schedule=schedule, remove=remove), epochs=3).fit(model)
    assert widths(model) == (8, 8)


@pytest.mark.parametrize("remove", WAYS)
def test_statistics_are_taken_anew_after_each_pruning(remove):
    model, seen = Net(dropout=0.0), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0 and pruner.round:
                x = torch.cat([x for x, _ in pl_module.train_dataloader()])
                wide = pl_module.stem(x).detach()
                seen.append(float((wide.mean(0) - pl_module.norm.running_mean).abs().max()))

    pruner = gradual(remove=remove, calibrate=3)
    fitter(pruner, Look(), epochs=3).fit(model)
    assert len(seen) == 2
    assert max(seen) < 1e-5


# ------------------------------------------------------------------------------- any module


class Batches(Net):
    """Of a network and a shape of batches."""

    def __init__(self, example=None):
        super().__init__()
        self.example_input_array = example

    def collate(self, batch):
        return batch

    def train_dataloader(self):
        data = super().train_dataloader()
        return DataLoader(data.dataset, 8, collate_fn=lambda samples: self.collate(default_collate(samples)))


class WithoutForward(Batches):
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(Net.forward(self, x), y)


class Dicts(Batches):
    """Batches with labels among the inputs."""

    def collate(self, batch):
        return {"x": batch[0], "labels": batch[1]}

    def training_step(self, batch):
        self.log("seen", 1.0)
        assert self.trainer.max_epochs
        return {"loss": nn.functional.cross_entropy(self(batch["x"]), batch["labels"])}


class OneDict(Dicts):
    def forward(self, batch):
        return super().forward(batch["x"])

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch), batch["labels"])


class Several(Batches):
    def collate(self, batch):
        return (batch[0], batch[0] * 2, batch[1])

    def forward(self, a, b):
        return super().forward(a + b)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])


class Detection(Batches):
    """A list of inputs, a list of targets, and losses in training only."""

    def collate(self, batch):
        return list(batch[0]), [{"label": y} for y in batch[1]]

    def forward(self, images, targets=None):
        out = super().forward(torch.stack(images))
        if targets is None:
            return [{"label": y.argmax()} for y in out]
        return {"loss": nn.functional.cross_entropy(out, torch.stack([t["label"] for t in targets]))}

    def training_step(self, batch):
        return self(*batch)["loss"]


@pytest.mark.parametrize("make", [WithoutForward, Dicts, OneDict, Several, Detection])
def test_any_module_is_traced_with_what_it_trains_on(make):
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "channels left as they are: .*head.weight")  # a loss has no outputs
        fitter(gradual(remove="each_round", calibrate=1), epochs=3, limit_val_batches=0).fit(model)
    assert (*widths(model), model.head.out_features) == (8, 8, 3)
    assert not {"log", "log_dict"} & vars(model).keys()


@pytest.mark.filterwarnings("ignore:channels left as they are. .*head.weight")
@pytest.mark.parametrize("make", [WithoutForward, Dicts])
def test_a_batch_for_the_training_step_may_be_given_as_the_example(make):
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    model = make()
    seen: set[int] = set()
    model.stem.register_forward_pre_hook(lambda module, args: seen.add(len(args[0])))  # on copies, too
    example = {"x": x, "labels": y} if make is Dicts else (x, y)
    target = lp.filters.Removed(lp.schedules.Linear(0.5, rounds=2), of="multiply_adds")
    pruner = gradual(remove="each_round", schedule=target, example_input=example)
    fitter(pruner, epochs=3, limit_val_batches=0).fit(model)
    assert {8, 20} <= seen
    assert max(widths(model)) < 16
    with pytest.raises(ValueError, match=r"as the input of forward.*nor with a batch through training_step"):
        fitter(gradual(example_input=(x[:, :3], y)), epochs=3).fit(make())


class Plain(Net):
    """Without batch normalization."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


@pytest.mark.parametrize(("option", "value"), [("calibrate", 2), ("slimming", 0.01)])
def test_what_needs_batch_normalization_is_said_to_have_no_effect_without_it(option, value):
    with pytest.warns(UserWarning, match=rf"{option}={value}: .* batch normalization .* Leave it out"):
        fitter(gradual(**{option: value}), epochs=3).fit(Plain())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitter(gradual(**{option: value}), epochs=3).fit(Net())
    assert not [w for w in caught if f"{option}=" in str(w.message)]


def test_what_cannot_be_traced_says_why_and_what_to_give():
    class Adversarial(Manual):
        def forward(self, x, noise):
            return super().forward(x + noise)

    with pytest.raises(ValueError, match=r"noise.*automatic_optimization=False.*Give it as example_input="):
        fitter(gradual(), epochs=2).fit(Adversarial())

    class Broken(Batches):
        def training_step(self, batch):
            return self(batch[0][:, :3]).sum()

        def forward(self, x):
            return super().forward(x[:, :3])

    with pytest.raises(ValueError, match=r"Broken is refused.*mat1 and mat2.*nor with a batch"):
        fitter(gradual(), epochs=2).fit(Broken())
