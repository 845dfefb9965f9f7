"""What only a pruning would find after hours is found before the first step, and named."""

import dataclasses
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

import lightning_prune as lp
from lightning_prune import allocation
from lightning_prune.allocation import AtLeast, PerLayer, uniform
from lightning_prune.criteria import GraSP
from lightning_prune.granularity import NM, Block, Filter
from lightning_prune.schedules import Explicit, Geometric, OneShot, Threshold, TopK
from tests.naming import in_words
from tests.networks import Net, fitter, same


class Steps(Callback):
    """Counts the steps that were trained."""

    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, *_):
        self.steps += 1


def refused(message, model=None, **options):
    """Is refused before the first step, with everything as it was."""
    model, steps = model or Net(), Steps()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def start():
        pruner = lp.IterativeMagnitudePruning(**{"rounds": 2, **options})
        fitter(pruner, lp.LotteryTicketRewind(), steps, epochs=3).fit(model)

    with pytest.raises(ValueError, match=message):
        start()
    assert steps.steps == 0
    assert same({n: p.detach() for n, p in model.named_parameters()}, before)
    assert not any(p.grad is not None for p in model.parameters())


def wrong_shape(params):
    return {n: w.abs().sum(1) for n, w in params.items()}


def integers(params):
    return {n: w.abs().mul(100).long() for n, w in params.items()}


def not_all(params):
    return {n: w.abs() for n, w in list(params.items())[1:]}


def nan(params):
    return {n: w.abs() * float("nan") for n, w in params.items()}


def log_of_the_difference(params, initial):
    return {n: (w - initial[n]).abs().log() for n, w in params.items()}  # minus infinity at the start


def too_many(scores, total):
    return dict.fromkeys(scores, total)


def no_pair(scores):
    return scores


def half_a_mask(scores):
    return scores, lambda mask: mask[:1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"allocate": "global"},
            r"allocate='global': allowed are functions, such as those of lightning_prune\.allo",
        ),
        ({"criterion": "magnitude"}, "criterion='magnitude': allowed are functions"),
        ({"granularity": "filter"}, "granularity='filter': allowed are functions"),
        (
            {"granularity": Filter},
            r"granularity=Filter: a class is given; allowed are its instances\. Give Filter\(\)",
        ),
        ({"criterion": lp.criteria.Random}, r"criterion=Random: a class is given.*Give Random\(\)"),
        ({"allocate": PerLayer}, "allocate=PerLayer: a class is given"),
        ({"schedule": Geometric}, r"schedule=Geometric: a class is given; .* Give Geometric\(\)"),
        (
            {"allocate": PerLayer({"nope*": 0.5, "*": 0.5})},
            r"densities: the pattern 'nope\*' matches no weight",
        ),
        ({"allocate": PerLayer({"stem*": 0.5})}, r"densities: no pattern matches body\.weight"),
        ({"allocate": too_many}, "allocate: .*too_many.* gave"),
        (
            {"layers": ["Linear", "Conv2D"]},
            r"layers: 'Conv2D' is the class of no module of Net.*Did you mean 'Conv2d'",
        ),
        ({"layers": ["Liner"]}, r"Did you mean 'Linear'"),
        ({"layers": [nn.Linear]}, "layers: .* is given; allowed are class names"),
        (
            {"criterion": wrong_shape},
            r"criterion: .*wrong_shape.* must give floating point scores of stem\.weight",
        ),
        ({"criterion": integers}, "criterion: .*integers"),
        ({"criterion": not_all}, "criterion: .*not_all"),
        ({"criterion": nan}, r"the score of stem\.weight holds NaN or infinity"),
        ({"criterion": log_of_the_difference}, r"the score of stem\.weight holds NaN or infinity"),
        ({"granularity": no_pair}, "granularity: .*no_pair.* gave Tensor; a pair"),
        ({"granularity": half_a_mask}, "granularity: .*half_a_mask.* expands to"),
        (
            {"schedule": [0.0, 0.5].__getitem__},
            "schedule: .* has no sparsity for round 2, and each round needs one",
        ),
        ({"schedule": {0: 0.0}.__getitem__}, "has no sparsity for round 1"),
        ({"schedule": lambda round: None}, "schedule: None is given as a sparsity; allowed are numbers"),
        ({"schedule": lambda round: torch.zeros(2)}, "is given as a sparsity; allowed are numbers"),
        ({"schedule": lambda round: round / 2}, "gives sparsity 1.0 in round 2"),
    ],
    ids=in_words,
)
def test_a_wrong_argument_is_named_before_the_first_step(options, message):
    refused(message, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Filter(7), "dim=7: allowed are 0, outputs of the layer, and 1"),
        (lambda: Filter(n=0), "n=0"),
        (lambda: NM(4, 2), "n=4, m=2"),
        (lambda: Block(0, 4), "rows=0"),
        (lambda: AtLeast(-1), "n=-1"),
        (lambda: PerLayer({"*": 2}), r"densities\['\*'\]=2"),
        (lambda: GraSP(temperature=0), "temperature=0"),
    ],
)
def test_a_wrong_value_is_named_where_it_is_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.uint8], ids=in_words
)
def test_weights_of_a_type_that_cannot_be_trained_are_refused_by_name(dtype):
    model = Net()
    model.body.weight = nn.Parameter(model.body.weight.detach().to(dtype), requires_grad=False)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"body\.weight has the dtype {name}; allowed are float32"):
        fitter(lp.IterativeMagnitudePruning(), epochs=1).fit(model)
    with pytest.raises(ValueError, match=rf"body\.weight has the dtype {name}"):
        lp.prune(model)


