"""Every code block of README and documentation runs, in order, on a small network; every command exists."""

import fnmatch
import importlib.util
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.study import records
from lightning_prune.study.command import USAGE
from lightning_prune.study.run import run
from tests.test_house import MODULES

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "experiments/README.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
TEXTS = [*PAGES, "experiments/results/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
PRETRAINED = "docs/pretrained.md"  # its blocks need a language model
METHODS = (ROOT / "docs" / "methods.md").read_text()
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text()
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def blocks(page, language):
    """The code blocks of a page; one that is a file of the repository (`--8<--`) is run by its own test."""
    found = re.findall(rf"```{language}[^\n]*\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block for block in found if "--8<--" not in block]


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


@pytest.fixture
def names(monkeypatch):
    """What the blocks of a page take for granted, and a Trainer that says nothing."""
    data = TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,)))
    loader, net = DataLoader(data, 8), Net()
    original = Trainer.__init__

    def quiet(self, **given):
        keeps = any(isinstance(c, ModelCheckpoint) for c in given.get("callbacks", ()))
        original(self, **{**QUIET, "enable_checkpointing": keeps, **given})

    monkeypatch.setattr(Trainer, "__init__", quiet)
    return {
        "model": Net(),
        "train_loader": loader,
        "val_loader": loader,
        "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
        "batches": list(loader),
        "example_input": torch.randn(32, 8),
        "loss_function": nn.functional.cross_entropy,
        "lp": lp,
        "pruner": lp.IterativeMagnitudePruning(rounds=1),
        "Trainer": Trainer,
    }


class Tokens:
    """A tokenizer for networks of 64 tokens."""

    def __call__(self, text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 64 for c in text]]))


@pytest.fixture
def tiny(names, monkeypatch, tmp_path):
    """What a hub would give: a language model that is small, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name):
        return load(name) if Path(name).exists() else transformers.LlamaForCausalLM(config).eval()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokens())
    names["texts"] = ["the quick brown fox jumps over the lazy dog"] * 4
    return names


@pytest.mark.filterwarnings("ignore")  # what a reader would see, too
def test_the_page_of_pretrained_networks_keeps_zeros_throughout(tiny):
    for block in blocks(PRETRAINED, "python"):
        exec(block, tiny)
        network, masks = tiny["network"], tiny["masks"]
        assert len(masks) == 14
        assert sum(int((~m).sum()) for m in masks.values()) == sum(m.numel() for m in masks.values()) // 2
        assert all(not bool(network.get_parameter(n)[~m].any()) for n, m in masks.items())
        if "attach" in block:
            assert not any("parametrizations" in n for n in network.state_dict())
    small = tiny["small"]
    for name, mask in masks.items():
        weight = small.get_submodule(name.removesuffix(".weight")).weight()
        assert not bool(weight.dequantize()[~mask].any())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != PRETRAINED])
def test_the_code_blocks_run(page, names, capsys):
    code = blocks(page, "python")
    five_lines = "# 59%" in "".join(code)
    for block in code:
        block = re.sub(r"\b(max_epochs|every_n_train_steps)=100\b", r"\1=5", block)
        exec(block, names)
        if 'exclude=["*stem*"]' in block:
            Trainer(max_epochs=3, callbacks=[names["pruner"]]).fit(Net(), *[names["train_loader"]] * 2)
            assert set(names["pruner"].masks) == {"body.weight", "head.weight"}
        if "lp.hold" in block:
            net, masks = names["net"], names["masks"]
            assert all(not bool(p[~masks[n]].any()) for n, p in net.named_parameters() if n in masks)
            assert sum(int(m.sum()) for m in masks.values()) == round(0.5 * (8 * 16 + 16 * 16 + 16 * 3))
        if "grow=sampled" in block:
            grown = [row.metrics["grown"] for row in names["own"].history[1:]]
            alive = [int(mask.sum()) for mask in names["own"].masks.values()]
            assert grown == [sum(round(part * n) for n in alive) for part in (0.15, 0.075)]
        if "two_steps" in block:
            Trainer(max_epochs=3, callbacks=[names["pruner"]]).fit(Net(), *[names["train_loader"]] * 2)
            assert names["pruner"].sparsity == 0.75
    assert ("59% of the weights are exactly 0" in capsys.readouterr().out) == five_lines


def test_the_readme_takes_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130
    assert len(text.split()) <= 800


def test_what_one_adds_is_under_ten_lines():
    section = METHODS.split("## Adding your own")[1] + EXPERIMENTS.split("## Your own experiment")[1]
    code = re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL)
    assert len(code) == 3  # a criterion, a schedule, an experiment
    assert all(block.count("\n") < 10 for block in code)


def test_the_experiment_that_one_adds_runs(tmp_path):
    (block,) = blocks("experiments/README.md", "yaml")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(block)
    small = ["rounds=1", "steps_per_round=20", "evaluate_every=10", "progress=false", f"runs={tmp_path}/runs"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["experiment=mine", *small, f"hydra.searchpath=[file://{tmp_path}]"])
    lines = records.read(run(cfg) / "records.jsonl")[0]
    assert [line["sparsity"] for line in lines] == [0.0, pytest.approx(0.2)]
    assert yaml.safe_load(block)["name"] == "mine"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for line in "".join(blocks(page, "bash")).splitlines():
        command = line.split("#")[0].split()
        if command[0] == "make":
            assert command[1] in targets
        elif command[:2] == ["pip", "install"]:
            assert set(re.findall(r"\w+", command[2])) <= extras
        else:
            assert command[0] == "lightning-prune"
            assert f"\n  {command[1]} " in USAGE
            overrides = [word.split(",")[0] for word in command[2:] if "=" in word]
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                compose("config", overrides)


def test_the_command_for_n_m_makes_masks_grow_within_the_pattern():
    (line,) = (line for line in "".join(blocks("docs/growth.md", "bash")).splitlines() if "NM" in line)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", line.split()[2:])
    pruner = instantiate(cfg.pruner)
    assert isinstance(pruner, lp.DynamicSparseTraining)
    assert pruner.granularity == lp.granularity.NM(1, 4)


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_are_there(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)(#[^)]+)?\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            assert heading[1:] in headings(path), (target, heading)


def headings(path):
    """What links to the headings of a page say after #."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_the_experiments_it_names_exist():
    """By name, or several by a pattern such as `conv*_cifar10`."""
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    table = re.search(r"\| experiment \|.*?\n\n", EXPERIMENTS, re.DOTALL)
    assert table
    named = re.findall(r"`([\w*]+)`", "".join(line.split("|")[1] for line in table[0].split("\n") if line))
    assert not [name for name in named if not fnmatch.filter(experiments, name)]
    assert {e for name in named for e in fnmatch.filter(experiments, name)} == experiments


