"""From text to tokens: prompts and examples in the tokenizer's chat template.

An example is the whole conversation as token ids and the position where its labels start: the
tokens of the prompt have no label, all tokens of the answer do, the closing end-of-turn token
included. Where the prompt's tokens are the first of the whole text, as with chat templates, the
rule is the reference evaluator's (locuslab/open-unlearning), so that losses and probabilities can
be compared with published ones. Nothing is padded, batched or truncated here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t3jax.data.records import Record, check_record
from t3jax.data.rendering import PromptFormat, find_opening, render_prompt, render_question_answer

if TYPE_CHECKING:  # slow to import, and needed only where a tokenizer is loaded
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 256  # more than any text has for each of its tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A token sequence and where its labels start.

    Attributes:
        tokens: token ids, int32 [T].
        answer_start: index of the first label, at least 1; tokens[answer_start:] are the labels.
    """

    tokens: np.ndarray
    answer_start: int

    @property
    def num_answer_tokens(self) -> int:
        """Number of labels."""
        return len(self.tokens) - self.answer_start


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    prompt_format: PromptFormat,
    before: Sequence[Mapping[str, str]] = (),
) -> np.ndarray:
    """Tokens of a question, up to where the answer begins, int32 [T].

    `encode_question_answer` has the same tokens before its labels, for an answer of words. An empty
    thought that the chat template puts before such an answer, or the name of the channel for
    answers, is a part of the prompt, unless `chat_template_kwargs` has "enable_thinking": True.
    Earlier turns have `role` and `content`; a system turn among them replaces the format's.
    """
    text, add_special_tokens = render_prompt(tokenizer, question, prompt_format, before)
    if tokenizer.chat_template is None:
        tokens = tokenize(tokenizer, text, add_special_tokens)
        if text[-1:].isspace():
            # No text has a token of the space alone before a word.
            answered = text + "a"
            whole = tokenize(tokenizer, answered, add_special_tokens)
            start = _find_answer(tokenizer, tokens, whole, text, answered, add_special_tokens)
            tokens = whole[: max(1, start)]
        return tokens
    turns = [*before, {"role": "user", "content": question}]
    text += find_opening(tokenizer, text, turns, prompt_format)
    return tokenize(tokenizer, text, add_special_tokens)


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    prompt_format: PromptFormat,
) -> np.ndarray:
    """Tokens of a conversation, up to where the next answer begins, int32 [T].

    Turns have `role` ("system", "user" or "assistant") and `content`; the last one is the user's. A
    tokenizer without a chat template takes a single question, whose tokens are as for
    `encode_prompt`.
    """
    roles = [turn.get("role") for turn in messages]
    if not roles or roles[-1] != "user":
        raise ValueError(f"messages must end with a turn of the user, got the roles {roles}")
    if unknown := sorted({str(role) for role in roles} - {"system", "user", "assistant"}):
        raise ValueError(f"roles are system, user and assistant, got {unknown}")
    return encode_prompt(tokenizer, messages[-1]["content"], prompt_format, messages[:-1])


