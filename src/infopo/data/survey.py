"""Describes tokenized data: lengths, duplicates, tokens saved, special tokens out of place, examples."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
from transformers import PreTrainedTokenizerBase

from infopo.data.endings import Endings
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.data.templates import ChatTemplate, common_pieces
from infopo.data.tokenization import Tokenization
from infopo.errors import DataError, printable
from infopo.output import counted
from infopo.records import Message, PreferenceExample, Spans

QUANTILES = (0, 0.5, 0.9, 0.99, 1)


def length_lines(dataset: ExampleDataset) -> list[str]:
    """Returns quantiles of the numbers of tokens of examples, prompts, chosen and rejected responses."""
    groups: dict[str, list[int]] = {
        "examples": dataset.lengths.tolist(),
        "prompts": [],
        "chosen": [],
        "rejected": [],
    }
    for example in dataset:
        groups["prompts"].append(len(example.prompt_ids))
        groups["chosen"] += map(len, example.chosen_ids)
        groups["rejected"] += map(len, example.rejected_ids)
    lines = ["                       n     min  median    90 %    99 %     max"]
    for name, lengths in groups.items():
        if lengths:
            cells = "".join(f"{int(q):>8}" for q in np.quantile(lengths, QUANTILES, method="inverted_cdf"))
            lines.append(f"tokens of {name:<9}{len(lengths):>5}{cells}")
    return lines


def duplicate_lines(dataset: ExampleDataset) -> list[str]:
    """Returns how many examples and prompts repeat an earlier one, and the first such example."""
    examples, prompts = set[object](), set[object]()
    again, again_prompts, first = 0, 0, ""
    for example in dataset:
        prompt = tuple(example.prompt_ids)
        sides = (tuple(map(tuple, side)) for side in (example.chosen_ids, example.rejected_ids))
        content = (prompt, *sides)
        if content in examples:
            again, first = again + 1, first or example.row_id
        again_prompts += prompt in prompts
        examples.add(content)
        prompts.add(prompt)
    where = f" (first: {first})" if first else ""
    prompts_again = counted(again_prompts, "prompt")
    return [f"duplicates: {counted(again, 'example')}{where}; {prompts_again} of examples before them"]


def saving_lines(dataset: ExampleDataset, batch_size: int) -> list[str]:
    """Returns how many tokens go through the model in batches of `batch_size` examples: padded, unpadded, and shared.

    Padded rows are one per response, as long as the longest of their batch. Shared is each prompt once, without
    padding.
    """
    padded = rows = shared = 0
    for start in range(0, len(dataset), batch_size):
        batch = pack([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        begin = batch.segment_start
        lengths = [
            sum(begin[s + 1] - begin[s] for s in batch.path(response))
            for response in range(batch.num_responses)
        ]
        padded += len(lengths) * max(lengths)
        rows += sum(lengths)
        shared += begin[-1]
    return [
        f"tokens through the model, batches of {batch_size}: {padded} as padded rows; {rows} without padding "
        f"({1 - rows / padded:.0%} saved); {shared} with each prompt once ({1 - shared / padded:.0%} saved)"
    ]


def token_problem_lines(dataset: ExampleDataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns special tokens that are where a model was not trained to see them, with their number and first row.

    If there is no such problem, one line says "none out of place".
    """
    problems = Counter[str]()
    first: dict[str, str] = {}
    ends, written = _ends_of_turns(tokenizer), _written_by_template(tokenizer)
    for example in dataset:
        for problem in set(_token_problems(example, tokenizer, ends, written)):
            problems[problem] += 1
            first.setdefault(problem, example.row_id)
    lines = [
        f"  {counted(n, 'example')}: {problem} (first: {first[problem]})"
        for problem, n in problems.most_common()
    ]
    return ["special tokens: " + ("" if lines else "none out of place"), *lines]


