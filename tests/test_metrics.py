"""Sparsity, compression ratio and mask overlap, as torchmetrics."""

import pytest
import torch
from torch import distributed, multiprocessing
from torchmetrics import MetricCollection

import lightning_prune as lp
from lightning_prune.masks import jaccard
from lightning_prune.metrics import CompressionRatio, MaskOverlap, Sparsity
from tests.networks import Net, fitter


def masks(*shapes, seed, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.rand(shape, generator=generator) < density for i, shape in enumerate(shapes)}


def pairs():
    """What four processes would see; of different sizes, so that a mean of means would be wrong."""
    for seed, n in enumerate((3, 50, 7, 400)):
        shapes = (n, 3), (n,)
        yield masks(*shapes, seed=seed, density=0.1 + seed / 5), masks(*shapes, seed=9 + seed)


def flat(some):
    return torch.cat([mask.flatten() for mask in some.values()])


def expected():
    """From one vector of all that was seen."""
    ours, theirs = (torch.cat([flat(pair[i]) for pair in pairs()]) for i in (0, 1))
    return {
        "Sparsity": 1 - ours.double().mean(),
        "CompressionRatio": 1 / ours.double().mean(),
        "MaskOverlap": (ours & theirs).sum() / (ours | theirs).sum(),
    }


def seen(some):
    collection = MetricCollection([Sparsity(), CompressionRatio()])
    overlap = MaskOverlap()
    for ours, theirs in some:
        collection.update(ours)
        overlap.update(ours, theirs)
    return {**collection.compute(), "MaskOverlap": overlap.compute()}


def check(values):
    assert set(values) == set(expected())
    for name, value in expected().items():
        assert values[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_metrics_add_up_over_updates():
    check(seen(pairs()))


def on_a_process(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(seen(list(pairs())[rank::2]), f"{folder}/{rank}")
    distributed.destroy_process_group()


def test_metrics_add_up_over_processes(tmp_path):
    multiprocessing.start_processes(on_a_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        check(torch.load(tmp_path / str(rank), weights_only=True))


def test_weights_are_taken_as_masks_are():
    model = Net()
    pruned = lp.prune(model, 0.75)
    weights = dict(lp.pruning.prunable(model))
    assert Sparsity()(pruned).item() == Sparsity()(weights).item() == 0.75
    assert CompressionRatio()(weights).item() == 4
    assert CompressionRatio()({n: p.bfloat16() for n, p in weights.items()}).item() == 4


def test_what_is_empty():
    none, some = {"w": torch.zeros(3, dtype=torch.bool)}, {"w": torch.ones(3, dtype=torch.bool)}
    assert CompressionRatio()(none).item() == float("inf")
    assert MaskOverlap()(none, none).item() == jaccard(none, none) == 1
    assert MaskOverlap()(none, some).item() == jaccard(none, some) == 0
    assert MaskOverlap()(some, some).item() == 1


def test_masks_of_different_weights_are_refused():
    ours = {"a": torch.ones(2, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"masks: a has the shape \(2, 2\) in one and \(4,\) in the other"):
        MaskOverlap().update(ours, {"a": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks: b has the shape None in one"):
        MaskOverlap().update(ours, {**ours, "b": torch.ones(1, dtype=torch.bool)})


def test_a_module_logs_its_metrics():
    class Logging(Net):
        def __init__(self):
            super().__init__()
            self.sparse = Sparsity()

        def on_validation_epoch_start(self):
            self.sparse.update(pruner.masks)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("masked", self.sparse)

    pruner = lp.IterativeMagnitudePruning(lp.schedules.OneShot(0.75), rounds=1)
    trainer = fitter(pruner, epochs=2)
    trainer.fit(Logging())
    assert trainer.callback_metrics["masked"].item() == 0.75
    assert "sparse" not in " ".join(Logging().state_dict())