# --- budgets that leave layers, or everything, empty ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": OneShot(0.997)},
            r"schedule: in round 1 it leaves layers empty.*\n?.*no weight is left",
        ),
        ({"schedule": Explicit([0, 0.5, 0.997])}, "schedule: in round 2 it leaves layers empty"),
        (
            {"schedule": OneShot(0.9999)},
            "schedule: in round 1 it leaves none of 400 weights, and one is needed",
        ),
        ({"schedule": Geometric(0.5), "rounds": 20}, "schedule: in round 20 it leaves none of 400 weights"),
        (
            {"schedule": {"head*": OneShot(0.99), "*": OneShot(0.5)}},
            r"schedule: .*head\.weight: no weight is left",
        ),
        ({"schedule": OneShot(0.95), "granularity": Filter()}, "schedule: in round 1 it leaves layers empty"),
        ({"schedule": OneShot(0.997), "allocate": uniform}, "schedule: in round 1 it leaves layers empty"),
    ],
    ids=in_words,
)
@pytest.mark.filterwarnings("ignore:granularity")
def test_a_budget_below_one_weight_a_layer_is_refused_before_the_first_step(options, message):
    refused(f"(?s){message}", **options)


def test_layers_may_go_where_that_is_asked_for():
    pruner = lp.IterativeMagnitudePruning(OneShot(0.997), rounds=1, allocate=AtLeast(0))
    fitter(pruner, epochs=2).fit(Net())
    assert sum(int(m.any()) for m in pruner.masks.values()) == 1


def test_a_minimum_that_does_not_fit_is_said_before_the_first_step():
    class First(Callback):
        def on_train_start(self, *_):
            raise KeyError

    pruner = lp.IterativeMagnitudePruning(OneShot(0.985), rounds=1, allocate=AtLeast(10))
    said = pytest.warns(UserWarning, match="6 survivors are fewer than 10 in each .* the minimum is 2 here")
    with said, pytest.raises(KeyError):
        fitter(pruner, First(), epochs=2).fit(Net())


@pytest.mark.filterwarnings("ignore:allocate")
def test_the_largest_minimum_that_fits_holds_in_a_fit():
    pruner = lp.IterativeMagnitudePruning(OneShot(0.985), rounds=1, allocate=AtLeast(10))
    fitter(pruner, epochs=2).fit(Net())
    assert [int(m.sum()) for m in pruner.masks.values()] == [2, 2, 2]


@pytest.mark.parametrize("schedule", [TopK(150), Threshold(1e9)], ids=in_words)
def test_a_schedule_that_reads_scores_ends_the_fit_where_it_would_leave_nothing(schedule):
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=9)
    fitter(pruner, epochs=10).fit(Net())
    assert pruner.round < 3
    assert pruner.sparsity < 1


