"""Every code block of the README runs, in order, on a small network."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp

README = (Path(__file__).parents[1] / "README.md").read_text()
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_the_code_blocks_run(capsys, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 7
    data = TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,)))
    loader, net = DataLoader(data, 8), Net()
    here = {
        "model": Net(),
        "train_loader": loader,
        "val_loader": loader,
        "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "batches": list(loader),
        "example_input": torch.randn(32, 8),
        "loss_function": nn.functional.cross_entropy,
    }
    original = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, **given: original(self, **QUIET, **given))
    for block in blocks:
        if "load_sparse" in block:
            here["model"] = Net()  # an earlier block has cut the other
        exec(block, here)
        if "exclude" in block:
            Trainer(max_epochs=3, callbacks=[here["pruner"]]).fit(Net(), loader, loader)
            assert set(here["pruner"].masks) == {"body.weight", "head.weight"}
        if "lp.hold" in block:
            assert all(
                (p == 0).sum() >= (~here["masks"][n]).sum()
                for n, p in net.named_parameters()
                if n in here["masks"]
            )
            assert int(sum(m.sum() for m in here["masks"].values())) == round(
                0.5 * (8 * 16 + 16 * 16 + 16 * 3)
            )
    assert "59% of the weights are exactly 0" in capsys.readouterr().out


def test_the_experiments_it_names_exist():
    conf = Path(__file__).parents[1] / "conf" / "experiment"
    table = re.search(r"\| experiment \|.*?\n\n", README, re.DOTALL)
    assert table
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table[0].split("\n") if line)))
    assert named == {p.stem for p in conf.glob("*.yaml")}


def test_every_method_has_a_row():
    rows = set(
        re.findall(
            r"^\| (?:criterion|schedule|allocation|granularity|rewind) \| `(\w+)", README, re.MULTILINE
        )
    )
    methods = set()
    for module in (lp.criteria, lp.schedules, lp.allocation, lp.granularity, lp.rewind):
        its = {
            n
            for n, o in vars(module).items()
            if callable(o) and getattr(o, "__module__", "") == module.__name__
        }
        methods |= {n for n in its if not n.startswith("_")}
    assert rows == methods - {"apportion", "alive_per_tensor", "Snapshot", "copied", "hamming"}
