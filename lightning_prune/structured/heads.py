"""Heads: which channels belong to one head of an attention, so that heads can go as a whole.

An attention reshapes channels to (heads, channels of a head), multiplies, and reshapes back. How it does that
is asked of the gradients: a head's part of a product depends on certain outputs of layers, and certain inputs
of layers depend on it. So nothing here knows a class of attention.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as Norm
from torch.overrides import TorchFunctionMode
from typing_extensions import final

from lightning_prune.structured.multihead import FewerHeads
from lightning_prune.structured.surgery import Site, forget
from lightning_prune.structured.trial import copied, run, tensors_in
from lightning_prune.structured.units import HEADS, Coupling, Couplings, is_maker, out_dimension, parameter

PRODUCTS = {"scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "einsum"}
HEAD = -3  # the dimension of heads in a product: (..., heads, rows, columns)
MOST = 256  # heads; a product with more of these is none of an attention


def attention_heads(model: nn.Module, example: Any, multiplied: bool = True) -> Couplings:
    """Heads of attentions, by the name of the first weight that makes their channels.

    A unit is a head, or several where these share channels: the query heads of a key and value head.

    Args:
        model: a copy that may be run, with every parameter trained.
        example: an input.
        multiplied: whether its forward has products by heads, as `Watch` sees.
    """
    for module in model.modules():
        forget(module)
    if not multiplied:
        return _multihead(model)
    model = copied(model)  # which may keep a graph of what follows
    seen = _Products(model, _batch(example))
    handles: list[Any] = []
    for name, module in model.named_modules():
        if is_maker(module) and not _depthwise(module):
            before, after = seen.into(name), seen.out_of(name)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    try:
        with seen:
            run(model, example)
    except Exception:  # a forward that minds that outputs are leaves, say, has no heads that could be told
        return _multihead(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen.couplings() | _multihead(model)


def _multihead(model: nn.Module) -> Couplings:
    """Heads of `nn.MultiheadAttention`, which multiplies inside of one call."""
    found: Couplings = {}
    for name, module in model.named_modules():
        if FewerHeads.fits(module):
            attention: Any = module
            wide = torch.arange(attention.out_proj.in_features)
            head = wide // attention.head_dim
            own = [t for t in ("in_proj_weight", "in_proj_bias") if getattr(module, t) is not None]
            made: list[Site] = [(name, tensor, 0) for tensor in own]
            sites = dict.fromkeys(made, (torch.arange(3 * len(wide)), head.repeat(3)))
            sites[f"{name}.out_proj".lstrip("."), "weight", 1] = wide, head
            weight = parameter(made[0])
            found[weight] = Coupling(weight, attention.num_heads, sites, (made[0],), (), HEADS)
    return found


def _depthwise(module: nn.Module) -> bool:
    """Whether a layer passes each channel on by itself: gradients go through it."""
    return 1 < getattr(module, "groups", 1) == getattr(module, "out_channels", 0)


def _by_heads(func: Any, out: Any, batch: int) -> Tensor | None:
    """A product as (..., heads, rows, columns), or None where there are no several heads."""
    if getattr(func, "__name__", "") not in PRODUCTS or not isinstance(out, Tensor):
        return None
    if out.dim() == 3 and len(out) % batch == 0:  # samples and heads in one dimension, as for `bmm`
        out = out.unflatten(0, (batch, -1))
    return out if out.dim() > 3 and 1 < out.shape[HEAD] <= MOST else None


def _batch(example: Any) -> int:
    return next((len(t) for t in tensors_in(example) if t.dim()), 1) or 1


@final
class Watch(TorchFunctionMode):
    """Whether a forward pass that is run inside has products by heads at all."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.batch, self.multiplied = _batch(example), False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.multiplied = self.multiplied or _by_heads(func, out, self.batch) is not None
        return out


Element = tuple[Any, int]  # (a site, or the number of a product; an index of it)


