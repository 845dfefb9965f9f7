"""What was cut, or is to be, loads into the full-size model from every file that it may be in."""

import enum
import os
import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from safetensors.torch import save_file
from torch import nn

import lightning_prune as lp
from lightning_prune import load_pruned
from lightning_prune.structured import cut_of
from lightning_prune.structured.surgery import cut
from tests import networks
from tests.networks import fitter, same
from tests.test_channels import IMAGE
from tests.test_surgery import Net, trained


@pytest.fixture(scope="module")
def small():
    model, _, couplings, masks = trained()
    cut(model, cut_of(couplings, masks))
    return model.eval()


class Task(nn.Module):
    """A network as a part of something else."""

    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net, nn.Linear(2, 2)


def test_what_is_loaded_is_bit_exact_and_has_the_sizes(small, tmp_path):
    torch.save({"state_dict": small.state_dict()}, tmp_path / "a.ckpt")
    torch.save(small.state_dict(), tmp_path / "b.pt")
    lp.save_sparse(small.state_dict(), tmp_path / "c.safetensors")
    for name in ("a.ckpt", "b.pt", "c.safetensors"):
        fresh = load_pruned(Net(), tmp_path / name)
        assert same(dict(fresh.state_dict()), dict(small.state_dict()))
        assert str(fresh) == str(small)
        x = torch.randn(IMAGE)
        assert torch.equal(fresh.eval()(x), small(x))


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_every_checkpoint_of_a_fit_loads_as_the_network_that_was_validated(remove, tmp_path):
    schedule = lp.schedules.Linear(sparsity=0.5, rounds=2)
    pruner = lp.StructuredChannelPruning(
        schedule, rounds=2, remove=remove, save_sparse=str(tmp_path / "last.sparse")
    )
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model, x = networks.Net(), torch.randn(9, 6)
    trainer = fitter(saver, pruner, epochs=3, enable_checkpointing=True)
    trainer.fit(model)
    for epoch, width in enumerate((16, 12, 8)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        loaded = load_pruned(networks.Net(), path).eval()
        assert (loaded.stem.out_features, loaded.body.out_features) == (width, width)
        if remove == "end":  # the file holds the full-size network, with zeros
            (masked := networks.Net()).load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            torch.testing.assert_close(loaded(x), masked.eval()(x), rtol=1e-5, atol=1e-6)
    last = load_pruned(networks.Net(), tmp_path / "last.sparse")
    assert same(dict(last.state_dict()), dict(model.state_dict()))
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    trainer.save_checkpoint(tmp_path / "end.ckpt")  # after the cut
    end = load_pruned(networks.Net(), tmp_path / "end.ckpt")
    assert same(dict(end.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("remove", ["end", "each_round"])
@pytest.mark.parametrize("averages", [lambda: WeightAveraging(), lambda: StochasticWeightAveraging(0.1)])
def test_averages_load_into_the_network_in_hand_after_the_cut(averages, remove, tmp_path):
    pruner = lp.StructuredChannelPruning(lp.schedules.Linear(0.5, rounds=2), rounds=2, remove=remove)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    model = networks.Net()
    trainer = fitter(pruner, averages(), saver, epochs=3, enable_checkpointing=True)
    trainer.fit(model)
    for epoch, width in enumerate((16, 12, 8)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        # Our own file: the SWALR of torch 2.6 keeps a function in it, which weights_only refuses.
        wants = fitter().validate(load_pruned(networks.Net(), path, weights_only=False), verbose=False)
        for own in (model, networks.Net()):
            (got,) = trainer.validate(own, ckpt_path=path, verbose=False, weights_only=False)
            assert got == pytest.approx(wants[0], rel=1e-5)
        assert own.stem.out_features == (16 if remove == "end" else width)


class Twice(networks.Net):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.again = self.body


def test_a_layer_of_two_names_is_cut_under_both(tmp_path):
    pruner = lp.StructuredChannelPruning(lp.schedules.OneShot(0.5), rounds=1)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fitter(saver, pruner, epochs=2, enable_checkpointing=True).fit(model := Twice())
    loaded = load_pruned(Twice(), tmp_path / "epoch=1.ckpt").eval()
    assert loaded.again is loaded.body
    assert loaded.body.out_features == 8
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


PREFIXES = ("net.", "model.", "module.", "_orig_mod.", "net._orig_mod.", "net.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_the_file_is_found(prefix, small, tmp_path):
    state = {prefix + name: t for name, t in small.state_dict().items()}
    beside = {"loss.weight": torch.ones(2)} if prefix != "_orig_mod." else {}
    torch.save({"state_dict": {**state, **beside}}, tmp_path / "a.ckpt")
    assert same(dict(load_pruned(Net(), tmp_path / "a.ckpt").state_dict()), dict(small.state_dict()))


def test_a_prefix_in_the_model_is_found(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "a.pt")
    for model in (
        nn.Sequential(OrderedDict(net=Net())),
        torch.compile(Net(), backend="eager"),
        nn.Sequential(OrderedDict(net=torch.compile(Net(), backend="eager"))),
    ):
        loaded = load_pruned(model, tmp_path / "a.pt")
        assert same(list(loaded.state_dict().values()), list(small.state_dict().values()))


def test_several_prefixes_are_named(small, tmp_path):
    state = {
        f"{prefix}.{name}": t for prefix in ("net", "ema.module") for name, t in small.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"Net are there under several prefixes, 'net.', 'ema.module.'"):
        load_pruned(Net(), tmp_path / "a.pt")


def test_another_model_is_refused_and_nothing_is_changed(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"depthwise.0.0.weight is only in the file, as are \d+ other names"):
        load_pruned(nn.Sequential(OrderedDict(embed=nn.Embedding(2, 2))), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"of Linear are there under several prefixes, 'gate.0.', "):
        load_pruned(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"The first in the file is scale, in the model net.scale"):
        load_pruned(Task(Net()), tmp_path / "b.pt")
    other = Net()
    other.head = nn.Linear(2, 5)
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"head.weight is .* in the checkpoint"):
        load_pruned(other, tmp_path / "b.pt")
    assert same(dict(other.state_dict()), dict(before))


class Fitting(networks.Net):
    """A module that takes the shapes of what is loaded into it."""

    def on_load_checkpoint(self, checkpoint):
        load_pruned(self, checkpoint["state_dict"])


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # of what a checkpoint holds for no callback
@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_a_module_with_the_hook_loads_by_its_class_by_any_trainer_and_resumes(remove, tmp_path):
    def pruner():
        return lp.StructuredChannelPruning(lp.schedules.Linear(0.5, rounds=2), rounds=2, remove=remove)

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = fitter(saver, pruner(), epochs=3, enable_checkpointing=True)
    trainer.fit(model := Fitting())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Fitting.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.stem.out_features == 8
    for path in ("end.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"):
        (want,) = fitter().validate(load_pruned(networks.Net(), tmp_path / path), verbose=False)
        (got,) = fitter().validate(Fitting(), ckpt_path=tmp_path / path, weights_only=True, verbose=False)
        assert got == pytest.approx(want, rel=1e-5)
    again = Fitting()
    fitter(pruner(), epochs=3).fit(again, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_what_is_loaded_already_is_taken_and_what_is_wrong_with_it_is_said(small):
    for given in ({"state_dict": small.state_dict()}, small.state_dict()):
        assert same(dict(load_pruned(Net(), given).state_dict()), dict(small.state_dict()))
    with pytest.raises(ValueError, match=r"path, a dict: there are no weights in it, only epoch;"):
        load_pruned(Net(), {"epoch": 3})
    with pytest.raises(ValueError, match=r"path, a dict: .* is only in the model"):
        load_pruned(Net(), {"head.weight": torch.ones(1)})


class Tied(nn.Module):
    """Words go in and come out by one table."""

    def __init__(self):
        super().__init__()
        self.words, self.wide, self.narrow = nn.Embedding(20, 6), nn.Linear(6, 16), nn.Linear(16, 6)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.narrow(torch.relu(self.wide(self.words(x)))))


def test_a_safetensors_file_of_others_loads_with_one_name_of_what_is_tied(tmp_path):
    words, model = torch.arange(10).view(2, 5), Tied()
    lp.prune_channels(model, 0.5, words, include=["wide.weight"])
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "out.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_pruned(Tied(), tmp_path / "model.safetensors")
    assert loaded.out.weight is loaded.words.weight
    assert loaded.wide.out_features == 8
    assert torch.equal(loaded(words), model(words))


class Kind(enum.Enum):
    GOOD = "good"


@pytest.mark.parametrize("value", [Kind.GOOD, Path("data")])
def test_objects_among_the_hyper_parameters_need_weights_only_false(value, small, tmp_path):
    stored = {"state_dict": small.state_dict(), "hyper_parameters": {"value": value}}
    torch.save(stored, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"you trust it, load it with weights_only=False"):
        load_pruned(Net(), tmp_path / "a.ckpt")
    loaded = load_pruned(Net(), tmp_path / "a.ckpt", weights_only=False)
    assert same(dict(loaded.state_dict()), dict(small.state_dict()))


def test_files_without_weights_are_refused_by_name(small, tmp_path):
    (tmp_path / "text").write_text("no checkpoint at all")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": small.state_dict()}, tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    torch.save({"model_state": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "other")
    torch.save(torch.ones(3), tmp_path / "tensor")
    torch.save(nn.Linear(2, 2), tmp_path / "module")
    for name, message in {
        "text": "weights_only=False|cannot be read",
        "empty": "cannot be read",
        "half": "cannot be read",
        "other": r"there are no weights in it, only model_state, epoch",
        "tensor": r"it holds a Tensor; allowed is a Lightning checkpoint",
        "module": r"load it with weights_only=False",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_pruned(Net(), tmp_path / name)
    with pytest.raises(ValueError, match=r"it holds a Linear; allowed is"):
        load_pruned(Net(), tmp_path / "module", weights_only=False)
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_pruned(Net(), tmp_path / "text", weights_only=False)
    for name in ("missing", "folder"):
        with pytest.raises(FileNotFoundError, match=rf"{name}': there is no such file"):
            load_pruned(Net(), tmp_path / name)


def test_load_pruned_does_not_need_torch_pruning(small, tmp_path):
    torch.save({"fresh": Net().state_dict(), "cut": small.state_dict()}, tmp_path / "state.pt")
    torch.save({"state_dict": small.state_dict()}, tmp_path / "small.ckpt")
    code = """
import sys
sys.modules["torch_pruning"] = None  # importing it fails
import torch
from tests.test_loading import Net, load_pruned, same
stored = torch.load("state.pt", weights_only=True)
(model := Net()).load_state_dict(stored["fresh"])
assert same(dict(load_pruned(model, "small.ckpt").state_dict()), dict(stored["cut"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=600)
