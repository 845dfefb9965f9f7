"""A cut model of transformers has the configuration that describes it, if one does."""

import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.structured import units as structure
from lightning_prune.structured.surgery import cut
from tests.networks import fitter
from tests.test_heads import TRANSFORMERS, couplings, far, one_less, randomized, transformer

NUMBERS = {  # what one head, or key and value head, less of four, and one inner channel less of forty, leave
    "ViT": {"num_attention_heads": 3, "intermediate_size": 39},
    "Llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 39},
    "Mistral": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 39},
    "Qwen2": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 39},
    "T5": {"num_heads": 3, "d_ff": 39},
}
HEADS_OF = {
    "Bert": ["*attention*"],
    "GPT2": ["*attn*"],
}  # one is as large as their number says


def changed(model, before):
    after = model.config.to_dict()
    return {name: value for name, value in after.items() if before.get(name) != value and name != "head_dim"}


def parted(model, x, exclude=()):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LayerNorm takes its mean over them")
        return lp.structured.discover(model, x, exclude=list(exclude))


@pytest.mark.parametrize("name", NUMBERS)
def test_the_folder_of_a_cut_transformer_loads_without_this_library(name, tmp_path):
    model, x, (layer, _), _ = transformer(name)
    if layer not in dict(model.named_modules()):
        pytest.skip(f"the {name} of this version of transformers takes no size of a head")
    given, before = model.config, deepcopy(model.config.to_dict())
    found = couplings(randomized(model), x)
    random = torch.get_rng_state()
    cut(model, structure.cut_of(found, one_less(found)))
    assert torch.equal(random, torch.get_rng_state())
    assert changed(model, before) == NUMBERS[name]
    assert given.to_dict() == before  # other models are built from it
    inside = [vars(m)["config"] for m in model.modules() if "config" in vars(m)]
    assert all(config.to_dict().items() >= NUMBERS[name].items() for config in inside)
    model.save_pretrained(tmp_path)
    assert far(type(model).from_pretrained(tmp_path).eval(), model.eval(), x) == 0.0
    loaded = lp.load_pruned(transformer(name)[0], model.state_dict())
    assert changed(loaded, before) == NUMBERS[name]


@pytest.mark.parametrize(("name", "inner"), [("Bert", "intermediate_size"), ("GPT2", "n_inner")])
def test_where_only_inner_channels_go_the_number_of_heads_stays(name, inner, tmp_path):
    model, x, *_ = transformer(name)
    before = deepcopy(model.config.to_dict())
    found = parted(randomized(model), x, exclude=HEADS_OF[name])
    assert len(found) == 2
    cut(model, structure.cut_of(found, one_less(found)))
    assert changed(model, before).keys() == {inner}
    model.save_pretrained(tmp_path)
    assert far(type(model).from_pretrained(tmp_path).eval(), model.eval(), x) == 0.0


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_layers_that_differ_leave_the_configuration_as_it_was(name):
    model, x, *_ = transformer(name)
    given, before = model.config, deepcopy(model.config.to_dict())
    found = couplings(randomized(model), x)
    first = {n: torch.arange(c.units) != (1 if ".0." in n else -1) for n, c in found.items()}
    cut(model, structure.cut_of(found, first))
    assert model.config is given
    assert given.to_dict() == before


def cut_evenly(model, sparsity, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays
        lp.prune_channels(model.eval(), sparsity, x, allocate=lp.allocation.uniform, **options)
    return model


@pytest.mark.parametrize(("sparsity", "heads"), [(0.25, 6), (0.5, 4)])
def test_numbers_that_a_configuration_refuses_leave_it_as_it_was(sparsity, heads, tmp_path):
    """From transformers 5 on Llama's hidden size must be a multiple of the number of heads."""
    library = pytest.importorskip("transformers")
    options = TRANSFORMERS["Llama"][0] | {"hidden_size": 64, "num_attention_heads": 8}
    options |= {"num_key_value_heads": 4}
    model = library.LlamaModel(library.LlamaConfig(**options))
    cut_evenly(model, sparsity, x := TRANSFORMERS["Llama"][1]).save_pretrained(tmp_path)
    assert model.layers[0].self_attn.q_proj.out_features == 8 * heads
    if int(library.__version__.split(".")[0]) >= 5 and 64 % heads:
        assert model.config.num_attention_heads == 8
    else:
        assert model.config.num_attention_heads == heads
        assert far(library.LlamaModel.from_pretrained(tmp_path).eval(), model, x) == 0.0


def test_a_configuration_with_numbers_of_each_stage_stays_as_it_was():
    library = pytest.importorskip("transformers")
    options = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [4, 8]}
    model = library.SwinModel(library.SwinConfig(**options, window_size=4))
    given, before = model.config, deepcopy(model.config.to_dict())
    cut_evenly(model, 0.5, {"pixel_values": torch.randn(1, 3, 32, 32)})
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(
        p.numel() for p in library.SwinModel(given).parameters()
    )
    assert model.config is given
    assert given.to_dict() == before


def test_a_class_of_the_users_own_is_not_built_by_a_cut():
    library, built = pytest.importorskip("transformers"), []

    class Own(library.Qwen2Model):
        def __init__(self, config):
            built.append(config)
            super().__init__(config)

    model = cut_evenly(Own(library.Qwen2Config(**TRANSFORMERS["Qwen2"][0])), 0.5, TRANSFORMERS["Qwen2"][1])
    assert len(built) == 1
    assert model.config.num_attention_heads == 4
    assert model.layers[0].self_attn.q_proj.out_features == 16


class Language(LightningModule):
    """A language model, trained on three batches of two texts."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(torch.randint(0, 19, (6, 5)), batch_size=2)

    def val_dataloader(self):
        return self.train_dataloader()


def language_model():
    library = pytest.importorskip("transformers")
    options = TRANSFORMERS["Qwen2"][0]
    return library.Qwen2ForCausalLM(library.Qwen2Config(**options))


@pytest.fixture(params=["end", "each_round"])
def fitted(request, tmp_path):
    """(the trainer, its model, how channels were removed) after two rounds, with a checkpoint an epoch."""
    pruner = lp.StructuredChannelPruning(
        lp.schedules.Linear(0.5, rounds=2), rounds=2, allocate=lp.allocation.uniform, remove=request.param
    )
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer, model = fitter(pruner, saver, epochs=3, enable_checkpointing=True), Language(language_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*RMSNorm computes something else without some of them")
        trainer.fit(model)
    return trainer, model, request.param


def test_a_fit_that_cuts_all_layers_alike_leaves_a_folder_that_loads(fitted, tmp_path):
    _, model, _ = fitted
    model.net.save_pretrained(tmp_path / "folder")
    loaded = type(model.net).from_pretrained(tmp_path / "folder").eval()
    assert (loaded.config.num_attention_heads, loaded.config.intermediate_size) == (2, 20)
    ids = TRANSFORMERS["Qwen2"][1]["input_ids"]
    same = [m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (loaded, model.net)]
    assert torch.equal(*same)  # with a cache of the keys and values
    assert far(loaded, model.net.eval(), TRANSFORMERS["Qwen2"][1]) == 0.0


def test_a_checkpoint_of_an_earlier_round_brings_its_configuration(fitted, tmp_path):
    trainer, model, remove = fitted
    for epoch, heads in enumerate((4, 3, 2)):
        loaded = lp.load_pruned(Language(language_model()), tmp_path / f"epoch={epoch}.ckpt")
        assert loaded.net.config.num_attention_heads == heads
        trainer.validate(model, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert model.net.config.num_attention_heads == (4 if remove == "end" else heads)
