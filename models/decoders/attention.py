"""Multi-head attention, and the three layouts that it runs over.

Linear layers run on rows, one a token, without padding. Attention runs on padded sequences. A
`Layout` converts between both and says which token sees which:

    Layout    regions of images: rows are sequences already
    Packed    whole texts, for training and scoring
    KVCache   texts that grow token by token, for generation

B images, K texts an image, T tokens, P prompt tokens, R regions, N rows, Q queries, S keys, D model
width, H heads, d = D/H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layout:
    """Rows that are padded sequences already, as regions [B,R,D] are.

    `mask` broadcasts to [B,H,Q,S] and is added to the attention scores: 0 where a query sees a key,
    -inf where not; None: each query sees all keys.
    """

    mask: Tensor | None

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def pad(self, rows: Tensor) -> Tensor:
        """Rows to sequences [B,Q,D]."""
        return rows

    def unpad(self, sequences: Tensor) -> Tensor:
        """Sequences [B,Q,D] to rows."""
        return sequences

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values [B,H,Q,d] of a decoder layer's tokens; return those that its queries
        see, [B,H,S,d].
        """
        return keys, values


class Packed(Layout):
    """Whole texts without their padding: one row a token; the texts of an image share one sequence
    of Q places.

    A token sees the tokens before it in its own text and itself; all tokens of a text see its
    prompt (prefix language model, Raffel et al. 2020).

    words [N] int64: the tokens, text after text.
    positions [N] int64: where each stands in its text.
    replaceable [N] bool: words that noise may replace; False for the prompt and the first token
        after it.
    place [N] int64: the row's place among the B*Q places of the padded sequences.
    image [N] int64: the row's image.
    count: rows that are tokens. Rows after `count` are padding: N and Q are multiples of ROWS and
        PLACES, since a CPU's library compiles and keeps a program for each new shape of product.
    """

    ROWS, PLACES = 64, 8

    def __init__(
        self, tokens: Tensor, is_token: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> None:
        """tokens [B,K,T] int64; is_token [B,K,T] bool, False for padding (None: no padding);
        prompt_lengths [B,K] int64.
        """
        images = tokens.shape[0]
        is_token = torch.ones_like(tokens, dtype=torch.bool) if is_token is None else is_token
        self.image, text, self.positions = is_token.nonzero(as_tuple=True)
        self.words = tokens[is_token]
        per_image = is_token.sum((1, 2))
        longest, self.count = int(per_image.max()), len(self.words)
        self.full = self.count == images * longest
        self.shape = images, longest if self.full else _round_up(longest, self.PLACES)
        first_row = per_image.cumsum(0) - per_image
        rows = torch.arange(self.count, device=tokens.device)
        self.place = self.image * self.shape[1] + rows - first_row[self.image]
        prompt = (
            torch.zeros_like(self.words)
            if prompt_lengths is None
            else prompt_lengths[self.image, text]
        )
        self.replaceable = self.positions > prompt

        def padded(values: Tensor) -> Tensor:
            return (
                values.new_full((images * self.shape[1],), -1)
                .index_copy(0, self.place, values)
                .view(self.shape)
            )

        own_text, position = padded(text), padded(self.positions)
        sees = position[:, :, None] >= position[:, None, :]
        if prompt_lengths is not None:
            sees |= (position < padded(prompt))[:, None, :]
        # padding sees padding: no row of -inf, so no NaN
        sees &= own_text[:, :, None] == own_text[:, None, :]
        super().__init__(additive(sees)[:, None])
        if not self.full:
            self._add_padding_rows()

    def _add_padding_rows(self) -> None:
        """Fill up to a multiple of ROWS with rows of token 0, in free places."""
        free = torch.ones(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.place.device)
        spare = free.index_fill_(0, self.place, False).nonzero()[: -self.count % self.ROWS, 0]
        self.place = torch.cat([self.place, spare])
        self.words, self.positions, self.replaceable, self.image = (
            F.pad(part, (0, len(spare)))
            for part in (self.words, self.positions, self.replaceable, self.image)
        )

    def to(self, device: torch.device) -> Packed:
        for name in ("words", "positions", "replaceable", "image", "place", "mask"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self

    def pad(self, rows: Tensor) -> Tensor:
        if not self.full:
            rows = _Pad.apply(rows, self.place, self.shape[0] * self.shape[1])
        return rows.unflatten(0, self.shape)

    def unpad(self, sequences: Tensor) -> Tensor:
        flat = sequences.flatten(0, 1)
        return flat if self.full else _Unpad.apply(flat, self.place)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Pad(torch.autograd.Function):
    """Rows [N,D] to places [Q,D], zeros elsewhere.

    No place comes twice, so the gradient of each direction is the other direction. torch's own
    gradient of a gather cannot know that and adds row by row.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, place: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place)
        return rows.new_zeros(places, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """Places [Q,D] to rows [N,D]."""

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
    """Texts that grow: keys and values [B,H,S*K,d] of every decoder layer, preallocated for S
    tokens a text.

    Beam search lets texts go on from one another. Keys never move for that: token s that text k
    wrote lies in slot s*K + k for good, and beam_idx[b,k,s] is the text that wrote token s of text
    k's history. A reorder copies these numbers only; the mask lets each query see the slots of its
    own history.

    length: tokens a text so far. start: the first of the tokens that are being read now.
    padding [B] int64: prompts are padded on the left, so that all end at the same token; None: no
        padding.
    """

    def __init__(
        self,
        layers: int,
        texts: int,
        capacity: int,
        like: Tensor,
        prompts: Tensor | None = None,
        pad: int = 0,
    ) -> None:
        """like [B,H,R,d]: keys of the same images, heads, depth, dtype and device; prompts [B,P]
        int64, padded with `pad`.
        """
        super().__init__()
        images, heads, _, depth = like.shape
        self.prompt_length = 0 if prompts is None else prompts.shape[1]
        capacity += self.prompt_length
        shape = images, heads, capacity * texts, depth
        self.keys = [like.new_empty(shape) for _ in range(layers)]
        self.values = [like.new_empty(shape) for _ in range(layers)]
        self.texts = torch.arange(texts, device=like.device)
        self.beam_idx = self.texts[None, :, None].repeat(images, 1, capacity)
        self.padding = None if prompts is None else (prompts == pad).sum(1).to(like.device)
        self.start = self.length = self.rows_per_image = 0

    @property
    def images(self) -> int:
        return len(self.beam_idx)

    def begin(self, texts: int, tokens: int) -> None:
        """Make room for `tokens` new tokens of each of `texts` texts.

        texts is K, or in the first call 1: a beginning that all K texts share. Only there may
        tokens be above 1 (the prompt and the first token after it).
        """
        self.start, self.length = self.length, self.length + tokens
        self.rows_per_image = texts * tokens
        own = self.texts[:texts]
        self.beam_idx[:, :, self.start : self.length] = own[:, None]
        if texts == 1 and tokens == 1 and self.padding is None:
            self.mask = None
            return
        sees = self.beam_idx[:, :texts, None, : self.length, None] == own  # [B,K,1,S,K]
        if tokens > 1 or self.padding is not None:
            sees = sees & self._visible_tokens()[:, None, :, :, None]
        self.mask = additive(sees, self.keys[0].dtype if self.keys else torch.float32)
        self.mask = self.mask.view(self.images, 1, texts * tokens, self.length * texts)

    def _visible_tokens(self) -> Tensor:
        """Which tokens of its own history each new token sees: [B or 1, T, S] bool."""
        key = torch.arange(self.length, device=self.texts.device)
        query = key[self.start :, None]
        sees = ((key <= query) | (key < self.prompt_length))[None]
        if self.padding is not None:  # padding sees itself: no row of -inf, so no NaN
            sees = sees & (key >= self.padding[:, None, None]) | (key == query)
        return sees

    def positions(self, texts: int) -> Tensor:
        """Where each new token stands in its text: [B*K*T] int64."""
        new = torch.arange(self.start, self.length, device=self.texts.device).expand(
            self.images, texts, -1
        )
        if self.padding is not None:
            new = (new - self.padding[:, None, None]).clamp(min=0)
        return new.flatten()

    @property
    def image(self) -> Tensor:
        """The image of each row: [B*K*T] int64 for the K texts and T tokens of the last `begin`."""
        return torch.arange(self.images, device=self.texts.device).repeat_interleave(
            self.rows_per_image
        )

    def pad(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.images, -1))

    def unpad(self, sequences: Tensor) -> Tensor:
        return sequences.flatten(0, 1)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_texts = len(self.texts)
        texts = keys.shape[2] // (self.length - self.start)
        for store, part in ((self.keys[layer], keys), (self.values[layer], values)):
            new = store.unflatten(2, (-1, all_texts))[:, :, self.start : self.length]
            new[:, :, :, :texts] = part.unflatten(2, (texts, -1)).transpose(2, 3)
            new[:, :, :, texts:] = 0  # never seen, but 0 times whatever memory held must be 0
        if texts < all_texts:
            return keys, values
        end = self.length * all_texts
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, beam_idx: Tensor) -> None:
        """Let each text continue another text of the same image: beam_idx [B,K] int64."""
        self.beam_idx = self.beam_idx.gather(1, beam_idx[:, :, None].expand_as(self.beam_idx))

    def regroup(self, image: Tensor, text: Tensor) -> None:
        """Lay out other texts: text k of the new image b continues `text[b,k]` of `image[b,k]`,
        both [b,K] int64.
        """
        texts, tokens = len(self.texts), torch.arange(self.length, device=self.texts.device)
        slots = tokens * texts + self.beam_idx[image, text, : self.length]  # [b,K,S]
        self.texts = self.texts[: image.shape[1]]
        for stores in (self.keys, self.values):
            stores[:] = [self._moved(store, image, slots, texts) for store in stores]
        if self.padding is not None:
            self.padding = self.padding[image[:, 0]]
        capacity = self.beam_idx.shape[2]
        self.beam_idx = self.texts[None, :, None].repeat(len(image), 1, capacity)

    def _moved(self, store: Tensor, image: Tensor, slots: Tensor, texts_before: int) -> Tensor:
        capacity = store.shape[2] // texts_before
        moved = store.new_empty(
            len(image), store.shape[1], capacity * image.shape[1], store.shape[3]
        )
        rows = store.transpose(1, 2)[image[:, :, None], slots]  # [b,K,S,H,d]
        moved[:, :, : self.length * image.shape[1]] = rows.permute(0, 3, 2, 1, 4).flatten(2, 3)
        return moved

    def keep(self, images: Tensor) -> None:
        """Keep only the images [b] int64, in this order. Used when finished images leave the batch.

        Images that keep their place are not copied.
        """
        filled = self.length * len(self.texts)
        for stores in (self.keys, self.values):
            stores[:] = [move(store, images, filled) for store in stores]
        self.beam_idx = self.beam_idx[images]
        if self.padding is not None:
            self.padding = self.padding[images]


def move(store: Tensor, images: Tensor, filled: int) -> Tensor:
    """Move keys or values [B,H,S,d] of `images` [b] to the front, the first `filled` of S; returns
    a view [b,H,S,d].
    """
    to = (images != torch.arange(len(images), device=images.device)).nonzero()[:, 0]
    store[to, :, :filled] = store[images[to], :, :filled]
    return store[: len(images)]


def additive(sees: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask to add to attention scores: 0 where `sees`, -inf elsewhere."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
        ~sees, float("-inf")
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q [B,H,Q,d], k and v [B,H,S,d], mask broadcasting to
    [B,H,Q,S]; S may be 0.

    On a CPU, plain products replace the fused kernel. For the short sequences of captions and
    regions they are two to three times as fast (0.7 against 1.8 ms for the beams of 100 images over
    49 regions), and four to five times in the backward pass.
    """
    if q.device.type != "cpu" and k.shape[2]:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else mask.to(q.dtype)
        )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention; one product computes queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, layer: int = 0) -> Tensor:
        """Rows x [...,D] to rows [...,D]; `layer` is which of a KVCache's stores to extend."""
        q, k, v = (
            layout.pad(self.qkv(x))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        out = attend(q, *layout.extend(layer, k, v), layout.mask)
        return self.out(layout.unpad(out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Multi-head attention of texts to the regions of their image. Keys and values are computed
    once per image.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B,H,R,d] and contiguous, of encoded regions [B,R,D]."""
        return (
            self.key_value(memory)
            .unflatten(2, (2, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .contiguous()
            .unbind(0)
        )

    def forward(
        self, x: Tensor, layout: Layout, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Rows x [N,D] to rows [N,D]; keys, values [B,H,R,d]; mask [B,1,1,R], -inf for padded
        regions.

        All texts of an image are queries of one product, so keys and values are never repeated.
        """
        q = layout.pad(self.query(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = attend(q, keys, values, mask)
        return self.out(layout.unpad(out.transpose(1, 2).flatten(2)))
