"""The records that flow from rows to losses, and the shape vocabulary of the whole package.

Shape names: `tokens` (positions of a packed batch), `segments`, `responses`, `chosen`, `rejected`, `pairs`,
`scored` (tokens that belong to a response). Log-probs are natural logarithms (nats).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from infopo.texts import Message as Message
from infopo.texts import Text as Text


class Role(IntEnum):
    """The role of a response for its prompt."""

    CHOSEN = 0
    REJECTED = 1
    KL = 2
    """Response to another prompt, with which KTO estimates a KL term."""


Per = Literal["pair", "chosen", "rejected", "token", "response"]
"""What a loss term is averaged over: pairs, chosen, rejected, tokens of chosen, or chosen and rejected responses."""

PER: tuple[Per, ...] = get_args(Per)
"""Order of the denominators in tensors that have them all."""


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One row as its author wrote it, whatever the dataset's shape was.

    Attributes:
        prompt: Plain text, or the turns up to and including the last user turn.
        chosen: Responses to prefer, each as plain text or as the turns that follow the prompt.
        rejected: Responses to avoid, in the same form.
        row_id: File and row (`pairs.jsonl:17`), which name it in errors and logs.
        chat_template_kwargs: Variables of the chat template for this row.
        tools: Schemas of the tools that the policy may call, or None.
    """

    prompt: Text
    chosen: list[Text]
    rejected: list[Text]
    row_id: str
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None


Spans = Sequence[tuple[int, int]]
"""Begin and end (exclusive) of spans of tokens, in order."""


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One row in token ids: a prompt with n >= 0 chosen and m >= 0 rejected responses, n + m >= 1.

    A rank that has run short of rows takes the example without any response (`EMPTY_EXAMPLE`).

    Attributes:
        prompt_ids: Token ids of the prompt, at least one, because the last predicts a response's first token.
        chosen_ids: Token ids of each chosen response, at least one token each.
        rejected_ids: Token ids of each rejected response, at least one token each.
        row_id: See `PreferenceRow`.
        reference: log π_ref of each response (nats), chosen first, NaN if it was not computed. None if none was.
        kl_ids: Token ids of responses to other prompts, of role `KL`. Empty if no objective needs them.
        context: For each of `response_ids`, the spans (begin, end) of its tokens that are context and not scored, such
            as answers of tools between turns of the policy. They are within the response, in order, and its last token
            is scored. Empty if every token of every response is scored.

    Example:
        >>> pair = PreferenceExample(prompt_ids=[5], chosen_ids=[[6, 7]], rejected_ids=[[8]], row_id="pairs.jsonl:1")
        >>> pair.response_ids, [role.name for role in pair.roles]
        ([[6, 7], [8]], ['CHOSEN', 'REJECTED'])
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[Sequence[int]]
    rejected_ids: Sequence[Sequence[int]]
    row_id: str
    reference: Sequence[float] | None = None
    kl_ids: Sequence[Sequence[int]] = ()
    context: Sequence[Spans] = ()

    @property
    def response_ids(self) -> list[Sequence[int]]:
        """All responses, chosen first, then rejected, then mismatched: the order of `reference`."""
        return [*self.chosen_ids, *self.rejected_ids, *self.kl_ids]

    @property
    def roles(self) -> list[Role]:
        """`Role` of each of `response_ids`."""
        sides = ((Role.CHOSEN, self.chosen_ids), (Role.REJECTED, self.rejected_ids), (Role.KL, self.kl_ids))
        return [role for role, ids in sides for _ in ids]

    @property
    def spans(self) -> list[Spans]:
        """Context of each of `response_ids`, one entry per response even if there is none."""
        return list(self.context) or [()] * len(self.response_ids)


def cut_response(
    ids: Sequence[int], context: Spans, room: int | None
) -> tuple[Sequence[int], list[tuple[int, int]]]:
    """Returns a response and its context, cut off at the end to `room` tokens. None cuts nothing.

    Context at the very end predicts nothing that is scored, and is left out.

    Example:
        >>> cut_response([5, 6, 7, 8, 9], [(1, 2), (3, 4)], 4)
        ([5, 6, 7], [(1, 2)])
    """
    room = len(ids) if room is None else min(room, len(ids))
    spans = [(begin, min(end, room)) for begin, end in context if begin < room]
    if spans and spans[-1][1] == room:
        room = spans.pop()[0]
    return ids[:room], spans


EMPTY_EXAMPLE = PreferenceExample(prompt_ids=(), chosen_ids=(), rejected_ids=(), row_id="")


