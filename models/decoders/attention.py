"""Multi-head attention, and the four data layouts that it supports.

Linear layers run on rows without padding, one row per token. Attention runs on padded sequences. A
`Layout` converts between rows and sequences, and holds the attention mask:

    Layout    regions of images; the rows are already padded sequences
    Packed    whole texts, for training and scoring
    Selected  some tokens of a Packed: the only ones whose final states are used
    KVCache   texts that grow token by token, for generation

Letters in shapes: B images, K texts per image, T tokens, P prompt tokens, R regions, N rows,
Q queries, S keys, D model width, H heads, d = D/H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layout:
    """The layout of rows that are already padded sequences, such as regions [B,R,D].

    mask: broadcasts to [B,H,Q,S] and is added to the attention scores. It is 0 where the query
        attends to the key and -inf elsewhere. None: each query attends to all keys.
    """

    mask: Tensor | None

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def pad(self, rows: Tensor) -> Tensor:
        """Convert rows to padded sequences [B,Q,D]."""
        return rows

    def unpad(self, sequences: Tensor) -> Tensor:
        """Convert padded sequences [B,Q,D] to rows."""
        return sequences

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [B,H,Q,d] of new tokens of a decoder layer.

        Returns all keys and values [B,H,S,d] that the queries of this layer attend to.
        """
        return keys, values


