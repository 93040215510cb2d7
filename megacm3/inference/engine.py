"""The decoding loop: requests of any kind in one batch, one pass over all rows a step.

A request has one row (its own stream); inside an image it has further rows for guidance, which are dropped where the
image ends; its own row is never run again. A finished request leaves, and a waiting one takes its place. Shape letters:
R rows, B samples of a group, S streams, V vocabulary, K candidates.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megacm3.errors import ConfigError
from megacm3.inference.decoder import Cache, Decoder
from megacm3.inference.guidance import Guidance, Plain
from megacm3.inference.modality import Cursor, Grammar, Modes, State
from megacm3.inference.prefill import prefill
from megacm3.inference.sampling import Sampling, draw, penalize
from megacm3.tokenizers.vocabulary import IMAGE, TEXT

Guides = Callable[[Sequence[int]], list[list[int]]]
DEFAULT_SAMPLING = Sampling()
NO_GUIDANCE = Plain()


def no_guides(before: Sequence[int]) -> list[list[int]]:
    """For requests without guidance."""
    return []


@dataclass(frozen=True)
class Request:
    """One sample to make."""

    prompt: tuple[int, ...]
    mode: Modes
    seed: int = 0
    """63 bits; with the position and the token id it fixes every random number of the sample."""
    max_tokens: int | None = None
    """Most tokens to draw; None for all that the context holds."""
    image: Sampling = DEFAULT_SAMPLING
    text: Sampling = DEFAULT_SAMPLING
    guidance: Guidance = NO_GUIDANCE
    """Inside images; its streams are this request's own and those that `guides` gives."""
    guides: Guides = no_guides
    """From the ids before an image's first code: the prompts of the other streams."""
    codes: int | None = None
    """Mode IMAGE: how many codes, when not a whole image."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; expected 1 or more")


@dataclass(frozen=True)
class Event:
    """What the loop reports."""

    request: int
    """Number of the request in the order given."""
    kind: str
    """text (one new id), codes (those of the running image so far), image (all its codes) or done."""
    ids: tuple[int, ...] = ()
    reason: str = ""
    """Of done: stop, image or length."""


@dataclass(eq=False)
class _Active:
    number: int
    request: Request
    cursor: Cursor
    slot: int
    """Its row of the history."""
    drawn: int = 0
    """Tokens drawn so far."""
    image_start: int = 0
    """`drawn` where the running image's codes begin."""
    ids: list[int] = field(default_factory=list)
    """Drawn ids, as far as they were read from the device."""


@dataclass
class _Group:
    """Samples that are drawn alike in this step."""

    members: list[_Active]
    state: State
    guidance: Guidance
    sampling: Sampling
    rows_BS: torch.Tensor
    slots_B: torch.Tensor
    drawn_B: torch.Tensor
    seeds_B: torch.Tensor


