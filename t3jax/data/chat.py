"""From text to tokens: prompts and examples in the tokenizer's chat template.

An example is the whole conversation as token ids and the position where its labels start: the
tokens of the prompt carry no label, those of the answer do, the closing end-of-turn token
included. Where the prompt's tokens are the first of the whole text, as with chat templates, the
rule is the reference evaluator's (locuslab/open-unlearning), so that losses and probabilities can
be compared with published ones. Nothing is padded, batched or truncated here.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t3jax.data import templates
from t3jax.data.records import Record, check_record

if TYPE_CHECKING:  # slow to import: only who loads a tokenizer waits
    from transformers import PreTrainedTokenizerBase

# What templates of reasoning models (Qwen 3) put before an answer that was given without a thought.
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_CHARACTERS = 256  # more than any text has for each of its tokens
_OURS = ("messages", "add_generation_prompt", "tools", "documents")


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
        answer_start: text before the answer. A space at its end is left to the answer where the
            tokenizer makes one token of a space and the word after it.
        chat_template_kwargs: further variables of the chat template, such as
            {"enable_thinking": True}; plain JSON values.
    """

    system: str | None = None
    date_string: str | None = None
    question_start: str = "Question: "
    question_end: str = "\n"
    answer_start: str = "Answer: "
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name in self.chat_template_kwargs:
            if not isinstance(name, str) or not name.isidentifier() or name in _OURS:
                raise ValueError(
                    f"chat_template_kwargs: {name!r} cannot be given; expected names of the chat "
                    f"template's variables other than {', '.join(_OURS)}"
                )


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
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    prompt_format: PromptFormat,
    before: Sequence[Mapping[str, str]] = (),
) -> np.ndarray:
    """Tokens of a question, up to where the answer begins.

    They are the tokens before the labels that `encode_question_answer` gives an answer of words.
    An empty thought that the chat template puts before such an answer is a part of the prompt,
    unless `chat_template_kwargs` has "enable_thinking": True.

    Args:
        tokenizer: a Hugging Face tokenizer, with or without a chat template.
        question: the user's text.
        prompt_format: system turn and tags.
        before: earlier turns, with `role` and `content`; a system turn among them stands for that
            of the format.

    Returns:
        Token ids, int32 [T].

    Raises:
        ValueError: the tokenizer cannot express the turns that are asked for, or the chat template
            fails.
    """
    text, add_special_tokens = _prompt_text(tokenizer, question, prompt_format, before)
    if tokenizer.chat_template is None:
        tokens = tokenize(tokenizer, text, add_special_tokens)
        if text[-1:].isspace():
            # A token of the space alone is one that a text has nowhere before a word.
            answered = text + "a"
            whole = tokenize(tokenizer, answered, add_special_tokens)
            start = _answer_start(tokenizer, tokens, whole, text, answered, add_special_tokens)
            tokens = whole[: max(1, start)]
        return tokens
    turns = [*before, {"role": "user", "content": question}]
    text += _thought_before(tokenizer, text, turns, prompt_format)
    return tokenize(tokenizer, text, add_special_tokens)


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    prompt_format: PromptFormat,
) -> np.ndarray:
    """Tokens of a conversation, up to where the next answer begins.

    Args:
        tokenizer: a Hugging Face tokenizer; without a chat template it takes a single question.
        messages: turns with `role` ("system", "user" or "assistant") and `content`, the last one
            the user's.
        prompt_format: system turn and tags; its system turn stands for one that is not given.

    Returns:
        Token ids, int32 [T]; those of `encode_prompt` for a single question.

    Raises:
        ValueError: a turn is not as above, or as `encode_prompt`.
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
    border falls inside a token, as where a tag ends in a space and the tokenizer makes one token of
    a space and the word after it, that token belongs to the answer. (The reference counts as many
    tokens as the prompt alone has, and so leaves such an answer's first token without a label.) An
    empty thought that the chat template puts before the answer is a part of the prompt.

    The closing end-of-turn token is a label, and eos is appended when the conversation does not end
    in it. A template in the ChatML style closes a turn with "<|im_end|>\n", where <|im_end|> is eos
    too: the labels then end in "<|im_end|>\n<|im_end|>", as the reference has it.

    Args:
        tokenizer: a Hugging Face tokenizer, with or without a chat template.
        question: the user's text.
        answer: the assistant's text.
        prompt_format: system turn and tags.
        max_length: the longest sequence allowed, in tokens. None: any length.
        before: earlier turns, see `encode_prompt`; none of their tokens is a label.

    Returns:
        The example.

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
    prompt_text, add_special_tokens = _prompt_text(tokenizer, question, prompt_format, before)
    if tokenizer.chat_template is None:
        chat_text = prompt_text + answer
    else:
        chat_text = _render_chat(tokenizer, question, answer, prompt_format, before)
        if not chat_text.startswith(prompt_text):
            raise ValueError(
                "the chat template's prompt is not the start of its conversation, so where the "
                f"answer starts is unknown; the prompt ends in {prompt_text[-60:]!r}. Use another "
                "template, or none: set tokenizer.chat_template = None and the tags of "
                "PromptFormat. If the prompt opens a thought, try PromptFormat's "
                'chat_template_kwargs = {"enable_thinking": False}'
            )
        rest = chat_text[len(prompt_text) :]
        if answer.strip() not in rest:
            raise ValueError(
                f"the chat template does not print the answer {answer!r:.80} as it is, but "
                f"{rest!r:.80}; change the answer or the template"
            )
        prompt_text += _empty_thought(rest, answer)
    prompt = tokenize(tokenizer, prompt_text, add_special_tokens)
    tokens = tokenize(tokenizer, chat_text, add_special_tokens)
    start = _answer_start(tokenizer, prompt, tokens, prompt_text, chat_text, add_special_tokens)
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

    Args:
        tokenizer: a Hugging Face tokenizer; it adds its own special tokens (a bos, usually).
        text: the document.
        max_length: the longest sequence allowed, in tokens. None: any length.

    Returns:
        The example, with answer_start = 1. No eos is appended: a document may be an excerpt.

    Raises:
        ValueError: fewer than two tokens, or more than max_length (it is never cut).
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
    """Refuses a text that is too long before it is tokenised, which takes minutes for some.

    Args:
        text: the text.
        max_length: the longest sequence allowed, in tokens. None: any length.

    Raises:
        ValueError: it has more than max_length tokens, by the number of its characters.
    """
    if max_length is not None and len(text) > _CHARACTERS * max_length:
        raise ValueError(
            f"the text has {len(text)} characters, so more than {max_length} tokens, the most that "
            "is allowed; split or shorten it"
        )


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = True
) -> np.ndarray:
    """Tokenizes a text, with what the tokenizer puts before it and without what it appends.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text.
        add_special_tokens: whether the tokenizer puts anything before it.

    Returns:
        Token ids, int32 [T].

    Raises:
        ValueError: the text holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair at character {error.start}: "
            f"{text[error.start : error.start + 20]!r}; expected whole characters"
        ) from None
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if add_special_tokens:
        ids = ids[: len(ids) - _num_appended(tokenizer)]
    return np.asarray(ids, dtype=np.int32)