class Packed(Layout):
    """The layout of whole texts: one row per token, without padding inside the texts.

    All texts of an image share one padded sequence of Q slots. A token attends to itself and to
    the preceding tokens of the same text. All tokens of a text attend to its whole prompt (prefix
    language model, Raffel et al. 2020).

    words [N] int64: the tokens, text after text.
    positions [N] int64: the position of each token in its text.
    replaceable [N] bool: words that noise may replace; False for the prompt and the first token
        after it.
    slot [N] int64: the index of each row among the B*Q slots of the padded sequences.
    image [N] int64: the image of each row. text [N] int64: its text among the K texts of its image.
    prompt [N] int64: the number of prompt tokens of its text.
    count: the number of rows that are tokens. Rows after `count` are padding.
    texts: K. longest: the largest numbers of tokens of a prompt, and of a text after its prompt.
    selected: the rows whose final states are used; None: all.

    N is a multiple of ROWS and Q is a multiple of SLOTS, because a CPU's matrix library compiles
    and caches a kernel for each new shape.
    """

    ROWS, SLOTS = 64, 8
    mask: Tensor
    selected: Selected | None = None

    def __init__(
        self, tokens: Tensor, is_token: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> None:
        """
        tokens: [B,K,T] int64.
        is_token: [B,K,T] bool, False for padding; None: no padding.
        prompt_lengths: [B,K] int64, tokens of each prompt; None: no prompts.
        """
        images = tokens.shape[0]
        is_token = torch.ones_like(tokens, dtype=torch.bool) if is_token is None else is_token
        self.image, self.text, self.positions = is_token.nonzero(as_tuple=True)
        self.texts = tokens.shape[1]
        self.words = tokens[is_token]
        tokens_per_image = is_token.sum((1, 2))
        longest, self.count = int(tokens_per_image.max()), len(self.words)
        self.full = self.count == images * longest
        self.shape = images, longest if self.full else _round_up(longest, self.SLOTS)
        first_row = tokens_per_image.cumsum(0) - tokens_per_image
        rows = torch.arange(self.count, device=tokens.device)
        self.slot = self.image * self.shape[1] + rows - first_row[self.image]
        self.prompt = (
            torch.zeros_like(self.words)
            if prompt_lengths is None
            else prompt_lengths[self.image, self.text]
        )
        self.replaceable = self.positions > self.prompt
        last = is_token.sum(2) - (0 if prompt_lengths is None else prompt_lengths)
        self.longest = 0 if prompt_lengths is None else int(prompt_lengths.max()), int(last.max())

        def pad_with_minus_one(values: Tensor) -> Tensor:
            padded = values.new_full((images * self.shape[1],), -1)
            return padded.index_copy(0, self.slot, values).view(self.shape)

        text_id, position = pad_with_minus_one(self.text), pad_with_minus_one(self.positions)
        visible = position[:, :, None] >= position[:, None, :]
        if prompt_lengths is not None:
            visible |= (position < pad_with_minus_one(self.prompt))[:, None, :]
        # Padding attends to padding: a mask row of -inf alone would give NaN.
        visible &= text_id[:, :, None] == text_id[:, None, :]
        super().__init__(additive_mask(visible)[:, None])
        if not self.full:
            self._add_padding_rows()

    def _add_padding_rows(self) -> None:
        """Add rows of token 0 in free slots, until the number of rows is a multiple of ROWS."""
        slots = self.shape[0] * self.shape[1]
        is_free = torch.ones(slots, dtype=torch.bool, device=self.slot.device)
        is_free[self.slot] = False
        free_slots = is_free.nonzero()[: -self.count % self.ROWS, 0]
        self.slot = torch.cat([self.slot, free_slots])
        for name in ("words", "positions", "replaceable", "image", "text", "prompt"):
            setattr(self, name, F.pad(getattr(self, name), (0, len(free_slots))))

    def select(self, rows: Tensor) -> None:
        """Use only the final states of `rows` [B,Q'] int64, the rows of Q' tokens of each image."""
        images = torch.arange(len(rows), device=rows.device)[:, None]
        mask = self.mask[images, 0, self.slot[rows] % self.shape[1]]
        self.selected = Selected(rows, mask[:, None])

    def to(self, device: torch.device) -> Packed:
        """Move all tensors to a device, in place."""
        if self.selected is not None:
            self.selected.rows = self.selected.rows.to(device, non_blocking=True)
            self.selected.mask = self.selected.mask.to(device, non_blocking=True)
        names = ("words", "positions", "replaceable", "image", "text", "prompt", "slot", "mask")
        for name in names:
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self

    def pad(self, rows: Tensor) -> Tensor:
        if not self.full:
            rows = _Pad.apply(rows, self.slot, self.shape[0] * self.shape[1])
        return rows.unflatten(0, self.shape)

    def unpad(self, sequences: Tensor) -> Tensor:
        flat = sequences.flatten(0, 1)
        return flat if self.full else _Unpad.apply(flat, self.slot)


class Selected(Layout):
    """The layout of the selected tokens of each image, [B,Q',D].

    rows [B,Q'] int64: the rows of the tokens in their Packed.
    mask [B,1,Q',Q]: the mask of these tokens as queries, with all tokens as keys.
    """

    mask: Tensor

    def __init__(self, rows: Tensor, mask: Tensor) -> None:
        super().__init__(mask)
        self.rows = rows


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Pad(torch.autograd.Function):
    """Scatter rows [N,D] to slots [B*Q,D], zeros elsewhere.

    Each slot holds at most one row, so the gradient of `_Pad` is `_Unpad`, and vice versa. torch's
    gradient of a gather allows repeated indices, so it adds row by row and is slower.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, slot: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(slot)
        return rows.new_zeros(slots, rows.shape[1]).index_copy_(0, slot, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """Gather rows [N,D] from slots [B*Q,D]."""

    @staticmethod
    def forward(ctx, flat: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.slots = flat.shape[0]
        return flat.index_select(0, slot)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        zeros = gradient.new_zeros(ctx.slots, gradient.shape[1])
        return zeros.index_copy_(0, ctx.saved_tensors[0], gradient), None


class KVCache(Layout):
    """The layout of growing texts, with cached keys and values [B,H,S*K,d] of each decoder layer.

    The cache is preallocated for S tokens per text. In beam search, a text may continue the history
    of another text. The cached keys do not move: the key of token s of text k stays in slot
    s*K + k. beam_idx[b,k,s] is the text that wrote token s in the history of text k. A reorder
    copies only `beam_idx`. The mask lets each query attend to the slots of its own history.

    length: number of tokens per text so far.
    start: index of the first token of the current call.
    padding [B] int64: number of padding tokens on the left of each prompt; None: no padding.
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
        """
        layers: number of decoder layers.
        texts: K, texts per image.
        capacity: maximum number of tokens per text, after the prompt.
        like: [B,H,R,d] keys that set the number of images and heads, d, the dtype and the device.
        prompts: [B,P] int64, padded on the left with `pad`; None: no prompts.
        """
        super().__init__()
        images, heads, _, head_width = like.shape
        self.prompt_length = 0 if prompts is None else prompts.shape[1]
        capacity += self.prompt_length
        shape = images, heads, capacity * texts, head_width
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
        """Reserve `tokens` new tokens in each of `texts` texts, and compute the mask.

        The first call may have texts = 1, for a beginning that all K texts share. Only the first
        call may have tokens > 1: the prompt and the first token after it. In all later calls texts
        is K and tokens is 1.
        """
        self.start, self.length = self.length, self.length + tokens
        self.rows_per_image = texts * tokens
        text_ids = self.texts[:texts]
        self.beam_idx[:, :, self.start : self.length] = text_ids[:, None]
        if texts == 1 and tokens == 1 and self.padding is None:
            self.mask = None
            return
        visible = self.beam_idx[:, :texts, None, : self.length, None] == text_ids  # [B,K,1,S,K]
        if tokens > 1 or self.padding is not None:
            visible = visible & self._visible_tokens()[:, None, :, :, None]
        mask = additive_mask(visible, self.keys[0].dtype if self.keys else torch.float32)
        self.mask = mask.view(self.images, 1, texts * tokens, self.length * texts)

    def _visible_tokens(self) -> Tensor:
        """The tokens of the history that each new token attends to: [B or 1, T, S] bool."""
        key = torch.arange(self.length, device=self.texts.device)
        query = key[self.start :, None]
        visible = ((key <= query) | (key < self.prompt_length))[None]
        if self.padding is not None:
            # Padding attends to itself: a mask row of -inf alone would give NaN.
            visible = visible & (key >= self.padding[:, None, None]) | (key == query)
        return visible

    def positions(self, texts: int) -> Tensor:
        """The position of each new token in its text: [B*K*T] int64."""
        positions = torch.arange(self.start, self.length, device=self.texts.device)
        positions = positions.expand(self.images, texts, -1)
        if self.padding is not None:
            positions = (positions - self.padding[:, None, None]).clamp(min=0)
        return positions.flatten()

    @property
    def image(self) -> Tensor:
        """The image of each row: [B*K*T] int64, for the texts and tokens of the last `begin`."""
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
        for store, new_values in ((self.keys[layer], keys), (self.values[layer], values)):
            slots = store.unflatten(2, (-1, all_texts))[:, :, self.start : self.length]
            slots[:, :, :, :texts] = new_values.unflatten(2, (texts, -1)).transpose(2, 3)
            # The mask hides these slots. They must still be finite: 0 * NaN would be NaN.
            slots[:, :, :, texts:] = 0
        if texts < all_texts:
            return keys, values
        end = self.length * all_texts
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reorder(self, beam_idx: Tensor) -> None:
        """Reorder the texts of each image: text k continues the history of text beam_idx[b,k].

        beam_idx: [B,K] int64, indices of texts of the same image.
        """
        self.beam_idx = self.beam_idx.gather(1, beam_idx[:, :, None].expand_as(self.beam_idx))

    def regroup(self, image: Tensor, text: Tensor) -> None:
        """Replace all texts: the new text (b, k) continues the old text (image[b,k], text[b,k]).

        image, text: [b,K] int64. All entries of one row of `image` are equal.
        """
        texts, tokens = len(self.texts), torch.arange(self.length, device=self.texts.device)
        slots = tokens * texts + self.beam_idx[image, text, : self.length]  # [b,K,S]
        self.texts = self.texts[: image.shape[1]]
        for stores in (self.keys, self.values):
            stores[:] = [self._copy_slots(store, image, slots, texts) for store in stores]
        if self.padding is not None:
            self.padding = self.padding[image[:, 0]]
        capacity = self.beam_idx.shape[2]
        self.beam_idx = self.texts[None, :, None].repeat(len(image), 1, capacity)

    def _copy_slots(self, store: Tensor, image: Tensor, slots: Tensor, old_texts: int) -> Tensor:
        """Copy the slots [b,K,S] of images [b,K] to a new store with K texts per image."""
        texts, capacity = image.shape[1], store.shape[2] // old_texts
        new_store = store.new_empty(len(image), store.shape[1], capacity * texts, store.shape[3])
        history = store.transpose(1, 2)[image[:, :, None], slots]  # [b,K,S,H,d]
        new_store[:, :, : self.length * texts] = history.permute(0, 3, 2, 1, 4).flatten(2, 3)
        return new_store

    def keep(self, images: Tensor) -> None:
        """Keep only `images` [b] int64, in this order.

        An image that keeps its index is not copied. To copy few images, fill the free indices with
        images from the end of the batch.
        """
        filled = self.length * len(self.texts)
        for stores in (self.keys, self.values):
            stores[:] = [move_to_front(store, images, filled) for store in stores]
        self.beam_idx = self.beam_idx[images]
        if self.padding is not None:
            self.padding = self.padding[images]

    def continuation(self, tokens: Tensor, is_token: Tensor) -> Packed:
        """The layout of texts that continue the prompts: tokens [B,K,T] int64.

        This cache has one text per image, whose prompt and first token it has read. With G groups
        of K texts per image, B is G times the number of images.
        is_token: [B,K,T] bool, False for padding.
        """
        return Continuation(tokens, is_token, self)


class Continuation(Packed):
    """The layout of texts that continue the prompt of their image, which a KVCache holds.

    A token attends to the prompt, to itself and to the preceding tokens of its text.
    """

    def __init__(self, tokens: Tensor, is_token: Tensor, cache: KVCache) -> None:
        super().__init__(tokens, is_token)
        self.cache, self.groups = cache, len(tokens) // cache.images
        read = torch.arange(cache.length, device=tokens.device)
        padding = (
            torch.zeros(cache.images, dtype=torch.int64, device=tokens.device)
            if cache.padding is None
            else cache.padding
        ).repeat_interleave(self.groups)
        visible = additive_mask(read >= padding[:, None])[:, None, None]
        self.mask = torch.cat([visible.expand(-1, -1, self.shape[1], -1), self.mask], dim=3)
        self.positions = self.positions + (cache.length - padding)[self.image]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._after_prompt(self.cache.keys[layer], keys),
            self._after_prompt(self.cache.values[layer], values),
        )

    def _after_prompt(self, prompt: Tensor, new: Tensor) -> Tensor:
        prompt = prompt[:, :, : self.cache.length]
        return torch.cat([prompt.repeat_interleave(self.groups, dim=0), new], dim=2)


