"""Two LSTM layers with attention to the regions: the recurrent baseline of the field.

The top-down attention LSTM of Anderson et al. 2018. At each word, the first layer reads the word,
the mean of the regions and the state of the second layer; its state gives the weights of the
regions; the second layer reads their weighted sum. A prompt is read by a third LSTM before, whose
last state is a further input of the first layer.

Letters in shapes: B images, R regions, K texts per image, M = B*K texts, T tokens, P prompt tokens,
N rows, D model width, A = D/2 width of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decoders.attention import Packed
from models.decoders.dropout import Dropout
from models.decoders.interface import Decoder, DecoderConfig, size
from models.decoders.layers import RegionInput, check_dropout, initialize_weights, region_mask
from models.regions import Regions


@dataclass(frozen=True)
class LstmOptions:
    """The command-line options of the LSTM."""

    width: int = size(512, "model width D", at_least=2)
    dropout: float = field(default=0.1, metadata={"help": "dropout", "at_least": 0, "below": 1})


@dataclass(frozen=True)
class LstmConfig(LstmOptions, DecoderConfig):
    """The sizes of an LSTM decoder. Raises ModelError if a value is out of bounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)

    def __str__(self) -> str:
        return f"width {self.width}, dropout {self.dropout}"


class LstmMemory(NamedTuple):
    """An encoded batch of images.

    values: [B,R,D], the regions; 0 for padding. keys: [B,R,A], their part of the attention scores.
    mean: [B,4D], the part of the first layer's gates that comes from the mean of the regions.
    mask: [B,1,R], added to the attention scores: -inf for padding; None: no padding.
    """

    values: Tensor
    keys: Tensor
    mean: Tensor
    mask: Tensor | None

    @property
    def images(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for part in self if part is not None)

    def keep(self, images: Tensor, in_place: bool = False) -> LstmMemory:
        mask = None if self.mask is None else self.mask[images]
        return LstmMemory(self.values[images], self.keys[images], self.mean[images], mask)


class State(NamedTuple):
    """The hidden states h and the cells c of the two layers, each [B,K,D]."""

    h1: Tensor
    c1: Tensor
    h2: Tensor
    c2: Tensor


class LstmCache:
    """The state of incremental decoding, for K growing texts per image.

    state: of all texts. question: [B,D], the last state of the prompts' LSTM; None: no prompts.
    texts: K. images: B.
    length: number of tokens per text so far. start: index of the first token of the current call.
    padding [B] int64: number of padding tokens on the left of each prompt.
    """

    def __init__(self, memory: LstmMemory, texts: int, prompts: Tensor | None) -> None:
        """prompts: [B,P] int64, padded on the left with 0; None: no prompts."""
        zeros = memory.mean.new_zeros(memory.images, texts, memory.values.shape[2]).float()
        self.state = State(zeros, zeros, zeros, zeros)
        self.question: Tensor | None = None
        self.texts, self.shape = texts, (texts, 0)
        self.start = self.length = 0
        self.prompt_length = 0 if prompts is None else prompts.shape[1]
        self.padding = zeros.new_zeros(memory.images, dtype=torch.int64)
        if prompts is not None:
            self.padding = (prompts == 0).sum(1).to(memory.device)

    @property
    def images(self) -> int:
        return self.padding.shape[0]

    def begin(self, texts: int, tokens: int) -> None:
        self.shape = texts, tokens
        self.start, self.length = self.length, self.length + tokens

    def positions(self, texts: int) -> Tensor:
        tokens = torch.arange(self.start, self.length, device=self.padding.device)
        positions = (tokens - self.padding[:, None]).clamp(min=0)
        return positions[:, None].expand(-1, texts, -1).flatten()

    def reorder(self, beam_idx: Tensor) -> None:
        index = beam_idx[:, :, None].expand(-1, -1, self.state.h1.shape[2])
        self.state = State(*(part.gather(1, index) for part in self.state))

    def keep(self, images: Tensor) -> None:
        self.state = State(*(part[images] for part in self.state))
        self.padding = self.padding[images]
        if self.question is not None:
            self.question = self.question[images]

    def regroup(self, image: Tensor, text: Tensor) -> None:
        self.state = State(*(part[image, text] for part in self.state))
        self.texts, self.padding = image.shape[1], self.padding[image[:, 0]]
        if self.question is not None:
            self.question = self.question[image[:, 0]]

    def continuation(self, tokens: Tensor, is_token: Tensor) -> Packed:
        return LstmContinuation(tokens, is_token, self)