def _num_appended(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens the tokenizer appends to a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    places = range(len(framed) - len(bare) + 1)
    start = next((i for i in places if framed[i : i + len(bare)] == bare), None)
    return 0 if start is None else len(framed) - len(bare) - start


def _answer_start(
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


def _empty_thought(text: str, answer: str) -> str:
    """An empty thought at the head of a text, if it is not the answer's own."""
    thought = _EMPTY_THOUGHT.match(text)
    return thought[0] if thought and not answer.lstrip().startswith("<think>") else ""


def _thought_before(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    turns: Sequence[Mapping[str, str]],
    prompt_format: PromptFormat,
) -> str:
    """The empty thought that the template puts between a conversation and an answer of words."""
    thinks = prompt_format.chat_template_kwargs.get("enable_thinking", False)
    if thinks or "<think>" not in tokenizer.get_chat_template():
        return ""
    answer = "An answer."
    answered = [*turns, {"role": "assistant", "content": answer}]
    whole = _render_turns(tokenizer, answered, False, prompt_format)
    return _empty_thought(whole[len(text) :], answer) if whole.startswith(text) else ""


def _prompt_text(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    prompt_format: PromptFormat,
    before: Sequence[Mapping[str, str]],
) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer still has to add its special tokens to it."""
    if tokenizer.chat_template is not None:
        return _render_chat(tokenizer, question, None, prompt_format, before), False
    if before:
        raise ValueError("the model has no chat template: it takes one question, without turns")
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
    before: Sequence[Mapping[str, str]],
) -> str:
    """A question and its answer in the chat template; without it, up to where one begins."""
    turns = [*before, {"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return _render_turns(tokenizer, turns, answer is None, prompt_format)


def _render_turns(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Mapping[str, str]],
    begins_answer: bool,
    prompt_format: PromptFormat,
) -> str:
    """A conversation in the chat template."""
    values = {
        name: [str(each) for each in token] if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    if prompt_format.date_string is not None:
        values["date_string"] = prompt_format.date_string
    values |= prompt_format.chat_template_kwargs

    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    own_system = any(turn["role"] == "system" for turn in turns)

    def render(messages: list, add_generation_prompt: bool = begins_answer) -> str:
        ours = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return templates.render_template(tokenizer.get_chat_template(), values | ours)
        except ValueError as error:
            name = tokenizer.name_or_path or "the tokenizer"
            raise type(error)(f"the chat template of {name} fails: {error}") from None

    if prompt_format.system is None or own_system:
        return render(turns)
    if prompt_format.system:
        try:
            text = render(_system(prompt_format.system) + turns)
        except templates.TemplateFailure as error:
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
    except templates.TemplateFailure:
        return without  # It refuses system turns.
    try:
        alone = render(_system(""), add_generation_prompt=False)
    except templates.TemplateFailure:
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
