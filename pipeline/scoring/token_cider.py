"""CIDEr of sampled token ids: the reward of self-critical training, computed where the samples are.

The same number as `pipeline.scoring.metrics.cider` (pycocoevalcap's CIDEr, that is CIDEr-D), over the same tables. On a CPU the
samples' words are picked out and compared as a scorer does; on other devices all shapes are fixed and nothing is copied
back. Letters: B images, K samples an image, T tokens, N = 4 n-gram lengths, R references, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from data.vocabulary import EOS, PAD, Vocabulary
from pipeline.scoring.metrics import SIGMA, cider_of_matches
from pipeline.scoring.ngrams import MASK, MISSING, ORDERS, Matches, References, Words


class TokenCider:
    """References counted once for samples made of a vocabulary's ids.

    references: tokens of the captions by image id. Words outside `vocabulary` keep ids of their own, after its: as
        <unk> they would match a sampled <unk>, and change the document frequencies.
    eos: the end counts as a word, of references and of samples that end; it keeps samples from stopping short.
    frequencies: tokens by image id that document frequencies are taken from; None: the references themselves.
    """

    def __init__(
        self,
        references: Mapping[int, Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        eos: bool = False,
        frequencies: Mapping[int, Sequence[Sequence[str]]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        end = (vocabulary.words[EOS],) if eos else ()
        groups = [
            {image_id: [(*words, *end) for words in captions] for image_id, captions in (given or {}).items()}
            for given in (references, frequencies)
        ]
        self.references = References(groups[0], vocabulary.words, groups[1] if frequencies is not None else None)
        self.eos, self.device = eos, torch.device(device)
        self.tables = None if self.device.type == "cpu" else DeviceTables(self.references, self.device)

    def rows(self, image_ids: Sequence[int]) -> Tensor:
        """Where images stand in the tables: [B] int64, on the device; DataError for an image without references."""
        found = torch.tensor([self.references.row_of(image_id) for image_id in image_ids])
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found.to(self.device)

    @torch.no_grad()
    def __call__(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """CIDEr [B,K] float32 of `tokens` [B,K,T] int64, each read up to its first <eos> or <pad>.

        rows: [B] from `rows`. Samples hold the vocabulary's ids without a leading <bos>.
        """
        if self.tables is not None:
            return self.tables.cider(rows, tokens, self.eos)
        each = np.repeat(rows.numpy(), tokens.shape[1])
        found = cider_of_matches(each, self.compare(each, tokens), self.references)
        return torch.from_numpy(found.astype(np.float32)).view(tokens.shape[:2])

    def compare(self, each: np.ndarray, tokens: Tensor) -> Matches:
        """Hold samples [B,K,T], on the CPU, against the references of the images at rows `each` [B*K]."""
        ids = tokens.numpy().reshape(-1, tokens.shape[2])
        ended = (ids == EOS) | (ids == PAD)
        lengths = np.where(ended.any(1), ended.argmax(1), ids.shape[1])
        if self.eos:
            lengths += ids[np.arange(len(ids)), np.minimum(lengths, ids.shape[1] - 1)] == EOS
        numbers = ids[np.arange(ids.shape[1]) < lengths[:, None]]
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(numbers))
        words = Words(numbers, np.repeat(np.arange(len(lengths)), lengths), left, lengths, numbers, lengths)
        return self.references.compare(each, words)


class DeviceTables:
    """The references' tables on a device, and CIDEr from them in fixed shapes."""

    def __init__(self, references: References, device: torch.device) -> None:
        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        ends, counts = references.ends, references.entry_counts
        most = max(1, int(np.diff(ends).max()))  # E, of the image that has most
        self.words, self.last = references.words, len(references.idf) - 1
        # `most` more, so that as many from any image on are there
        self.names = put(np.append(references.entries & MASK, np.full(most, self.last)))
        self.counts = put(np.concatenate([counts, np.zeros((most, counts.shape[1]), counts.dtype)]))
        self.window = torch.arange(most, device=device)
        self.begin, self.end = put(ends[:-1, None]), put(ends[1:, None])
        self.keys, self.idf = put(np.append(references.keys, MISSING)), put(references.idf.astype(np.float32))
        self.norms = put(references.norms.astype(np.float32))
        self.pairs, self.k = put(np.maximum(references.lengths - 1, 0)), put(references.k[:, None])

    def cider(self, rows: Tensor, tokens: Tensor, eos: bool) -> Tensor:
        b, k, t = tokens.shape
        going = ((tokens != EOS) & (tokens != PAD)).cumprod(2)
        words = going.sum(2, keepdim=True)
        if eos:  # the first <eos> counts, unless a <pad> stands before it
            words = words + ((tokens == EOS) & (torch.nn.functional.pad(going, (1, -1), value=1) > 0)).sum(2, keepdim=True)
        left = words - torch.arange(t, device=tokens.device)  # [B,K,T] words from here to the end
        names, tf = self._name(tokens, left)
        there = left[:, :, None] > torch.arange(ORDERS, device=tokens.device)[:, None]
        idf = self.idf[names]
        weight = tf * idf
        norm = (weight * idf * there).sum(3).sqrt()[..., None] * self.norms[rows][:, None]  # each place has 1/tf of (tf idf)^2
        theirs = self._counts_of(rows, names.view(b, -1)).view(b, k, ORDERS, t, -1) * idf[..., None]
        dot = (torch.minimum(weight[..., None], theirs) * theirs * (there / tf)[..., None]).sum(3)  # [B,K,N,R]
        cosine = (dot / norm.where(norm > 0, 1)).mean(2)
        apart = (words - 1).clamp(min=0) - self.pairs[rows][:, None]
        return (cosine * torch.exp(-(apart**2) / (2 * SIGMA**2))).sum(2) / self.k[rows] * 10

    def _name(self, tokens: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Names [B,K,N,T] of the n-grams that begin at each place, and how often each stands in its sample (at least 1)."""
        names, tf = [tokens], []
        same = torch.ones((), dtype=torch.bool, device=tokens.device)
        for n in range(ORDERS):
            word = tokens.roll(-n, 2)  # what comes round is beyond the end
            if n:
                key = names[-1] << 32 | word
                place = torch.searchsorted(self.keys, key)
                names.append(torch.where(self.keys[place] == key, place + self.words, self.last))
            same = same & (word[..., None] == word[..., None, :])
            tf.append((same & (left > n)[..., None, :]).sum(3).clamp(min=1))
        return torch.stack(names, 2), torch.stack(tf, 2)

    def _counts_of(self, rows: Tensor, names: Tensor) -> Tensor:
        """How often each of `names` [B,M] stands in each reference of its image: [B,M,R]."""
        begin = self.begin[rows]
        at = begin + self.window
        listed = self.names[at].where(at < self.end[rows], self.last)  # sorted: after an image's own, the last name
        place = torch.searchsorted(listed, names).clamp(max=len(self.window) - 1)
        known = (listed.gather(1, place) == names) & (names < self.last)
        return self.counts[begin + place] * known[..., None]