class LstmContinuation(Packed):
    """The layout of texts that continue the prompts of their images, which an LstmCache has read.

    state, question: as in LstmCache, for the images of these texts.
    """

    def __init__(self, tokens: Tensor, is_token: Tensor, cache: LstmCache) -> None:
        super().__init__(tokens, is_token)
        groups, texts = len(tokens) // cache.images, tokens.shape[1]
        self.state = State(
            *(part.repeat_interleave(groups, 0).expand(-1, texts, -1) for part in cache.state)
        )
        self.question = cache.question
        if cache.question is not None:
            self.question = cache.question.repeat_interleave(groups, 0)


class Lstm(Decoder):
    """Maps regions [B,R,C] and tokens [B,K,T] to logits [B,K,T,V].

    The output layer and the word embedding share one matrix.
    """

    Config, Options = LstmConfig, LstmOptions
    config: LstmConfig

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.region = RegionInput(config.channels, width, config.dropout, config.more_channels)
        self.word = nn.Embedding(config.words, width)
        # the gates of the first layer, by what they are computed from
        self.mean_gates = nn.Linear(width, 4 * width)
        self.word_gates = nn.Linear(width, 4 * width, bias=False)
        self.state_gates = nn.Linear(2 * width, 4 * width, bias=False)
        self.key = nn.Linear(width, width // 2)
        self.query = nn.Linear(width, width // 2, bias=False)
        self.score = nn.Linear(width // 2, 1, bias=False)
        self.language_gates = nn.Linear(3 * width, 4 * width)
        if config.max_prompt:
            self.prompt_gates = nn.Linear(2 * width, 4 * width)
            self.question_gates = nn.Linear(width, 4 * width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.output_bias = nn.Parameter(torch.zeros(config.words))
        initialize_weights(self)
        for gates in (self.mean_gates, self.language_gates):
            # forget gates begin open (Jozefowicz et al. 2015)
            nn.init.ones_(gates.bias.data[width : 2 * width])

    def encode(self, regions: Regions) -> LstmMemory:
        values, (mask, _) = self.region(regions).relu(), region_mask(regions)
        if mask is not None:
            is_region = torch.arange(values.shape[1], device=values.device)
            values = values * (is_region < regions.totals[:, None])[:, :, None]
        mean = values.sum(1) / regions.totals.clamp(min=1)[:, None]
        mask = None if mask is None else mask[:, 0]
        return LstmMemory(values, self.key(values), self.mean_gates(mean), mask)

    def states(
        self, words: Tensor, positions: Tensor, layout: Packed | LstmCache, memory: LstmMemory
    ) -> Tensor:
        if isinstance(layout, Packed):
            return self._states_of_texts(words, layout, memory)
        return self._next_states(words, layout, memory)

    def _states_of_texts(self, words: Tensor, layout: Packed, memory: LstmMemory) -> Tensor:
        """The states [N,D] of whole texts; those of prompts and of padding are not computed."""
        images, texts, (prompt, steps) = memory.images, layout.texts, layout.longest
        count = layout.count
        text = layout.image[:count] * texts + layout.text[:count]
        step = layout.positions[:count] - layout.prompt[:count]
        is_word = step >= 0
        embedded = self._embed(words[:count])
        question = getattr(layout, "question", None)
        if self.config.max_prompt and question is None:
            # One place of padding, if all prompts are empty. All weights then have a gradient,
            # which DistributedDataParallel needs.
            prompt = max(prompt, 1)
        if prompt:
            # rows of words go to a further place after the last prompt token, which is cut off
            place = torch.where(is_word, prompt, layout.positions[:count])
            tokens = embedded.new_zeros(images * texts, prompt + 1, self.config.width)
            is_token = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=text.device)
            tokens, is_token = (
                part.index_put((text, place), values)[:, :prompt]
                for part, values in ((tokens, embedded), (is_token, torch.ones_like(is_word)))
            )
            question = self._read_prompts(tokens, is_token).view(images, texts, -1)
        elif question is not None:
            question = question[:, None]
        gates = self.word_gates(embedded)
        place = torch.where(is_word, step, steps)
        gates_of_step = gates.new_zeros(steps + 1, images * texts, gates.shape[1])
        gates_of_step = gates_of_step.index_put((place, text), gates)
        state = getattr(layout, "state", None) or self._initial_state(memory, texts)
        outputs = []
        for number in range(steps):
            word_gates = gates_of_step[number].view(images, texts, -1)
            state = self._step(word_gates, question, state, memory)
            outputs.append(state.h2.flatten(0, 1))
        outputs.append(torch.zeros_like(state.h2).flatten(0, 1))
        states = self._output(torch.stack(outputs)[place, text])
        return torch.cat([states, states.new_zeros(len(words) - count, states.shape[1])])

    def _next_states(self, words: Tensor, cache: LstmCache, memory: LstmMemory) -> Tensor:
        """The states [B*K*T,D] of the new tokens of a cache."""
        texts, tokens = cache.shape
        embedded = self._embed(words).view(cache.images, texts, tokens, -1)
        prompt = max(0, cache.prompt_length - cache.start)
        if prompt:
            is_token = torch.arange(prompt, device=words.device) >= cache.padding[:, None]
            cache.question = self._read_prompts(embedded[:, 0, :prompt], is_token)
        question = None if cache.question is None else cache.question[:, None]
        state = cache.state
        if texts < cache.texts:
            state = State(*(part[:, :texts] for part in state))
        outputs = [torch.zeros_like(state.h2)] * prompt
        for number in range(prompt, tokens):
            state = self._step(self.word_gates(embedded[:, :, number]), question, state, memory)
            outputs.append(state.h2)
        if texts < cache.texts:
            state = State(*(part.expand(-1, cache.texts, -1) for part in state))
        cache.state = state
        return self._output(torch.stack(outputs, dim=2).flatten(0, 2))

    def _embed(self, words: Tensor) -> Tensor:
        return self.dropout(self.word(words) * self.config.width**0.5)

    def _output(self, h2: Tensor) -> Tensor:
        return self.dropout(self.norm(h2))

    def _initial_state(self, memory: LstmMemory, texts: int) -> State:
        zeros = memory.mean.new_zeros(memory.images, texts, self.config.width).float()
        return State(zeros, zeros, zeros, zeros)

    def _read_prompts(self, embedded: Tensor, is_token: Tensor) -> Tensor:
        """The last states [M,D] of the prompts' LSTM; 0 for an empty prompt.

        embedded: [M,P,D]. is_token: [M,P] bool, False for padding, which does not change the state.
        """
        h = c = embedded.new_zeros(embedded.shape[0], self.config.width).float()
        for number in range(embedded.shape[1]):
            gates = self.prompt_gates(torch.cat([embedded[:, number], h.to(embedded.dtype)], dim=1))
            new_h, new_c = lstm_cell(gates, c)
            there = is_token[:, number, None]
            h, c = torch.where(there, new_h, h), torch.where(there, new_c, c)
        return h

    def _step(
        self, word_gates: Tensor, question: Tensor | None, state: State, memory: LstmMemory
    ) -> State:
        """Read one word of each text.

        word_gates: [B,K,4D], the part of the first layer's gates that comes from the words.
        question: [B,K or 1,D]; None: no prompts.
        """
        gates = word_gates + memory.mean[:, None]
        gates = gates + self.state_gates(torch.cat([state.h2, state.h1], dim=2))
        if question is not None:
            gates = gates + self.question_gates(question)
        h1, c1 = lstm_cell(gates, state.c1)
        energy = (memory.keys[:, None] + self.query(h1)[:, :, None]).tanh()  # [B,K,R,A]
        scores = self.score(energy)[..., 0].float()
        if memory.mask is not None:
            scores = scores + memory.mask
        attended = scores.softmax(dim=2).to(memory.values.dtype) @ memory.values
        gates = self.language_gates(torch.cat([attended, h1, state.h2], dim=2))
        h2, c2 = lstm_cell(gates, state.c2)
        return State(h1, c1, h2, c2)

    def output_layer(self) -> tuple[Tensor, Tensor]:
        return self.word.weight, self.output_bias

    def init_cache(
        self, memory: LstmMemory, texts: int, prompts: Tensor | None = None
    ) -> LstmCache:
        return LstmCache(memory, texts, prompts)


def lstm_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The new h and c, each [...,D] float32, from the four gates [...,4D] and the old c."""
    enter, forget, candidate, leave = gates.float().chunk(4, dim=-1)
    c = forget.sigmoid() * c + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * c.tanh(), c