def encode_question_answer(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    answer: str,
    prompt_format: PromptFormat,
    max_length: int | None = None,
    before: Sequence[Mapping[str, str]] = (),
) -> Example:
    r"""Tokens of a question and its answer; the answer's tokens are the labels.

    The labels are the tokens that the whole conversation has beyond the prompt's text. Where the
    border falls inside a token, that token belongs to the answer: a tag may end in a space, and the
    tokenizer may make one token of a space and the word after it. (The reference counts as many
    tokens as the prompt alone has, and so leaves such an answer's first token without a label.) An
    empty thought that the chat template puts before the answer, or the name of the channel for
    answers, is a part of the prompt. Earlier turns are as for `encode_prompt`; none of their tokens
    is a label.

    The closing end-of-turn token is a label, and eos is appended when the conversation does not end
    in it. A template in the ChatML style closes a turn with "<|im_end|>\n", where <|im_end|> is eos
    too: the labels then end in "<|im_end|>\n<|im_end|>", as in the reference.

    Raises:
        ValueError: no label is left, the sequence is longer than max_length (it is never cut), the
            tokenizer has no eos token, or its template fails or cannot be split into prompt and
            answer.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no eos token, which closes every "
            "answer: tokenizer_config.json names none, or is missing; give it an eos_token, the "
            "model's end-of-text or end-of-turn token"
        )
    check_characters("".join(turn["content"] for turn in before) + question + answer, max_length)
    prompt_text, chat_text, add_special_tokens = render_question_answer(
        tokenizer, question, answer, prompt_format, before
    )
    prompt = tokenize(tokenizer, prompt_text, add_special_tokens)
    tokens = tokenize(tokenizer, chat_text, add_special_tokens)
    start = _find_answer(tokenizer, prompt, tokens, prompt_text, chat_text, add_special_tokens)
    if len(tokens) == 0 or tokens[-1] != tokenizer.eos_token_id:
        tokens = np.append(tokens, np.int32(tokenizer.eos_token_id))
    if not 0 < start < len(tokens):
        raise ValueError(
            f"{'no answer token' if start else 'no token of the prompt'} is left: the prompt alone "
            f"has {len(prompt)} tokens, with the answer {answer!r:.80} there are {len(tokens)}; "
            "give a longer answer, or other tags"
        )
    if max_length is not None and len(tokens) > max_length:
        raise ValueError(
            f"question and answer have {len(tokens)} tokens ({start} in the prompt), more "
            f"than max_length = {max_length}; shorten or remove the row, or raise max_length if "
            "the model's context allows it"
        )
    return Example(tokens, start)


def encode_document(
    tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int | None = None
) -> Example:
    """Tokens of a plain document; every token after the first is a label.

    No eos is appended: a document may be an excerpt. One that is too long is refused, never cut.
    """
    check_characters(text, max_length)
    tokens = tokenize(tokenizer, text, add_special_tokens=True)
    if len(tokens) < 2:
        raise ValueError(
            f"the document {text!r:.80} has {len(tokens)} tokens, so no token follows another; "
            "give a longer text"
        )
    if max_length is not None and len(tokens) > max_length:
        raise ValueError(
            f"the document has {len(tokens)} tokens, more than max_length = {max_length}; split "
            "it into several rows, or raise max_length if the model's context allows it"
        )
    return Example(tokens, answer_start=1)


def encode_records(
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    prompt_format: PromptFormat,
    max_length: int | None = None,
) -> list[Example]:
    """Tokens of every row: documents where it has a "text", question and answer otherwise.

    Rows are as `load_records` returns them, the other arguments as for `encode_question_answer`. An
    error names the row, counted from 1.
    """
    examples = []
    for number, record in enumerate(records, start=1):
        where = f"row {number} of {len(records)}"
        check_record(record, where)
        try:
            if "text" in record:
                example = encode_document(tokenizer, record["text"], max_length)
            else:
                example = encode_question_answer(
                    tokenizer,
                    record["question"],
                    record["answer"],
                    prompt_format,
                    max_length,
                    record.get("before", ()),
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        examples.append(example)
    return examples


def check_characters(text: str, max_length: int | None) -> None:
    """Refuses a text whose characters are too many for max_length tokens.

    It comes before tokenisation, which takes minutes for some long texts.
    """
    if max_length is not None and len(text) > _CHARACTERS * max_length:
        raise ValueError(
            f"the text has {len(text)} characters, so more than {max_length} tokens, the most that "
            "is allowed; split or shorten it"
        )


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = True
) -> np.ndarray:
    """Token ids of a text, int32 [T]; the tokenizer's special tokens before it, none after it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair at character {error.start}: "
            f"{text[error.start : error.start + 20]!r}; expected whole characters"
        ) from None
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if add_special_tokens:
        ids = ids[: len(ids) - _count_appended(tokenizer)]
    return np.asarray(ids, dtype=np.int32)


def _count_appended(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Counts the tokens that the tokenizer appends to a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    places = range(len(framed) - len(bare) + 1)
    start = next((i for i in places if framed[i : i + len(bare)] == bare), None)
    return 0 if start is None else len(framed) - len(bare) - start


def _find_answer(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: np.ndarray,
    tokens: np.ndarray,
    prompt_text: str,
    chat_text: str,
    add_special_tokens: bool,
) -> int:
    """Index of the first token that reaches beyond the prompt's text."""
    shorter = min(len(prompt), len(tokens))
    differing = np.flatnonzero(prompt[:shorter] != tokens[:shorter])
    common = int(differing[0]) if differing.size else shorter
    if common == len(prompt) or not tokenizer.is_fast:
        return common
    spans = tokenizer(
        chat_text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
    )["offset_mapping"][: len(tokens)]
    border = len(prompt_text)
    return next((i for i, (_, end) in enumerate(spans) if end > border), len(tokens))