# --- criteria that run the model: tried on one batch ---


class Attentive(Net):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        hidden = torch.relu(self.stem(x))[:, None]
        return self.head(self.attention(hidden, hidden, hidden)[0][:, 0] + self.body(hidden[:, 0]))


class Uncalled(Net):
    """The loss takes a way past `forward`."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(Net.forward(self, batch[0]), batch[1])


class NoLoss(Net):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def needs_more(params, batches):
    if not batches[0][0].shape[1] == 7:
        raise ValueError("inputs: 7 are needed. Give 7.")
    return params


@pytest.mark.parametrize(
    ("criterion", "model", "message"),
    [
        (GraSP(logits="nope"), Net, "logits='nope': there is no such submodule; allowed are"),
        (GraSP(logits="norm.no"), Net, "logits='norm.no': there is no such submodule; allowed are"),
        (GraSP(), Uncalled, r"logits='': the loss does not call this module"),
        (lp.criteria.wanda, Attentive, r"the layers of .*attention\.in_proj_weight.* are not called"),
        (lp.criteria.taylor, NoLoss, "training_step of NoLoss gave None as loss"),
        (needs_more, Net, "7 are needed"),
        (lambda params, grads: {n: g * float("nan") for n, g in grads.items()}, Net, "NaN or infinity"),
        (lambda params, grads: {n: g[:1] for n, g in grads.items()}, Net, "must give floating point scores"),
    ],
    ids=["logits", "logits of a module", "no logits", "wanda", "no loss", "inputs", "nan", "shape"],
)
def test_a_criterion_that_runs_the_model_is_tried_before_the_first_step(criterion, model, message):
    refused(message, model(), criterion=criterion)


@pytest.mark.parametrize("criterion", [lp.criteria.taylor, lp.criteria.snip, lp.criteria.wanda], ids=in_words)
def test_trying_a_criterion_disturbs_nothing(criterion):
    """A fit that prunes once trains its dense round to the same bits as one that prunes by magnitude."""

    class Look(Callback):
        def on_train_epoch_end(self, trainer, model):
            if not seen or len(seen) % 2 == 0:
                seen.append({n: v.clone() for n, v in model.state_dict().items()})
                seen.append(torch.get_rng_state())

    ends = []
    for one in (lp.criteria.magnitude, criterion):
        torch.manual_seed(0)
        seen = []
        pruner = lp.IterativeMagnitudePruning(OneShot(0.5), rounds=1, criterion=one)
        fitter(pruner, Look(), epochs=2).fit(Net())
        ends.append(seen[:2])
    assert same(*ends)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(OneShot(0.5), [1, 3]), (Explicit([0.5]), [3]), (Explicit([0.5, 0.6]), [3, 3])],
    ids=in_words,
)
def test_a_criterion_is_tried_on_one_batch_and_not_where_it_prunes_at_once(schedule, expected):
    seen = []

    def counting(params, batches):
        seen.append(len(batches))
        return {n: w.abs() for n, w in params.items()}

    rounds = 0 if expected == [3] else 1
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=rounds, criterion=counting, score_batches=3)
    fitter(pruner, epochs=2).fit(Net())
    assert seen == expected


# --- one's own functions ---


def test_two_callbacks_may_be_told_apart_by_their_layers(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3, padding=1)

        def forward(self, x):
            return super().forward(self.conv(x[:, None]).mean(1))

    both = lambda: [  # noqa: E731
        lp.IterativeMagnitudePruning(OneShot(0.5), rounds=1, layers=["Linear"]),
        lp.IterativeMagnitudePruning(OneShot(0.25), rounds=1, layers=["Conv1d"]),
    ]
    first = both()
    trainer = fitter(*first, epochs=2)
    trainer.fit(Two())
    assert [pruner.sparsity for pruner in first] == [0.5, 0.25]
    assert len({pruner.state_key for pruner in first}) == 2
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = both()
    fitter(*reversed(again), epochs=3).fit(Two(), ckpt_path=tmp_path / "x.ckpt")
    assert all(same(a.masks, b.masks) for a, b in zip(first, again, strict=True))


TABLE = [0.0, 0.3, 0.6]


@pytest.mark.parametrize(
    "schedule",
    [
        TABLE.__getitem__,
        tuple(TABLE).__getitem__,
        dict(enumerate(TABLE)).__getitem__,
        torch.tensor(TABLE, dtype=torch.float64).__getitem__,
        lambda round: torch.tensor(TABLE[round], dtype=torch.float64),
        lambda round, scores: torch.tensor(TABLE[round], dtype=torch.float64),
        Explicit(TABLE),
    ],
    ids=["list", "tuple", "dict", "tensor", "tensors", "tensors of scores", "Explicit"],
)
def test_a_table_or_a_schedule_of_tensors_is_a_schedule(schedule):
    pruner = lp.IterativeMagnitudePruning(schedule, rounds=2)
    fitter(pruner, epochs=3).fit(Net())
    assert [row.alive for row in pruner.history] == [400, 280, 160]
    assert all(type(row.sparsity) is float for row in pruner.history)


@dataclasses.dataclass
class Stateful:
    """A criterion of one's own, which notes what it saw."""

    seen: list = dataclasses.field(default_factory=list)

    def __call__(self, params):
        self.seen.append({n: w.clone() for n, w in params.items()})
        return {n: w.abs() for n, w in params.items()}


