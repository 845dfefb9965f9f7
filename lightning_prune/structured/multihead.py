"""Multi-head attention with fewer heads; `nn.MultiheadAttention` has as many channels as the input."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention
from typing_extensions import final, override


@final
class FewerHeads(nn.MultiheadAttention):
    """What a `nn.MultiheadAttention` becomes when heads are cut out of it; parameters keep their names.

    `embed_dim` is the width of inputs and outputs, as before; `num_heads * head_dim` is less. An `attn_mask`
    of three dimensions has a mask for each of the heads that are left.
    """

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
        """Whether heads can go from a module: it makes queries, keys and values alike, and nothing else."""
        if not isinstance(module, nn.MultiheadAttention) or type(module).forward not in FORWARDS:
            return False
        more = isinstance(module.bias_k, Tensor) or module.add_zero_attn  # keys that belong to no input
        return isinstance(module.in_proj_weight, Tensor) and not more

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """That of `nn.MultiheadAttention`; `is_causal` is a hint about `attn_mask`, which has to be given."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True: attn_mask=None; the causal mask is needed, too. Give it.")
        single = query.dim() == 2
        swap = not self.batch_first and not single
        q, k, v = (
            self._heads(t[None] if single else t.transpose(0, 1) if swap else t, part)
            for part, t in enumerate((query, key, value))
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        p = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = dropout((scores if mask is None else scores + mask).softmax(-1), p)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = scaled_dot_product_attention(q, k, v, mask, p)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if swap else out, weights

    def _heads(self, t: Tensor, part: int) -> Tensor:
        """Queries, keys or values: (batch, heads, positions, channels of a head)."""
        bias: Any = self.in_proj_bias
        made = linear(t, self.in_proj_weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part])
        return made.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as numbers to be added to the scores."""
        total: Tensor | None = None
        if attn_mask is not None:
            one = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            total = _added(one, q)
        if padding is not None:
            other = _added(padding.unflatten(-1, (1, 1, -1)), q)
            total = other if total is None else total + other
        return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)


FORWARDS = (nn.MultiheadAttention.forward, FewerHeads.forward)  # a subclass may compute something else
