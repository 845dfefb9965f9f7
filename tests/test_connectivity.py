"""Linear mode connectivity: the path against a slow oracle, and the experiment from end to end."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn.functional import batch_norm

from lightning_prune.study.connectivity import barrier, interpolated, path
from lightning_prune.study.records import read
from lightning_prune.study.report import report
from lightning_prune.study.run import run
from tests.networks import same
from tests.test_experiments import ROOT


def make(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    net.train()(torch.randn(40, 6))  # statistics of its own
    return {n: t.clone() for n, t in net.state_dict().items()}


def data(n=50, seed=9):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return [(x[:30], (x[:30, 0] > 0).long()), (x[30:], (x[30:, 0] > 0).long())]


def error_at(a, b, alpha, batches):
    """By hand: no module, no state dict."""
    mix = {n: (1 - alpha) * a[n] + alpha * b[n] for n in a if a[n].is_floating_point()}
    wrong = n = 0
    for x, y in batches:
        h = x @ mix["0.weight"].T + mix["0.bias"]
        h = (h - mix["1.running_mean"]) / (mix["1.running_var"] + 1e-5).sqrt() * mix["1.weight"] + mix[
            "1.bias"
        ]
        logits = h.clamp(min=0) @ mix["3.weight"].T + mix["3.bias"]
        wrong += int((logits.argmax(1) != y).sum())
        n += len(y)
    return wrong / n


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def test_the_path_is_what_a_computation_by_hand_gives():
    a, b, batches = make(1), make(2), data()
    found = path(net(), a, b, {"train": batches, "test": batches[:1]}, points=7)
    assert found["alpha"] == [i / 6 for i in range(7)]
    for name, split in (("train", batches), ("test", batches[:1])):
        expected = [error_at(a, b, alpha, split) for alpha in found["alpha"]]
        assert found[f"{name}_error"] == pytest.approx(expected, abs=1e-9)
    assert len(set(found["train_error"])) > 1
    with pytest.raises(ValueError, match="points=1"):
        path(net(), a, b, {}, points=1)


def test_the_ends_are_the_networks_themselves_and_batches_seen_are_counted_of_the_first():
    a, b = make(1), make(2)
    b["1.num_batches_tracked"] += 5
    assert same(interpolated(a, b, 0.0), a)
    assert same(interpolated(a, b, 1.0), {**b, "1.num_batches_tracked": a["1.num_batches_tracked"]})


def test_a_network_and_itself_have_no_barrier_and_its_permuted_twin_has_one():
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(400, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
    a, order = trained.state_dict(), torch.randperm(16)
    a = {n: t.clone() for n, t in a.items()}
    twin = {"0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order]}
    twin |= {"2.weight": a["2.weight"][:, order], "2.bias": a["2.bias"]}
    assert barrier(path(trained, a, a, {"test": [(x, y)]}, 5)["test_error"]) == 0
    errors = path(trained, a, twin, {"test": [(x, y)]}, 9)["test_error"]
    assert errors[0] == errors[-1] < 0.1
    assert barrier(errors) > 0.15


def test_statistics_of_batch_normalization_are_estimated_anew_only_when_asked():
    a, b, batches = make(1), make(2), data()
    network = net()
    path(network, a, b, {}, points=3)
    assert torch.equal(network[1].running_mean, b["1.running_mean"])
    path(network, a, b, {"train": batches}, points=3, reestimate=batches)
    hidden = torch.cat([x for x, _ in batches]) @ b["0.weight"].T + b["0.bias"]
    mean = (hidden[:30].mean(0) + hidden[30:].mean(0)) / 2  # the mean over batches
    assert torch.allclose(network[1].running_mean, mean, atol=1e-6)
    again = batch_norm(hidden, network[1].running_mean, network[1].running_var)
    assert again.mean().abs() < 0.1


def test_the_barrier_is_counted_from_the_mean_of_the_ends():
    assert barrier([0.1, 0.2, 0.15]) == pytest.approx(0.075)
    assert barrier([0.1, 0.0, 0.1]) == 0


@pytest.mark.parametrize("to_step", [0, 5])
def test_two_copies_are_trained_from_the_rewound_state_and_reported(to_step, tmp_path):
    small = ["rounds=2", "steps_per_round=20", "evaluate_every=10", "progress=false", f"runs={tmp_path}"]
    small += ["rewind=step", f"rewind.to_step={to_step}", "rewind.shorten=true"]

    def config(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", [*overrides, *small])

    run(config("experiment=mnist1d"))
    module = "lightning_prune.study.connectivity"
    lmc = ["name=lmc", f"ticket={tmp_path}/mnist1d/ticket-1", f"run._target_={module}.train"]
    lmc += [
        "+run.points=5",
        "controls_at=[0,2]",
        f"figures=[{{_target_: {module}.Paths}}]",
    ]
    folder = run(config("experiment=mnist1d", *lmc))
    found = read(folder / "records.jsonl")[0]
    assert [(r["round"], r["alive"]) for r in found] == [(0, 50_000), (2, 24_965)]
    for r in found:
        test = r["path"]["test_error"]
        assert r["path"]["alpha"] == [0, 0.25, 0.5, 0.75, 1]
        assert r["metrics"]["test_error"] == pytest.approx((test[0] + test[-1]) / 2, abs=1e-6)
        assert r["metrics"]["test_barrier"] == pytest.approx(barrier(test), abs=1e-6)
        assert r["metrics"]["stable"] == (r["metrics"]["test_barrier"] < 0.02)
        assert isinstance(r["metrics"]["matching"], bool)
        ends = [(r["path"]["train_error"][i], test[i]) for i in (0, -1)]
        assert ends[0] != ends[1]  # trained in other data orders
    report(folder.parent, out=tmp_path / "out")
    assert (tmp_path / "out" / "paths.png").read_bytes()[:4] == b"\x89PNG"
