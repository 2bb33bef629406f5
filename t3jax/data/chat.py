"""From text to tokens: prompts and examples in the tokenizer's chat template.

An example is the whole conversation as token ids and the position where its labels start: the
tokens of the prompt carry no label, those of the answer do, the closing end-of-turn token
included. The rule is the reference evaluator's (locuslab/open-unlearning), so that losses and
probabilities can be compared with published ones. Nothing is padded, batched or truncated here.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from t3jax.data.records import Record, check_record

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    Attributes:
        system: text of the system turn. None: the chat template's own default. "": no system turn,
            not even the template's default.
        date_string: today's date for the templates that print one (Llama 3.1), so that prompts do
            not change from day to day. None: the template's own choice.
        question_start: text before the question. This tag and the next two are used only when the
            tokenizer has no chat template.
        question_end: text after the question.
        answer_start: text before the answer. Where a tag ends in a space, its last token may
            differ from the one that the same space and the answer's first word form together.
    """

    system: str | None = None
    date_string: str | None = None
    question_start: str = "Question: "
    question_end: str = "\n"
    answer_start: str = "Answer: "


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
        """How many tokens are labels."""
        return len(self.tokens) - self.answer_start


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", question: str, prompt_format: PromptFormat
) -> np.ndarray:
    """Tokens of a question, up to where the answer begins.

    Args:
        tokenizer: a Hugging Face tokenizer, with or without a chat template.
        question: the user's text.
        prompt_format: system turn and tags.

    Returns:
        Token ids, int32 [T].

    Raises:
        ValueError: the tokenizer cannot express the system turn that is asked for.
    """
    text, add_special_tokens = _prompt_text(tokenizer, question, prompt_format)
    return _tokenize(tokenizer, text, add_special_tokens)