def _ends_of_turns(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Returns the tokens that end a response, longest first: those that the template writes behind a turn, and EOS."""
    ends: set[tuple[int, ...]] = {(tokenizer.eos_token_id,)}
    if tokenizer.chat_template:
        # Nothing is known of a template that takes no plain conversation.
        with suppress(DataError):
            text = ChatTemplate(tokenizer).end_of_turn([], "")
            ends.add(Endings(Tokenization(tokenizer)).ids(text))
    return sorted(ends - {()}, key=len, reverse=True)


def _written_by_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that the template itself writes into a response, around reasoning, content and tool calls."""
    if not tokenizer.chat_template:
        return set()
    template, tokens, written = ChatTemplate(tokenizer), Tokenization(tokenizer), set[int]()
    user: list[Message] = [{"role": "user", "content": "0"}]
    call = {"type": "function", "function": {"name": "0", "arguments": {"0": "0"}}}
    for more in ({}, {"reasoning_content": "0"}, {"tool_calls": [call]}):
        with suppress(DataError):
            prompt = template.render(user, "", add_generation_prompt=True)
            whole = template.render([*user, {"role": "assistant", "content": "0", **more}], "")
            written.update(tokens.bare(whole[common_pieces(prompt, whole) :], ""))
    return written


def _token_problems(
    example: PreferenceExample,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[tuple[int, ...]],
    written: set[int],
) -> Iterator[str]:
    bos, unknown, eos = tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id
    special = set(tokenizer.all_special_ids)
    if bos is not None and bos != eos:
        if list(example.prompt_ids).count(bos) > 1:
            yield "BOS stands more than once in the prompt"
        if any(bos in ids for ids in example.response_ids):
            yield "BOS stands in a response"
    everything = [example.prompt_ids, *example.response_ids]
    if unknown is not None and unknown != eos and any(unknown in ids for ids in everything):
        yield "text that the tokenizer has no tokens for (unknown token)"
    out_of_place = special - {bos, unknown} - (written - {token for end in ends for token in end})
    for ids, spans in zip(example.response_ids, example.spans, strict=True):
        begins, stops = [0, *(stop for _, stop in spans)], [*(begin for begin, _ in spans), len(ids)]
        turns = [list(ids[begin:stop]) for begin, stop in zip(begins, stops, strict=True)]
        last = [next((end for end in ends if tuple(turn[-len(end) :]) == end), turn[-1:]) for turn in turns]
        if any(
            out_of_place.intersection(turn[: len(turn) - len(end)])
            for turn, end in zip(turns, last, strict=True)
        ):
            yield "a special token within a response: its text holds one"
        if last[-1][0] in special and eos not in last[-1]:
            token, stop_token = tokenizer.convert_ids_to_tokens([last[-1][0], eos])
            yield (
                f"responses end with {token}, but the tokenizer's EOS is {stop_token}: generation must stop at the "
                "former"
            )


def report_lines(
    dataset: ExampleDataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterable[str]:
    """Yields the lines of all descriptions above."""
    yield from length_lines(dataset)
    yield from duplicate_lines(dataset)
    yield from saving_lines(dataset, batch_size)
    yield from token_problem_lines(dataset, tokenizer)


def render(example: PreferenceExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns an example as text in three columns: side, number of tokens, and text.

    Each scored token is in ⟦brackets⟧ of its own, so that a wrong boundary or a doubled token shows. Line breaks and
    control characters are written as escapes, because the text is data, and could move a terminal's cursor.
    """
    lines = [("prompt", example.prompt_ids, "".join(_pieces(example.prompt_ids, tokenizer)))]
    sides = [("chosen", ids) for ids in example.chosen_ids] + [
        ("rejected", ids) for ids in example.rejected_ids
    ]
    for (side, ids), spans in zip(sides, example.spans, strict=False):
        lines.append((side, ids, _marked_pieces(ids, spans, tokenizer)))
    return "\n".join(
        [printable(example.row_id), *(f"  {name:<8}  {len(ids):>5}  {text}" for name, ids, text in lines)]
    )


def _marked_pieces(ids: Sequence[int], context: Spans, tokenizer: PreTrainedTokenizerBase) -> str:
    text, at = "", 0
    for begin, end in [*context, (len(ids), len(ids))]:
        text += "".join(f"⟦{piece}⟧" for piece in _pieces(ids[at:begin], tokenizer))
        text += "".join(_pieces(ids[begin:end], tokenizer))
        at = end
    return text


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields the printable text of each token, or of several tokens if they are parts of one character."""
    parts: list[int] = []
    for index, token in enumerate(ids):
        parts.append(token)
        text = tokenizer.decode(parts, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or index == len(ids) - 1:
            yield "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
            parts = []