class Engine:
    """Runs requests on a decoder."""

    def __init__(
        self,
        decoder: Decoder,
        grammar: Grammar,
        context: int,
        *,
        max_rows: int = 64,
        cache_bytes: int | None = None,
        report_every: int | None = None,
    ):
        """`context`: longest sequence; `max_rows` and `cache_bytes` bound what runs at once.

        `cache_bytes` None: 4 GiB on a CPU, half of what is free on a GPU.
        `report_every`: codes between two "codes" events (a grid row's width); None for none.
        """
        self.decoder, self.grammar, self.context = decoder, grammar, context
        self.max_rows, self.report_every = max_rows, report_every
        if cache_bytes is None:
            cuda = decoder.device.type == "cuda"
            cache_bytes = torch.cuda.mem_get_info(decoder.device)[0] // 2 if cuda else 4 << 30
        self.cache_bytes = cache_bytes
        self.image_head = decoder.head_of(grammar.image_ids)
        self.all_ids = torch.arange(decoder.architecture.vocab_size, device=decoder.device)

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Make every request; events come as soon as they are known. Requests are admitted in order."""
        if requests:
            yield from _Run(self, requests).events()

    def room(self, request: Request) -> int:
        """Tokens that the request may draw; below 1 when its prompt fills the context."""
        room = self.context - len(request.prompt)
        if request.mode == Modes.IMAGE:
            # What is reserved in the cache is what one image takes, not the whole context.
            return min(room, request.codes or self.grammar.vocabulary.image_tokens)
        return room if request.max_tokens is None else min(room, request.max_tokens)


class _Run:
    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self.engine, self.decoder, self.grammar = engine, engine.decoder, engine.grammar
        self.waiting = deque(enumerate(requests))
        slots = max(len(request.prompt) + engine.room(request) for request in requests)
        a = self.decoder.architecture
        row_bytes = 2 * a.layers * a.kv_heads * (slots + 1) * a.head_dim * self.decoder.dtype.itemsize
        widest = max(request.guidance.streams for request in requests)
        total = sum(request.guidance.streams for request in requests)
        self.max_rows = max(widest, min(total, engine.max_rows, engine.cache_bytes // row_bytes))
        self.cache: Cache = self.decoder.cache(self.max_rows, slots)
        self.active: list[_Active] = []
        self.rows: list[tuple[_Active, int]] = []  # owner and stream of each cache row
        self.lengths: list[int] = []  # tokens in each cache row
        longest = max(engine.room(request) for request in requests)
        device = self.decoder.device
        self.history = torch.zeros((self.max_rows, longest), dtype=torch.int64, device=device)
        self.free_slots = list(range(self.max_rows))
        self.hidden_RH = torch.empty((0, a.hidden_size), device=device, dtype=self.decoder.dtype)
        self.groups: list[_Group] | None = None  # None: rows or states changed since it was made

    def events(self) -> Iterator[Event]:
        """One turn: let requests in, draw, report, drop what is finished, run the drawn tokens."""
        while self.waiting or self.active:
            self._admit()
            self.tokens_R = torch.zeros(len(self.rows), dtype=torch.int64, device=self.decoder.device)
            if self.groups is None:
                self.groups = self._make_groups()
            opening: list[_Active] = []
            for group, values in self._draw():
                for i, active in enumerate(group.members):
                    yield from self._advance(active, None if values is None else values[i], opening)
            self._drop_rows()
            self.hidden_RH = self.hidden_RH[:0]
            if self.rows:
                self.hidden_RH = self.decoder.forward(self.tokens_R[:, None], self.lengths, self.cache)[:, 0]
                self.lengths = [length + 1 for length in self.lengths]
            self._open_guides(opening)

    def _admit(self) -> None:
        reserved = sum(active.request.guidance.streams for active in self.active)
        new: list[_Active] = []
        while self.waiting and reserved + self.waiting[0][1].guidance.streams <= self.max_rows:
            number, request = self.waiting.popleft()
            reserved += request.guidance.streams
            cursor = self.grammar.begin(request.mode, self.engine.room(request), request.codes, request.prompt[-1])
            new.append(_Active(number, request, cursor, self.free_slots.pop()))
        self.active += new
        # A request that begins inside an image needs its guidance rows at once.
        owners: list[tuple[_Active, int]] = []
        prompts: list[list[int]] = []
        for active in new:
            owners.append((active, 0))
            prompts.append(list(active.request.prompt))
            if active.cursor.state == State.IMAGE:
                self._add_guides(active, owners, prompts)
        self._add_rows(owners, prompts)

    def _open_guides(self, opening: Sequence[_Active]) -> None:
        owners: list[tuple[_Active, int]] = []
        prompts: list[list[int]] = []
        for active in opening:
            self._add_guides(active, owners, prompts)
        self._add_rows(owners, prompts)

    def _add_guides(self, active: _Active, owners: list[tuple[_Active, int]], prompts: list[list[int]]) -> None:
        request = active.request
        if request.guidance.streams == 1:
            return
        before, begun = active.ids[: active.image_start], active.ids[active.image_start :]
        guides = request.guides((*request.prompt, *before))
        assert len(guides) == request.guidance.streams - 1
        for stream, guide in enumerate(guides, 1):
            owners.append((active, stream))
            prompts.append([*guide, *begun])

    def _add_rows(self, owners: list[tuple[_Active, int]], prompts: list[list[int]]) -> None:
        if not owners:
            return
        hidden = prefill(self.decoder, prompts, self.cache, len(self.rows))
        self.hidden_RH = torch.cat((self.hidden_RH, hidden))
        self.rows += owners
        self.lengths += map(len, prompts)
        self.groups = None

    def _make_groups(self) -> list[_Group]:
        where: dict[_Active, list[int]] = {active: [] for active in self.active}
        for row, (active, stream) in sorted(enumerate(self.rows), key=lambda item: item[1][1]):
            assert len(where[active]) == stream
            where[active].append(row)
        kinds: dict[tuple[State, Guidance, Sampling], list[_Active]] = {}
        for active in self.active:
            state, request = active.cursor.allowed, active.request
            inside = state == State.IMAGE
            guidance = request.guidance if inside and len(where[active]) > 1 else Plain()
            kinds.setdefault((state, guidance, request.image if inside else request.text), []).append(active)
        device = self.decoder.device
        return [
            _Group(
                members,
                state,
                guidance,
                sampling,
                torch.tensor([where[active] for active in members], device=device),
                torch.tensor([active.slot for active in members], device=device),
                torch.tensor([active.drawn for active in members], device=device),
                torch.tensor([active.request.seed for active in members], device=device),
            )
            for (state, guidance, sampling), members in kinds.items()
        ]

    @torch.inference_mode()
    def _draw(self) -> list[tuple[_Group, list[int] | None]]:
        """Draw a token for every sample and hand it to all its rows; values only where somebody must know them."""
        assert self.groups is not None
        only_images = all(group.state == State.IMAGE for group in self.groups)
        head, ids = (self.engine.image_head, self.grammar.image_ids) if only_images else (None, self.engine.all_ids)
        logits_RK = self.decoder.logits(self.hidden_RH, head)
        drawn = []
        for group in self.groups:
            if group.state == State.IMAGE:
                ids_K = self.grammar.image_ids
                block_BSK = logits_RK[group.rows_BS]
                block_BSK = block_BSK if only_images else block_BSK[..., ids_K]
            else:
                ids_K = ids
                block_BSK = logits_RK[group.rows_BS].masked_fill(~self.grammar.masks[group.state], float("-inf"))
            scores_BK = group.guidance(block_BSK)
            scores_BK = self._penalize(scores_BK, group)
            picked_B = draw(scores_BK, group.sampling, group.seeds_B, group.drawn_B, ids_K)
            tokens_B = ids_K[picked_B]
            self.tokens_R[group.rows_BS] = tokens_B[:, None]
            self.history[group.slots_B, group.drawn_B] = tokens_B
            group.drawn_B += 1
            drawn.append((group, None if group.state == State.IMAGE else tokens_B.tolist()))
        return drawn

    def _penalize(self, scores_BK: torch.Tensor, group: _Group) -> torch.Tensor:
        penalty = group.sampling.repetition_penalty
        if group.state == State.IMAGE or penalty == 1.0:
            return scores_BK
        kind = self.grammar.vocabulary.kind
        rows = []
        for scores_K, active in zip(scores_BK, group.members, strict=True):
            context = (*active.request.prompt, *active.ids)
            rows.append(penalize(scores_K, [i for i in context if kind[i] == TEXT], penalty))
        return torch.stack(rows)

    def _advance(self, active: _Active, value: int | None, opening: list[_Active]) -> Iterator[Event]:
        cursor, number = active.cursor, active.number
        before, before_allowed = cursor.state, cursor.allowed
        active.drawn += 1
        if value is not None:
            active.ids.append(value)
        cursor.advance(value)
        kind = IMAGE if value is None else self.grammar.vocabulary.kind[value]
        if before != State.IMAGE and cursor.state == State.IMAGE:
            # Behind cm3leon's closing <break> the drawn token is the next image's first code already.
            active.image_start = active.drawn - (kind == IMAGE)
            opening.append(active)
        if kind == IMAGE:
            yield from self._report_codes(active)
        elif kind == TEXT:
            assert value is not None
            yield Event(number, "text", (value,))
        if cursor.done:
            yield Event(number, "done", reason=cursor.done)
        if cursor.done or cursor.state != before or cursor.allowed != before_allowed:
            self.groups = None

    def _report_codes(self, active: _Active) -> Iterator[Event]:
        cursor, every = active.cursor, self.engine.report_every
        count = active.drawn - active.image_start
        if cursor.codes_left == 0:
            self._read_back(active)
            yield Event(active.number, "image", tuple(active.ids[active.image_start :]))
        elif every and count % every == 0:
            self._read_back(active)
            yield Event(active.number, "codes", tuple(active.ids[active.image_start :]))

    def _read_back(self, active: _Active) -> None:
        known = len(active.ids)
        active.ids += self.history[active.slot, known : active.drawn].tolist()

    def _drop_rows(self) -> None:
        """Remove rows of finished requests and of finished images; the last rows fill the holes."""
        for active in [active for active in self.active if active.cursor.done]:
            self.active.remove(active)
            self.free_slots.append(active.slot)
        keep = [
            active.cursor.done is None and (stream == 0 or active.cursor.state == State.IMAGE)
            for active, stream in self.rows
        ]
        order = list(range(len(self.rows)))
        for row in range(len(order) - 1, -1, -1):
            if not keep[order[row]]:
                last = order.pop()
                if row < len(order):
                    self.cache.copy_row(self.cache, len(order), row, self.lengths[last])
                    order[row] = last
        if len(order) < len(self.rows):
            self.tokens_R = self.tokens_R[order]
            self.rows = [self.rows[row] for row in order]
            self.lengths = [self.lengths[row] for row in order]
            self.groups = None