def move_to_front(store: Tensor, images: Tensor, filled: int) -> Tensor:
    """Move the keys or values of `images` [b] to the front of `store` [B,H,S,d], in place.

    Only the first `filled` of the S slots are copied. Returns a view [b,H,S,d].
    """
    moved = (images != torch.arange(len(images), device=images.device)).nonzero()[:, 0]
    store[moved, :, :filled] = store[images[moved], :, :filled]
    return store[: len(images)]


def additive_mask(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask to add to attention scores: 0 where `visible`, -inf elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: softmax(q k^T / sqrt(d) + mask) v.

    q: [B,H,Q,d]. k, v: [B,H,S,d]; S may be 0. mask: broadcasts to [B,H,Q,S]. Returns [B,H,Q,d].

    On a CPU this uses plain matrix products instead of the fused kernel. For the short sequences of
    captions and regions, they are two to three times as fast (0.7 against 1.8 ms for the beams of
    100 images over 49 regions), and four to five times as fast in the backward pass.
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
    """Self-attention; one matrix product computes queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, layout: Layout, layer: int = 0, selected: Selected | None = None
    ) -> Tensor:
        """Map rows x [...,D] to rows [...,D].

        layer: index of the decoder layer, to select its keys and values in a KVCache.
        selected: compute only these tokens, [B,Q',D].
        """
        if selected is not None:
            return self._selected(x, layout, layer, selected)
        q, k, v = (
            layout.pad(self.qkv(x))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        out = attend(q, *layout.extend(layer, k, v), layout.mask)
        return self.out(layout.unpad(out.transpose(1, 2).flatten(2)))

    def _selected(self, x: Tensor, layout: Layout, layer: int, selected: Selected) -> Tensor:
        width = x.shape[-1]
        weights, biases = (part.split((width, 2 * width)) for part in self.qkv.parameters())
        q = F.linear(x[selected.rows], weights[0], biases[0]).unflatten(2, (self.heads, -1))
        k, v = self._heads(layout.pad(F.linear(x, weights[1], biases[1])))
        out = attend(q.transpose(1, 2), *layout.extend(layer, k, v), selected.mask)
        return self.out(out.transpose(1, 2).flatten(2))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute only the keys and values, each [B,H,R,d], of sequences [B,R,D]."""
        weight, bias = self.qkv.weight[x.shape[-1] :], self.qkv.bias[x.shape[-1] :]
        return self._heads(F.linear(x, weight, bias))

    def _heads(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Split keys and values [B,S,2*D] into heads: two tensors [B,H,S,d]."""
        keys, values = keys_values.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values


class CrossAttention(nn.Module):
    """Attention from texts to the regions of their image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values, each [B,H,R,d], of encoded regions [B,R,D].

        They are computed once per image, and made contiguous for the products of all later steps.
        """
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
        """Map rows x [N,D] to rows [N,D].

        keys, values: [B,H,R,d]. mask: [B,1,1,R], -inf for padded regions; None: no padding.

        All texts of an image form one sequence of queries, so keys and values are not repeated.
        """
        q = layout.pad(self.query(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = attend(q, keys, values, mask)
        return self.out(layout.unpad(out.transpose(1, 2).flatten(2)))