# Of the modules that hold the methods, what is none.
HELPERS = {
    *("apportion", "check", "evenly", "hamming", "input_squares", "largest_minimum", "outliers", "Snapshot"),
    *("may_empty", "units", "within_outputs"),
}


def test_every_method_has_a_place():
    table = re.search(r"\| axis \|.*?\n\n", METHODS, re.DOTALL)
    assert table
    rows = set(re.findall(r"`(\w+)`", table[0]))
    methods = set()
    for module in (lp.criteria, lp.schedules, lp.allocation, lp.granularity, lp.rewind, lp.metrics):
        own = {n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__}
        methods |= {n for n in own if callable(vars(module)[n]) and not n.startswith("_")}
    assert methods - HELPERS <= rows


@pytest.mark.filterwarnings("ignore")  # what a reader would see, too
@pytest.mark.parametrize("name", ["one_shot", "feed_forward"])
def test_the_tutorials_run(name, monkeypatch, tmp_path):
    for scale in ("EPOCHS", "STEPS"):
        monkeypatch.setenv(scale, "2")
    script = ROOT / "docs" / "tutorials" / f"{name}.py"
    runpy.run_path(str(script), run_name="__main__")
    pictures = set(re.findall(r"!\[.*?\]\((.+?)\)", script.read_text()))
    assert pictures == {path.name for path in tmp_path.glob("*.png")}
    for picture in pictures:
        assert (script.parent / picture).is_file(), f"run {script.name} where it lies"


def test_every_room_is_on_the_map_of_the_package():
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert rooms == set(re.findall(r"^- `(\w+)`:", lp.__doc__, re.MULTILINE))


def test_every_control_and_every_way_to_grow_has_a_place():
    kinds = {p.stem for p in (ROOT / "conf" / "kind").glob("*.yaml") if "after: ticket" in p.read_text()}
    assert kinds <= set(re.findall(r"`kind=(\w+)`", EXPERIMENTS))
    growth = {path.name for path in (ROOT / "conf" / "growth").glob("*.yaml")}
    assert growth - {"none.yaml"} <= set(
        re.findall(r"conf/growth/([\w.-]+)", (ROOT / "docs" / "growth.md").read_text())
    )


@pytest.fixture
def hooks():
    """The hooks of the documentation, as a module."""
    pytest.importorskip("mkdocstrings")
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_documentation_has_a_page_for_every_module(hooks):
    assert {"lightning_prune", "lightning_prune.masks", "lightning_prune.callbacks.pruning"} <= {
        *hooks.modules()
    }
    page = hooks.page("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n")
    assert page == "# Title\n\ntext\n\n\n```python\nx = 1\n```\n\n"
    text = hooks.methods()
    assert "[`snip`][lightning_prune.criteria.snip] | Connection sensitivity" in text
    assert "arXiv:1810.02340" in text
    assert "apportion" not in text


def test_every_page_of_the_documentation_is_in_the_navigation(hooks):
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    made = {f"tutorials/{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.py")}
    pages = {page.removeprefix("docs/") for page in PAGES if page != "README.md"} | made | {*hooks.OUTSIDE}
    assert set(re.findall(r"[\w/-]+\.md", nav)) == pages


def test_doctests_are_code_in_the_documentation(hooks):
    docstring = "One line.\n\n>>> f(1)\n2\n>>> f(2)\n3\n\nArgs:\n    a: more.\n"
    fenced = "One line.\n\n```pycon\n>>> f(1)\n2\n>>> f(2)\n3\n```\n\nArgs:\n    a: more.\n"
    assert hooks.fenced(docstring) == hooks.fenced(fenced) == fenced


def test_links_between_files_are_links_between_pages(hooks):
    assert hooks.linked("[a](../experiments/README.md#b)", "docs/trust.md") == "[a](experiments/README.md#b)"
    assert hooks.linked("[a](../docs/trust.md)", "experiments/README.md") == "[a](../trust.md)"
    assert hooks.linked("[a](tutorials/one_shot.py)", "docs/index.md") == "[a](tutorials/one_shot.md)"
    assert hooks.linked("[a](https://b.c) [d](#e)", "docs/index.md") == "[a](https://b.c) [d](#e)"