def test_a_dry_run_does_not_change_the_weights_that_a_criterion_gets_to_see():
    criterion = Stateful()
    model = Net()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    fitter(lp.IterativeMagnitudePruning(OneShot(0.5), rounds=1, criterion=criterion), epochs=2).fit(model)
    assert same(criterion.seen[0], start)


def asks_for_what_nobody_has(params, curvature):
    return {name: p.abs() for name, p in params.items()}


def returns_nothing(params):
    pass


def changes_weights(params):
    for p in params.values():
        p.mul_(0.5)
    return {name: p.abs() for name, p in params.items()}


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (asks_for_what_nobody_has, "asks for `curvature`, which nobody has; allowed are"),
        (returns_nothing, "must give floating point scores of 0.weight's shape"),
        (changes_weights, "changed 0.weight in place; allowed is to read weights"),
    ],
)
def test_a_criterion_that_is_none_is_refused_with_its_reason(criterion, message):
    with pytest.raises(ValueError, match=message):
        lp.prune(torch.nn.Sequential(torch.nn.Linear(4, 4)), criterion=criterion)


def test_a_weight_whose_elements_share_memory_is_refused_by_name():
    layer = torch.nn.Linear(4, 4)
    layer.weight = torch.nn.Parameter(torch.ones(1, 4).expand(4, 4))
    with pytest.raises(ValueError, match=r"0\.weight shares its memory between its own elements"):
        lp.prune(torch.nn.Sequential(layer))


@pytest.mark.parametrize("path", ["", 3, True], ids=repr)
def test_a_path_that_is_none_is_refused_before_training(path, tmp_path):
    with pytest.raises(ValueError, match=r"save_sparse=.*: allowed are paths of files"):
        lp.IterativeMagnitudePruning(save_sparse=path)
    with pytest.raises(ValueError, match="that is a folder; allowed are paths of files"):
        lp.IterativeMagnitudePruning(save_sparse=tmp_path)
    lp.IterativeMagnitudePruning(save_sparse="tests")  # it will lie beside the checkpoints
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, and a folder is needed"):
        lp.IterativeMagnitudePruning(save_sparse=tmp_path / "file" / "net.safetensors")


def test_a_relative_path_is_looked_at_where_the_file_will_lie_before_training(tmp_path):
    (tmp_path / "net").mkdir()
    pruner, model = lp.IterativeMagnitudePruning(rounds=1, save_sparse="net"), Net()
    with pytest.raises(ValueError, match=r"save_sparse=.*that is a folder"):
        fitter(pruner, epochs=2, default_root_dir=tmp_path).fit(model)
    assert pruner.masks == {}


# ---------------------------------------------------------------------------------- channels, growth, rewinds


