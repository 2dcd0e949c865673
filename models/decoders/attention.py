"""Multi-head attention, and the layouts it runs over: regions, captions packed without padding, captions as they grow.

B images, K captions an image, T tokens, R regions, N rows, Q places of queries, S places of keys, D model width,
H heads, d = D/H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layout:
    """Who attends to whom, and how the rows that linear layers run on become sequences that attention runs on.

    `mask` broadcasts to [B,H,Q,S] and is added to the scores: 0 where a query may look, -inf where not; None: everywhere.
    Here rows are sequences already, as regions [B,R,D] are.
    """

    mask: Tensor | None

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def spread(self, rows: Tensor) -> Tensor:
        """Rows to sequences [B,Q,D]."""
        return rows

    def gather(self, sequences: Tensor) -> Tensor:
        """Sequences [B,Q,D] to rows."""
        return sequences

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,H,Q,d] of a decoder layer's own tokens; returns all that its queries may look at, [B,H,S,d]."""
        return keys, values


class Packed(Layout):
    """Whole captions without their padding: one row a token, those of an image side by side in Q places (the most of any).

    A token looks at itself and those before it in its own caption. words, positions [N] int64; place [N] int64: where row n
    stands among the B*Q places. The first `count` rows are the tokens; a few after them, of no caption, make N and Q multiples
    of ROWS and PLACES: a CPU's library makes and keeps a program for each shape of product that it meets, some megabyte each.
    """

    ROWS, PLACES = 64, 8

    def __init__(self, tokens: Tensor, there: Tensor | None = None) -> None:
        """tokens [B,K,T] int64; there [B,K,T] bool: which of them are no padding, None: all."""
        images = tokens.shape[0]
        there = torch.ones_like(tokens, dtype=torch.bool) if there is None else there
        image, caption, self.positions = there.nonzero(as_tuple=True)
        self.words = tokens[there]
        counts, self.count = there.sum((1, 2)), len(image)
        most = int(counts.max())
        whole = self.count == images * most
        self.shape = images, most if whole else -(-most // self.PLACES) * self.PLACES
        before = counts.cumsum(0) - counts
        self.place = image * self.shape[1] + torch.arange(len(image), device=image.device) - before[image]
        mine, at = (
            part.new_full((images * self.shape[1],), -1).index_copy(0, self.place, part).view(self.shape)
            for part in (caption, self.positions)
        )
        seen = (mine[:, :, None] == mine[:, None, :]) & (at[:, :, None] >= at[:, None, :])  # padding sees padding: no NaN
        super().__init__(additive(seen)[:, None])
        self.full = whole
        if not whole:
            free = torch.ones(images * self.shape[1], dtype=torch.bool, device=image.device).index_fill_(0, self.place, False)
            spare = free.nonzero()[: -self.count % self.ROWS, 0]
            self.place = torch.cat([self.place, spare])
            self.words, self.positions = (F.pad(part, (0, len(spare))) for part in (self.words, self.positions))

    def to(self, device: torch.device) -> Packed:
        for name in ("words", "positions", "place", "mask"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self

    def spread(self, rows: Tensor) -> Tensor:
        if not self.full:
            rows = _Spread.apply(rows, self.place, self.shape[0] * self.shape[1])
        return rows.unflatten(0, self.shape)

    def gather(self, sequences: Tensor) -> Tensor:
        flat = sequences.flatten(0, 1)
        return flat if self.full else _Gather.apply(flat, self.place)


class _Spread(torch.autograd.Function):
    """Rows [N,D] to places [P,D], zeros between. No place comes twice, so each direction is the other's gradient: torch's
    own gradient of a gather adds row by row, since it cannot know that."""

    @staticmethod
    def forward(ctx, rows: Tensor, place: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place)
        return rows.new_zeros(places, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Places [P,D] to rows [N,D]."""

    @staticmethod
    def forward(ctx, flat: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = flat.shape[0]
        return flat.index_select(0, place)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        zeros = gradient.new_zeros(ctx.places, gradient.shape[1])
        return zeros.index_copy_(0, ctx.saved_tensors[0], gradient), None


class KVCache(Layout):
    """Captions as they grow: keys and values [B,H,S*K,d] of every decoder layer, preallocated for S tokens a caption.

    What caption k's token s left stands in slot s*K + k and never moves. `origin[b,k,s]` says in whose slots the tokens of
    caption k stand, so that making a caption go on from another one copies S numbers, not S keys and values; each caption's
    queries see its own ancestors through the mask. `length` tokens are filled.
    """

    def __init__(self, layers: int, captions: int, capacity: int, like: Tensor) -> None:
        """`like` [B,H,R,d]: keys of the same images, heads, depth, dtype and device."""
        super().__init__()
        images, heads, _, depth = like.shape
        shape = images, heads, capacity * captions, depth
        self.keys = [like.new_empty(shape) for _ in range(layers)]
        self.values = [like.new_empty(shape) for _ in range(layers)]
        self.captions = torch.arange(captions, device=like.device)
        self.origin = self.captions[None, :, None].repeat(images, 1, capacity)
        self.start = self.length = 0

    def begin(self, captions: int, tokens: int) -> None:
        """Make room for `tokens` new tokens of each of `captions` captions; they look at themselves and at all before them.

        captions is K, or in the first call 1: a beginning that all K share.
        """
        images = len(self.origin)
        self.start, self.length = self.length, self.length + tokens
        own = self.captions[:captions]
        self.origin[:, :, self.start : self.length] = own[:, None]
        self.mask = None
        if captions > 1 or tokens > 1:
            mine = self.origin[:, :captions, None, : self.length, None] == own
            if tokens > 1:
                place = torch.arange(self.length, device=mine.device)
                mine = mine & (place <= place[self.start :, None])[:, :, None]
            self.mask = additive(mine, self.keys[0].dtype).view(images, 1, captions * tokens, self.length * captions)

    def spread(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.origin.shape[0], -1))

    def gather(self, sequences: Tensor) -> Tensor:
        return sequences.flatten(0, 1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        most = len(self.captions)
        captions = keys.shape[2] // (self.length - self.start)
        for store, part in ((self.keys[layer], keys), (self.values[layer], values)):
            new = store.unflatten(2, (-1, most))[:, :, self.start : self.length]
            new[:, :, :, :captions] = part.unflatten(2, (captions, -1)).transpose(2, 3)
            new[:, :, :, captions:] = 0  # never looked at, but 0 times whatever stood there must be 0
        if captions < most:
            return keys, values
        end = self.length * most
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, origin: Tensor) -> None:
        """`origin` [B,K] int64: which caption of the same image each caption continues."""
        self.origin = self.origin.gather(1, origin[:, :, None].expand_as(self.origin))

    def keep(self, images: Tensor) -> None:
        """Keep only these images, `images` [b] int64, in this order: the finished ones leave the batch.

        Images that keep their place are not copied: least is where those from the end fill the places that become free.
        """
        filled = self.length * len(self.captions)
        for stores in (self.keys, self.values):
            stores[:] = [move(store, images, filled) for store in stores]
        self.origin = self.origin[images]


def move(store: Tensor, images: Tensor, filled: int) -> Tensor:
    """The first `filled` places of keys or values [B,H,S,d] of `images` [b], moved to the front in place: a view [b,H,S,d]."""
    to = (images != torch.arange(len(images), device=images.device)).nonzero()[:, 0]
    store[to, :, :filled] = store[images[to], :, :filled]
    return store[: len(images)]


def additive(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask to add to scores: 0 where `allowed`, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q [B,H,Q,d], k and v [B,H,S,d], mask broadcasting to [B,H,Q,S].

    On a CPU plain products take the place of the fused kernel: for the short sequences of captions and regions they are two
    to three times as fast (0.7 against 1.8 ms for the beams of 100 images over 49 regions), and four to five times backwards.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, queries, keys and values from one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, layer: int = 0) -> Tensor:
        """Rows x [...,D] to rows [...,D]; `layer` is which of a KVCache's stores to extend."""
        q, k, v = layout.spread(self.qkv(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(q, *layout.extend(layer, k, v), layout.mask)
        return self.out(layout.gather(out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Attention of captions to the regions of their image; keys and values are made once an image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B,H,R,d], of encoded regions [B,R,D]; laid out as the products of every step read them."""
        return self.key_value(memory).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    def forward(self, x: Tensor, layout: Layout, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Rows x [N,D] to rows [N,D]; keys, values [B,H,R,d]; mask [B,1,1,R], -inf where no region is.

        All captions of an image are queries of one product, so keys and values are never repeated.
        """
        q = layout.spread(self.query(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = attend(q, keys, values, mask)
        return self.out(layout.gather(out.transpose(1, 2).flatten(2)))
