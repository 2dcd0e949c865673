"""Multi-head attention, and the cache of keys and values that step-by-step decoding passes along.

B images, K captions an image, T tokens, R regions, D model width, H heads, d = D/H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVCache:
    """Self-attention keys and values [B,K,H,S,d] of every decoder layer, preallocated for S tokens.

    `length` tokens are filled. `reorder` makes caption k of every image go on from caption `origin[b,k]`.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int, int, int], like: Tensor) -> None:
        self.keys = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(layers)]
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens' keys and values [B,K,H,T,d] of a layer; returns all so far, [B,K,H,length+T,d]."""
        end = self.length + keys.shape[3]
        self.keys[layer][:, :, :, self.length : end] = keys
        self.values[layer][:, :, :, self.length : end] = values
        return self.keys[layer][:, :, :, :end], self.values[layer][:, :, :, :end]

    def reorder(self, origin: Tensor) -> None:
        """`origin` [B,K] int64: which caption of the same image each caption continues."""
        image = torch.arange(origin.shape[0], device=origin.device)[:, None]
        for store in (*self.keys, *self.values):
            store[:, :, :, : self.length] = store[image, origin, :, : self.length]

    def keep(self, images: Tensor) -> None:
        """Keep only these images, `images` [b] int64: the finished ones leave the batch."""
        self.keys = [store[images] for store in self.keys]
        self.values = [store[images] for store in self.values]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [N,H,Q,d], k and v [N,H,S,d].

    `mask` [N,1,1,S] bool, True where allowed, broadcasts to [N,H,Q,S].

    While a CPU trains, plain products take the place of the fused kernel, whose backward pass in bf16 is four to five
    times as slow there (39 against 8 ms for 250 captions of 21 words, two cores).
    """
    if not (torch.is_grad_enabled() and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, queries, keys and values from one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [N,S,D]; mask as in `attend`; returns [N,S,D]."""
        q, k, v = self._split(x)
        out = attend(q, k, v, mask, causal)
        return self.out(out.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """New tokens x [B,K,T,D] after those in the cache; T > 1 only while the cache is empty; returns [B,K,T,D]."""
        b, k, t, _ = x.shape
        q, key, value = (part.unflatten(0, (b, k)) for part in self._split(x.flatten(0, 1)))
        key, value = cache.append(layer, key, value)
        out = attend(q.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), causal=t > 1)
        return self.out(out.transpose(1, 2).flatten(2)).unflatten(0, (b, k))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N,S,D] to queries, keys and values, each [N,H,S,d]."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(nn.Module):
    """Attention of captions to the regions of their image; keys and values are made once an image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B,H,R,d], of encoded regions [B,R,D]."""
        return self.key_value(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,K,T,D]; keys, values [B,H,R,d]; mask [B,1,1,R] True where a region is; returns [B,K,T,D].

        The K captions fold into the query axis, so keys and values are never repeated.
        """
        _, k, t, _ = x.shape
        q = self.query(x.flatten(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = attend(q, keys, values, mask)
        return self.out(out.transpose(1, 2).flatten(2)).unflatten(1, (k, t))