@dataclass
class _Products(TorchFunctionMode):
    """The products of a forward pass, and the channels that belong to each head of theirs.

    Outputs of layers are leaves of the graph of gradients, so what depends on what is asked between one layer
    and the next only. To each product zeros are added, by which it is known in what follows.
    """

    model: nn.Module
    batch: int  # samples
    layer: dict[int, str] = field(default_factory=dict[int, str])  # by identity of an output
    zeros: dict[int, int] = field(default_factory=dict[int, int])  # the number of a product, by identity
    alive: list[Tensor] = field(default_factory=list[Tensor])  # so that no identity is used twice
    heads: list[int] = field(default_factory=list[int])  # of each product
    parent: dict[Element, Element] = field(default_factory=dict[Element, Element])  # a union-find
    makers: dict[Site, None] = field(default_factory=dict[Site, None])  # in the order in which they run

    def __post_init__(self) -> None:
        super().__init__()
        own = (*self.model.named_parameters(), *self.model.named_buffers())
        self.names = {id(t): name for name, t in own}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = _by_heads(func, out, self.batch)
        return self._product(wide).view(out.shape) if wide is not None and out.requires_grad else out

    def out_of(self, name: str) -> Callable[..., Tensor]:
        def cut_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            self.layer[id(leaf)] = name
            self.makers.setdefault((name, "weight", out_dimension(module)))
            self.alive.append(leaf)
            return leaf.clone()  # which may be changed in place

        return cut_graph

    def into(self, name: str) -> Callable[..., None]:
        def ask(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and (zeros := [t for t in _leaves(x) if id(t) in self.zeros]):
                self._input(name, module, x, zeros)

        return ask

    def _product(self, out: Tensor) -> Tensor:
        number, count = len(self.heads), out.shape[HEAD]
        self.heads.append(count)
        known = self.layer.keys() | self.zeros.keys() | self.names.keys()
        leaves = [t for t in _leaves(out) if id(t) in known]
        touched: list[list[Tensor | None]] = []
        for head in range(count):
            part = out.select(HEAD, head)
            grads: Any = torch.autograd.grad(part, leaves, _noise(part), retain_graph=True, allow_unused=True)
            touched.append([None if g is None else g != 0 for g in grads])
        for i, leaf in enumerate(leaves):
            masks = [t[i] for t in touched]
            if id(leaf) in self.layer:
                module: Any = self.model.get_submodule(name := self.layer[id(leaf)])
                site = (name, "weight", out_dimension(module))
                self._join(number, site, _by(masks, leaf, _channels(module)))
            elif id(leaf) in self.zeros:
                self._join(number, self.zeros[id(leaf)], _by(masks, leaf, HEAD))
            else:
                module_name, _, tensor = self.names[id(leaf)].rpartition(".")
                dims = [d for d in range(leaf.dim()) if _separate(_by(masks, leaf, d))]
                if len(dims) == 1:  # else all heads share it
                    self._join(number, (module_name, tensor, dims[0]), _by(masks, leaf, dims[0]))
        zero = torch.zeros_like(out, requires_grad=True)
        self.zeros[id(zero)] = number
        self.alive.append(zero)
        return out.detach() + zero

    def _input(self, name: str, module: Any, x: Tensor, zeros: list[Tensor]) -> None:
        weights = torch.ones_like(x, requires_grad=True)
        grads = torch.autograd.grad(x, zeros, weights, create_graph=True, retain_graph=True)
        for zero, grad in zip(zeros, grads, strict=True):
            masks: list[Tensor | None] = []
            for head in range(zero.shape[HEAD]):
                part = grad.select(HEAD, head)
                (reached,) = torch.autograd.grad(part, weights, _noise(part), retain_graph=True)
                masks.append(reached != 0)
            site = (name, "weight", 1 - out_dimension(module))
            self._join(self.zeros[id(zero)], site, _by(masks, x, _channels(module)))

    def _join(self, product: int, site: Any, touched: Tensor) -> None:
        """Join channels with the heads that they belong to; touched: (heads, channels)."""
        every = touched.all(0)
        for head, index in touched.logical_and(~every).nonzero().tolist():
            self._union((product, head), (site, index))

    def _find(self, element: Element) -> Element:
        parent = self.parent
        parent.setdefault(element, element)
        while parent[element] != element:
            parent[element] = element = parent[parent[element]]
        return element

    def _union(self, a: Element, b: Element) -> None:
        self.parent[self._find(b)] = self._find(a)

    def couplings(self) -> Couplings:
        """Those of products whose heads can be told apart."""
        units: dict[Element, list[Element]] = defaultdict(list)
        for element in self.parent:
            units[self._find(element)].append(element)
        group = list(range(len(self.heads)))  # products that share a unit belong together
        for elements in units.values():
            numbers = {group[key] for key, _ in elements if isinstance(key, int)}
            group = [min(numbers) if g in numbers else g for g in group]
        grouped: dict[int, list[list[Element]]] = defaultdict(list)
        for elements in units.values():
            if numbers := [group[key] for key, _ in elements if isinstance(key, int)]:
                grouped[numbers[0]].append(elements)
        found = (self._coupling(those) for those in grouped.values() if len(those) > 1)
        return {one.name: one for one in found if one is not None}

    def _coupling(self, units: list[list[Element]]) -> Coupling | None:
        lists: dict[Site, tuple[list[int], list[int]]] = {}
        units.sort(key=lambda elements: min(e for e in elements if isinstance(e[0], int)))
        for number, elements in enumerate(units):
            for site, index in elements:
                for each in () if isinstance(site, int) else self._sites(site):
                    indices, numbers = lists.setdefault(each, ([], []))
                    indices.append(index)
                    numbers.append(number)
        filters = tuple(site for site in self.makers if site in lists)
        sites: dict[Site, tuple[Tensor, Tensor]] = {}
        for site, (indices, numbers) in lists.items():
            if max(indices) >= getattr(self.model.get_submodule(site[0]), site[1]).shape[site[2]]:
                return None  # of a grouped convolution
            order = torch.tensor(indices).argsort()
            sites[site] = torch.tensor(indices)[order], torch.tensor(numbers)[order]
        if not filters or any(len(site_units.unique()) < len(units) for _, site_units in sites.values()):
            return None
        return Coupling(parameter(filters[0]), len(units), sites, filters, (), HEADS)

    def _sites(self, site: Site) -> Iterator[Site]:
        """The site, and where the same channels lie in other tensors of the module."""
        name, tensor, _ = site
        module = self.model.get_submodule(name)
        yield site
        if site in self.makers and getattr(module, "bias", None) is not None:
            yield name, "bias", 0
        if isinstance(module, Norm) and module.running_mean is not None and tensor == "weight":
            yield name, "running_mean", 0
            yield name, "running_var", 0


def _noise(t: Tensor) -> Tensor:
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(0)).to(t) + 0.5


def _channels(module: nn.Module) -> int:
    """The dimension of a layer's inputs and outputs along which channels lie."""
    return -1 if getattr(module, "weight", torch.empty(0)).dim() == 2 else 1


def _by(masks: Sequence[Tensor | None], t: Tensor, dim: int) -> Tensor:
    """Which indices along a dimension each head touches: (heads, indices)."""
    none = torch.zeros(t.shape[dim], dtype=torch.bool)
    others = [d for d in range(t.dim()) if d != dim % t.dim()]
    return torch.stack([none if m is None else m.cpu().any(others) if others else m.cpu() for m in masks])


def _separate(touched: Tensor) -> bool:
    """Whether every index belongs to a head, and none to all of them."""
    return bool(touched.any(0).all()) and not bool(touched.all(0).any())


def _leaves(t: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from."""
    found: dict[int, Tensor] = {}
    stack, seen = [t.grad_fn], set[Any]()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        stack.extend(following for following, _ in node.next_functions)
    return list(found.values())