@runtime_checkable
class Plan(Protocol):
    """Index tensors that a path of log-probs makes from a batch's layout, on the host and ahead of the model."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, int64, which move with the batch."""
        ...

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Plan":
        """Returns the same plan with these tensors, in the order of `tensors`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value
class Responses:
    """The responses of a batch: what each is, whose it is, and which are compared.

    Attributes:
        role: `Role` of each response.
        example: Index (within the batch) of the example that each response belongs to.
        length: Number of scored tokens of each response.
        chosen: Indices of the chosen responses.
        rejected: Indices of the rejected responses.
        pairs: Every (chosen, rejected) couple of the same example, as indices into the responses.
        reference: log π_ref(y|x) of each response (nats), NaN if it was not computed.
    """

    role: Int[Tensor, " responses"]
    example: Int[Tensor, " responses"]
    length: Int[Tensor, " responses"]
    chosen: Int[Tensor, " chosen"]
    rejected: Int[Tensor, " rejected"]
    pairs: Int[Tensor, "pairs 2"]
    reference: Float[Tensor, " responses"]

    def with_logps(
        self, policy: Float[Tensor, " responses"], reference: Float[Tensor, " responses"] | None = None
    ) -> "ResponseLogps":
        """Returns what a loss sees of these responses.

        Args:
            policy: log π_θ of each response (nats).
            reference: log π_ref of each response (nats), if it is not `self.reference`.
        """
        values = {each.name: getattr(self, each.name) for each in fields(Responses)}
        values["reference"] = (self.reference if reference is None else reference).to(policy.dtype)
        return ResponseLogps(policy=policy, **values)


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch(Responses):
    """Token segments as a forest, in which a response is the path from a root to its leaf.

    Each segment is stored once, after its parent. What several responses share is therefore encoded and scored once:
    the prompt of all, and the common beginning of some of them. The lists stay on the CPU, the tensors move to the
    device. `reference` contains the stored values of the examples.

    Attributes:
        input_ids: Tokens of all segments, one after the other.
        position_ids: Position of each token on its path. A child continues the positions of its parent.
        segment_start: First token of each segment, and the number of tokens at the end.
        segment_parent: Parent of each segment, -1 for a root. A parent comes before its children.
        segment_scored: Whether the policy wrote the segment, which otherwise is prompt, or context within a response.
        leaf: Segment with which each response ends.
        counts: Number of pairs, chosen responses, rejected responses, tokens of chosen responses, and of chosen and
            rejected responses together (order: `PER`).
        row_ids: Name of each example's row.
        roles: The entries of `role`, on the host.
        owners: The entries of `example`, on the host.
        plan: What the path of log-probs has prepared (see `PreferenceCollator`), or None.
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    segment_start: list[int]
    segment_parent: list[int]
    segment_scored: list[bool]
    leaf: list[int]
    counts: Int[Tensor, " denominators"]
    row_ids: tuple[str, ...]
    roles: list[int]
    owners: list[int]
    plan: Plan | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.row_ids)

    @property
    def num_responses(self) -> int:
        return len(self.leaf)

    def path(self, response: int) -> list[int]:
        """Returns the segments from the root to the response's leaf."""
        segment, path = self.leaf[response], []
        while segment != -1:
            path.append(segment)
            segment = self.segment_parent[segment]
        return path[::-1]

    def row_tokens(self) -> int:
        """Returns the number of tokens of all responses with their prompts, as rows."""
        start = self.segment_start
        return sum(start[s + 1] - start[s] for r in range(self.num_responses) for s in self.path(r))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedBatch":
        """Returns the same batch with its tensors on `device`. The lists that describe the layout stay on the CPU.

        A GPU gets them in one copy, for which the host does not wait, whatever `non_blocking` is.
        """
        names = [name for name in self.__dataclass_fields__ if isinstance(getattr(self, name), Tensor)]
        plan = self.plan.tensors if self.plan is not None else ()
        moved = to_device([*(getattr(self, name) for name in names), *plan], device)
        changed: dict[str, Any] = dict(zip(names, moved, strict=False))
        if self.plan is not None:
            changed["plan"] = self.plan.with_tensors(moved[len(names) :])
        return replace(self, **changed)

    def pin_memory(self) -> "PackedBatch":
        """Returns the batch itself, because `to` copies it to page-locked memory on its way to a GPU."""
        return self


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Moves int64 and float64 tensors to a device, to a GPU in one copy for which the host does not wait.

    A device without float64 gets float32 (see `sum_dtype`).
    """
    if torch.device(device).type != "cuda" or not tensors or tensors[0].is_cuda:
        return [t.to(device, sum_dtype(device) if t.is_floating_point() else None) for t in tensors]
    # Both types have eight bytes an element, so that one buffer holds them.
    sizes = [t.numel() for t in tensors]
    flat = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    torch.cat([t.reshape(-1).view(torch.int64) for t in tensors], out=flat)
    parts = flat.to(device, non_blocking=True).split(sizes)
    return [part.view(t.dtype).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class ResponseLogps(Responses):
    """The part of a batch that a loss sees: responses and their log-probs.

    Attributes:
        policy: log π_θ(y|x), summed over the response's tokens (nats), with its gradient.
        statistic: The number of the whole optimizer step that the objective's catalog row names (nats, without
            gradient). If it is None, this batch is the whole step, and the objective computes the number from it.
        agreement: Mean over tokens of log π_θ(y_t) - log Σ_v π_θ(v)² of each response (nats, without gradient), for an
            objective whose declaration asks for it, else None.

    Example:
        >>> logps = ResponseLogps.pair((-3.0, -5.0), reference=(-4.0, -4.0))
        >>> logps.policy - logps.reference
        tensor([ 1., -1.], dtype=torch.float64)
    """

    policy: Float[Tensor, " responses"]
    statistic: Float[Tensor, "..."] | None = None
    agreement: Float[Tensor, " responses"] | None = None

    @classmethod
    def of(
        cls,
        policy: Float[Tensor, " responses"],
        reference: Float[Tensor, " responses"],
        length: Int[Tensor, " responses"],
        role: Int[Tensor, " responses"],
        example: Int[Tensor, " responses"],
    ) -> "ResponseLogps":
        """Derives the index tensors from roles and examples. For tests and notebooks: it synchronises with the GPU."""
        indices = response_indices(role.tolist(), example.tolist())
        chosen, rejected, pairs = (t.to(policy.device) for t in indices)
        return cls(role, example, length, chosen, rejected, pairs, reference, policy)

    @classmethod
    def pair(
        cls,
        policy: tuple[float, float],
        reference: tuple[float, float] = (math.nan, math.nan),
        length: tuple[int, int] = (1, 1),
    ) -> "ResponseLogps":
        """Makes a chosen and a rejected response of one prompt, in this order, for examples and notebooks.

        Args:
            policy: log π_θ of the two responses (nats).
            reference: log π_ref of the two responses (nats).
            length: Their numbers of tokens.

        Example:
            >>> ResponseLogps.pair((-3.0, -5.0)).pairs
            tensor([[0, 1]])
        """
        return cls.of(
            torch.tensor(policy, dtype=torch.float64),
            torch.tensor(reference, dtype=torch.float64),
            torch.tensor(length),
            role=torch.tensor([Role.CHOSEN, Role.REJECTED]),
            example=torch.tensor([0, 0]),
        )

    def margins(self, scores: Float[Tensor, " responses"]) -> Float[Tensor, " pairs"]:
        """Returns score(w) - score(l) of every pair.

        Example:
            >>> logps = ResponseLogps.pair((-3.0, -5.0))
            >>> logps.margins(logps.policy)
            tensor([2.], dtype=torch.float64)
        """
        return scores[self.pairs[:, 0]] - scores[self.pairs[:, 1]]


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Returns the type in which log-probs are summed: float64, except on devices that lack it (Apple's MPS).

    Example:
        >>> sum_dtype("cpu"), sum_dtype("mps")
        (torch.float64, torch.float32)
    """
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def response_indices(role: Sequence[int], example: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the indices of chosen responses, of rejected responses, and of all chosen-rejected pairs of one example.

    Returns:
        chosen (chosen,), rejected (rejected,) and pairs (pairs, 2), int64, on the CPU.

    Example:
        >>> chosen, rejected, pairs = response_indices([0, 1, 1], example=[0, 0, 0])
        >>> pairs.tolist()
        [[0, 1], [0, 2]]
    """
    chosen = [i for i, r in enumerate(role) if r == Role.CHOSEN]
    rejected = [i for i, r in enumerate(role) if r == Role.REJECTED]
    rejected_of: dict[int, list[int]] = {}
    for i in rejected:
        rejected_of.setdefault(example[i], []).append(i)
    pairs = [(c, r) for c in chosen for r in rejected_of.get(example[c], [])]
    return (
        torch.tensor(chosen, dtype=torch.int64),
        torch.tensor(rejected, dtype=torch.int64),
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
    )


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value
class LossTerm:
    """One summand of a loss: values to add up, and the count that their sum is divided by.

    The loss of an optimizer step is Σ_terms Σ values / count, where count is the number of `per` in the *whole* step,
    over all micro-batches and ranks. The split into micro-batches therefore changes nothing.

    Attributes:
        values: One value per pair, per chosen or per rejected response. With `per="token"` there is one value per
            chosen response, summed over its tokens. With `per="response"`, chosen responses come first, then rejected
            ones.
        per: The denominator.
        name: What the term is about, e.g. `chosen` or `rejected`, for readers of the terms. Nothing computes with it.

    Example:
        >>> logps = ResponseLogps.pair((-3.0, -5.0))
        >>> LossTerm(-logps.policy[logps.chosen], per="chosen").values
        tensor([3.], dtype=torch.float64)
    """

    values: Float[Tensor, " items"]
    per: Per
    name: str = "loss"


LossTerms = list[LossTerm]
"""The summands of a loss."""