def never_trained(message, *make):
    """What these make is refused, when it is made or before the first step."""
    steps = Steps()
    with pytest.raises(ValueError, match=message):
        fitter(*(one() for one in make), steps, epochs=2).fit(Net())
    assert steps.steps == 0


@pytest.mark.parametrize("remove", ["end", "each_round"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude"}, "criterion='magnitude': allowed are functions"),
        ({"allocate": "uniform"}, "allocate='uniform': allowed are functions"),
        ({"criterion": lp.filters.RandomChannels}, r"Give RandomChannels\(\)"),
        ({"allocate": allocation.per_output}, "per_output and EvenOutputs share out"),
        ({"criterion": lp.criteria.SparseGPT()}, "criterion: SparseGPT"),
        ({"allocate": lambda scores, total: {}}, r"allocate: .* gave \{\}; allowed are dicts of how many"),
        (
            {"allocate": AtLeast(2, of=lambda scores, total: None)},
            "allocate: .* gave None; allowed are dicts",
        ),
        (
            {"schedule": lp.filters.Removed(0.99)},
            "schedule: 0.99 of the parameters is to be removed in round 1",
        ),
        ({"schedule": lp.filters.Smaller(10)}, "bytes: 10 are wanted in round 1"),
        ({"schedule": lambda: 0.5}, r"schedule: its signature is \(\), and it is called with 1"),
    ],
    ids=in_words,
)
def test_wrong_arguments_of_channels_are_named_before_the_first_step(options, message, remove):
    never_trained(message, lambda: lp.StructuredChannelPruning(remove=remove, **options))


@pytest.mark.parametrize("remove", ["end", "each_round"])
def test_a_criterion_of_channels_that_runs_the_model_is_tried_before_the_first_step(remove):
    def broken(params, model, batches):
        raise ValueError("criterion: broken")

    never_trained("criterion: broken", partial(lp.StructuredChannelPruning, criterion=broken, remove=remove))


@pytest.mark.parametrize("sparsity", [0.9999, lp.schedules.Cubic(0.9999, rounds=1)], ids=in_words)
@pytest.mark.parametrize("allocate", [allocation.erk, allocation.global_rank], ids=in_words)
def test_growth_that_leaves_a_layer_without_a_weight_is_refused(sparsity, allocate):
    grows = partial(lp.DynamicSparseTraining, sparsity, allocate=allocate, every_n_train_steps=2)
    never_trained(r"sparsity=.*: it leaves \d+ of \d+ weights alive in \d+ layers", grows)
    if not callable(sparsity):
        fitter(grows(allocate=allocation.AtLeast(0, of=allocate)), epochs=2).fit(Net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": lp.schedules.TopK(5)}, "sparsity: TopK.* reads the scores; allowed are numbers"),
        ({"sparsity": lambda: 0.5}, r"sparsity: its signature is \(\)"),
        ({"sparsity": lambda update: None}, "sparsity: None is given as a sparsity; allowed are numbers"),
        ({"fraction": lambda progress: None}, r"fraction\(0\.000\)=None: allowed are fractions"),
        ({"fraction": lambda: 0.3}, r"fraction: its signature is \(\)"),
        ({"every_n_train_steps": 1, "until_step": 1}, "Allowed are none in a time as short"),
        ({"layers": None}, "layers=None: allowed are class names in a list"),
        ({"include": [1]}, "include: 1 is given; allowed are patterns"),
    ],
    ids=in_words,
)
def test_wrong_arguments_of_growth_are_named_before_the_first_step(options, message):
    never_trained(message, lambda: lp.DynamicSparseTraining(**{"every_n_train_steps": 2, **options}))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: 0, r"policy: its signature is \(\), and it is called with 1 positional argument"),
        (lambda early, start: early, "policy asks for `start`, which nobody has"),
        (lp.rewind.EarlyBird, "policy=EarlyBird: a class is given"),
        (None, "policy=None: allowed are functions, such as those of lightning_prune.rewind"),
    ],
    ids=in_words,
)
def test_a_policy_that_cannot_be_called_is_named_before_the_first_step(policy, message):
    never_trained(message, lp.IterativeMagnitudePruning, partial(lp.LotteryTicketRewind, policy=policy))