def encode_question_answer(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    answer: str,
    prompt_format: PromptFormat,
    max_length: int | None = None,
) -> Example:
    r"""Tokens of a question and its answer; the answer's tokens are the labels.

    The labels are the tokens of the whole conversation after as many tokens as the prompt alone
    has. The closing end-of-turn token is one of them, and eos is appended when the conversation
    does not end in it. A template in the ChatML style closes a turn with "<|im_end|>\n", where
    <|im_end|> is eos too: the labels then end in "<|im_end|>\n<|im_end|>", as the reference has it.

    Args:
        tokenizer: a Hugging Face tokenizer, with or without a chat template.
        question: the user's text.
        answer: the assistant's text.
        prompt_format: system turn and tags.
        max_length: the longest sequence allowed, in tokens. None: any length.

    Returns:
        The example.

    Raises:
        ValueError: no label is left, the sequence is longer than max_length (it is never cut), the
            tokenizer has no eos token, or its template cannot be split into prompt and answer.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, which closes every answer; set tokenizer.eos_token to "
            "the model's end-of-text or end-of-turn token"
        )
    prompt_text, add_special_tokens = _prompt_text(tokenizer, question, prompt_format)
    if tokenizer.chat_template is None:
        chat_text = prompt_text + answer
    else:
        chat_text = _render_chat(tokenizer, question, answer, prompt_format)
        # Labels start after as many tokens as the prompt has: wrong if the prompt is not the start.
        if not chat_text.startswith(prompt_text):
            raise ValueError(
                "the chat template's prompt is not the start of its conversation, so where the "
                f"answer starts is unknown; the prompt ends in {prompt_text[-60:]!r}. Use another "
                "template, or none: set tokenizer.chat_template = None and the tags of PromptFormat"
            )
    prompt = _tokenize(tokenizer, prompt_text, add_special_tokens)
    tokens = _tokenize(tokenizer, chat_text, add_special_tokens)
    if len(tokens) == 0 or tokens[-1] != tokenizer.eos_token_id:
        tokens = np.append(tokens, np.int32(tokenizer.eos_token_id))
    if len(prompt) >= len(tokens):
        raise ValueError(
            f"no answer token is left: the prompt alone has {len(prompt)} tokens, with the answer "
            f"{answer!r:.80} there are {len(tokens)}; give a longer answer"
        )
    if max_length is not None and len(tokens) > max_length:
        raise ValueError(
            f"question and answer have {len(tokens)} tokens ({len(prompt)} in the prompt), more "
            f"than max_length = {max_length}; shorten or remove the row, or raise max_length if "
            "the model's context allows it"
        )
    return Example(tokens, len(prompt))


def encode_document(
    tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int | None = None
) -> Example:
    """Tokens of a plain document; every token after the first is a label.

    Args:
        tokenizer: a Hugging Face tokenizer; it adds its own special tokens (a bos, usually).
        text: the document.
        max_length: the longest sequence allowed, in tokens. None: any length.

    Returns:
        The example, with answer_start = 1. No eos is appended: a document may be an excerpt.

    Raises:
        ValueError: fewer than two tokens, or more than max_length (it is never cut).
    """
    tokens = _tokenize(tokenizer, text, add_special_tokens=True)
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

    Args:
        tokenizer: a Hugging Face tokenizer.
        records: rows as `load_records` gives them.
        prompt_format: system turn and tags.
        max_length: the longest sequence allowed, in tokens. None: any length.

    Returns:
        One example for each row, in the same order.

    Raises:
        ValueError: as the functions for one row do; names the row, counted from 1.
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
                    tokenizer, record["question"], record["answer"], prompt_format, max_length
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        examples.append(example)
    return examples


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool
) -> np.ndarray:
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _prompt_text(
    tokenizer: "PreTrainedTokenizerBase", question: str, prompt_format: PromptFormat
) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer still has to add its special tokens to it."""
    if tokenizer.chat_template is not None:
        return _render_chat(tokenizer, question, None, prompt_format), False
    if prompt_format.system:
        raise ValueError(
            "the tokenizer has no chat template, so there is no system turn to put "
            f"{prompt_format.system!r:.80} in; write it into question_start instead"
        )
    prompt = prompt_format.question_start + question + prompt_format.question_end
    return prompt + prompt_format.answer_start, True


def _render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    answer: str | None,
    prompt_format: PromptFormat,
) -> str:
    """The conversation in the chat template; without an answer, up to where one begins."""
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    options: dict[str, Any] = {}
    if prompt_format.date_string is not None:
        options["date_string"] = prompt_format.date_string

    # As text, not as tokens: with tokenize=True the result's type depends on the version.
    def render(messages: list, add_generation_prompt: bool = answer is None) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        )

    if prompt_format.system is None:
        return render(turns)
    if prompt_format.system:
        try:
            text = render(_system(prompt_format.system) + turns)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template refuses a system turn ({error}); set system to None or ''"
            ) from error
        if prompt_format.system.strip() not in text:
            raise ValueError(
                "the chat template does not print the system turn "
                f"{prompt_format.system!r:.80}; set system to None or ''"
            )
        return text

    # No system turn at all. Leaving it out is not enough: a template may then print a default text.
    # So render an empty one, and cut off what the template prints for it alone.
    without = render(turns)
    probe = "a system text"
    try:
        if probe not in render(_system(probe) + turns):
            return without  # It does not print system turns.
        empty = render(_system("") + turns)
    except jinja2.TemplateError:
        return without  # It refuses system turns.
    try:
        alone = render(_system(""), add_generation_prompt=False)
    except jinja2.TemplateError:
        alone = ""  # It wants a question.
    candidates = [without, empty]
    if alone and empty.startswith(alone):
        bare = empty.removeprefix(alone)
        bos = tokenizer.bos_token
        if bos and alone.startswith(bos) and not bare.startswith(bos):
            bare = bos + bare
        candidates.append(bare)
    # The shortest has neither the default text nor the frame of an empty system turn.
    return min(candidates, key=len)


def _system(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}]
