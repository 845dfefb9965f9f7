"""Frozen networks and copies: not pruned unless included, masked as their originals where asked, and said."""

import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lightning_prune as lp
from lightning_prune.callbacks.following import following, look_like_copies
from lightning_prune.masks import alive
from lightning_prune.schedules import Geometric
from tests.naming import in_words
from tests.networks import Net, dead_are_zero, fitter, same, sgd


def pruning(**options):
    return lp.IterativeMagnitudePruning(Geometric(0.3), **{"rounds": 2, **options})


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


class Student(Net):
    """A student, and a copy of it that is never trained by an optimizer: teacher, EMA or target."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = net(), kind
        if kind == "averaged":
            self.copy = AveragedModel(self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        else:
            self.copy = deepcopy(self.net)
        if kind == "frozen":
            self.copy.requires_grad_(False)
        del self.stem, self.norm, self.drop, self.body, self.head

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        params = self.parameters() if self.kind == "frozen" else self.net.parameters()
        return sgd(params)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        if self.kind == "averaged":
            self.copy.update_parameters(self.net)
        if self.kind == "ema":
            for mine, theirs in zip(self.copy.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
        if self.kind == "target" and self.trainer.global_step % 2 == 0:
            self.copy.load_state_dict(self.net.state_dict())


KINDS = ["frozen", "ema", "target", "averaged"]
PATTERN = {"averaged": "copy.module.*"}
NETS = ["net.0.weight", "net.2.weight"]


def said(fit):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [text for w in caught if "no optimizer trains them" in (text := str(w.message))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_no_optimizer_trains_is_not_pruned_and_that_is_said_once(kind):
    pruner, model = pruning(), Student(kind)
    (text,) = said(lambda: fitter(pruner, epochs=3).fit(model))
    assert list(pruner.masks) == NETS
    assert alive(pruner.masks) == round(0.49 * 108)
    pattern = PATTERN.get(kind, "copy.*")
    assert text.startswith(
        f"{pattern[:-1]}0.weight, {pattern[:-1]}2.weight: no optimizer trains them, so they stay"
    )
    assert f"follow={{'{pattern}': 'net.*'}}" in text
    assert said(lambda: fitter(pruner, epochs=1).fit(model)) == []  # a second fit does not say it again


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_follows_has_the_zeros_of_its_original_at_every_step_and_validation(kind):
    class Look(Callback):
        def look(self, trainer, model, *_):
            copies = {f"{pattern[:-1]}{name[4:]}": mask for name, mask in pruner.masks.items()}
            assert dead_are_zero(dict(model.named_parameters()), copies)
            self.seen = alive(copies)

        on_before_zero_grad = on_train_batch_start = on_validation_start = on_train_end = on_fit_end = look

    pattern, look = PATTERN.get(kind, "copy.*"), Look()
    pruner, model = pruning(follow={pattern: "net.*"}), Student(kind)
    assert said(lambda: fitter(pruner, look, epochs=3).fit(model)) == []
    assert list(pruner.masks) == NETS
    assert alive(pruner.masks) == look.seen == round(0.49 * 108)


def test_a_frozen_teacher_that_follows_gets_no_gradient_and_keeps_its_other_weights():
    pruner, model = pruning(follow={"copy.*": "net.*"}), Student("frozen")
    before = deepcopy(model.copy.state_dict())
    fitter(pruner, epochs=2, gradient_clip_val=0.1).fit(model)
    for name, p in model.copy.named_parameters():
        assert not p.requires_grad
        mask = pruner.masks.get(f"net.{name}", torch.ones_like(p, dtype=torch.bool))
        assert same(p.detach(), before[name].where(mask, 0.0))


def test_include_names_what_is_frozen_and_it_is_said_that_nothing_trains_it():
    pruner, model = pruning(include=["*"]), Student("frozen")
    (text,) = said(lambda: fitter(pruner, epochs=3).fit(model))
    assert text.startswith("include: copy.0.weight, copy.2.weight are pruned, and no optimizer trains them")
    assert alive(pruner.masks) == round(0.49 * 216)
    assert dead_are_zero(dict(model.named_parameters()), pruner.masks)


def test_a_frozen_network_that_is_no_copy_stays_dense_without_a_warning(caplog):
    class Backbone(Net):
        def __init__(self):
            super().__init__()
            self.stem.requires_grad_(False)

    pruner = pruning()
    assert said(lambda: fitter(pruner, epochs=3).fit(Backbone())) == []
    assert list(pruner.masks) == ["body.weight", "head.weight"]
    assert "stem.weight: no optimizer trains them, so they stay dense" in caplog.text


def test_nothing_to_train_among_what_could_be_pruned_is_refused():
    class Wrong(Net):
        def configure_optimizers(self):
            return sgd(deepcopy(self).parameters())

    with pytest.raises(ValueError, match=r"no optimizer trains any of the prunable weights.*stem\.weight"):
        fitter(pruning(), epochs=1).fit(Wrong())


@pytest.mark.parametrize("unfrozen", [True, False])
def test_a_resumed_run_prunes_the_weights_that_it_pruned_before(unfrozen, tmp_path):
    """Whatever is frozen, or trained, by then."""

    class Backbone(Net):
        def __init__(self, frozen):
            super().__init__()
            self.stem.requires_grad_(not frozen)

    pruner, model = pruning(), Backbone(frozen=unfrozen)
    trainer = fitter(pruner, epochs=2)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = pruning()
    again = Backbone(frozen=unfrozen)
    optimizer = again.configure_optimizers
    again.configure_optimizers = lambda: optimizer()
    again.stem.requires_grad_(unfrozen)
    fitter(other, epochs=3).fit(again, ckpt_path=tmp_path / "x.ckpt")
    assert list(other.masks) == list(pruner.masks)
    assert other.round == 2
    model.stem.requires_grad_(unfrozen)
    fitter(pruner, epochs=2).fit(model)  # as does a second fit
    assert list(other.masks) == list(pruner.masks)


# --- patterns ---


@pytest.mark.parametrize(
    ("follow", "message"),
    [
        ({"copy": "net.*"}, r"follow=\{'copy': 'net\.\*'\}: allowed are patterns with exactly one \*"),
        ({"copy.*": "*.*"}, "exactly one"),
        (
            {"teacher.*": "net.*"},
            r"no parameter is such a copy; allowed are copies of masked ones.*net\.0\.weight",
        ),
        ({"copy.*": "body.*"}, "no parameter is such a copy"),
        ({"net.*": "net.*"}, "no parameter is such a copy"),
    ],
    ids=in_words,
)
def test_a_pattern_that_leads_nowhere_is_refused(follow, message):
    with pytest.raises(ValueError, match=message):
        fitter(pruning(follow=follow), epochs=1).fit(Student("ema"))


def test_a_copy_that_is_pruned_itself_cannot_follow():
    with pytest.raises(ValueError, match=r"pruned themselves: copy\.0\.weight, copy\.2\.weight"):
        fitter(pruning(include=["*"], follow={"copy.*": "net.*"}), epochs=1).fit(Student("ema"))


def test_patterns_stand_for_the_same_text_once():
    names = ["a.b.weight", "a.c.weight", "x.b.weight.old", "x.c.weight.old"]
    found = following({"x.*.weight.old": "a.*.weight"}, names[:2], names)
    assert found == {"x.b.weight.old": "a.b.weight", "x.c.weight.old": "a.c.weight"}
    assert following({"x*": "ab*bc"}, ["abbc"], ["x", "abbc"]) == {"x": "abbc"}  # * may be empty
    with pytest.raises(ValueError, match="no parameter is such a copy"):
        following({"x*": "ab*bc"}, ["abc"], ["x", "abc"])  # the two ends do not overlap


def test_only_what_has_the_same_names_and_shapes_looks_like_a_copy():
    model = nn.ModuleDict(
        {"net": net(), "other": nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))}
    )
    left = ["other.0.weight", "other.2.weight"]
    assert look_like_copies(model, NETS, left) == {"other.0.*": "net.0.*"}
    model["other"] = net()
    assert look_like_copies(model, NETS, left) == {"other.*": "net.*"}
    assert look_like_copies(model, [*NETS, "other.0.weight"], ["other.2.weight"]) == {"other.2.*": "net.2.*"}
