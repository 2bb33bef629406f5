"""A conversation as text: in the tokenizer's chat template, or between tags where it has none.

Nothing here makes tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from t3jax.data import templates

if TYPE_CHECKING:  # slow to import, and needed only where a tokenizer is loaded
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, str]]

# Templates of reasoning models put an opening before an answer without a thought: an empty thought
# (Qwen 3, Gemma 4), or the name of the channel for answers (gpt-oss).
_THOUGHT = r"\s*<think>\s*</think>\s*|<\|channel>thought\s*<channel\|>"
_OPENING = re.compile(_THOUGHT + r"|<\|channel\|>final<\|message\|>")
_CLOSED = re.compile(rf"({_THOUGHT})$")
_LONGEST = 64  # characters of an opening
_MARKS = ("<think>", "<|channel")
_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")  # set here


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    Attributes:
        system: text of the system turn. None: the chat template's own default. "": no system turn,
            not even the template's default.
        date_string: today's date for the templates that print one (Llama 3.1, gpt-oss), so that
            prompts do not change from day to day. None: the template's own choice.
        question_start: text before the question. This tag and the next two are used only when the
            tokenizer has no chat template.
        question_end: text after the question.
        answer_start: text before the answer. A space at its end is left to the answer where the
            tokenizer makes one token of a space and the word after it.
        chat_template_kwargs: further variables of the chat template, such as
            {"enable_thinking": True}; plain JSON values. With that one, the model decides whether
            it thinks before it answers.
    """

    system: str | None = None
    date_string: str | None = None
    question_start: str = "Question: "
    question_end: str = "\n"
    answer_start: str = "Answer: "
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name in self.chat_template_kwargs:
            if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
                raise ValueError(
                    f"chat_template_kwargs: {name!r} cannot be given; expected names of the chat "
                    f"template's variables other than {', '.join(_RESERVED)}"
                )


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    prompt_format: PromptFormat,
    before: Turns = (),
) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer still has to add its special tokens to it."""
    if tokenizer.chat_template is not None:
        turns = [*before, _turn("user", question)]
        return render_turns(tokenizer, turns, True, prompt_format), False
    if before:
        raise ValueError("the model has no chat template: it takes one question, without turns")
    if prompt_format.system:
        raise ValueError(
            "the tokenizer has no chat template, so there is no system turn to put "
            f"{prompt_format.system!r:.80} in; write it into question_start instead"
        )
    prompt = prompt_format.question_start + question + prompt_format.question_end
    return prompt + prompt_format.answer_start, True


def render_question_answer(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    answer: str,
    prompt_format: PromptFormat,
    before: Turns = (),
) -> tuple[str, str, bool]:
    """The prompt, the whole conversation, and whether special tokens still have to be added."""
    prompt, add_special_tokens = render_prompt(tokenizer, question, prompt_format, before)
    if tokenizer.chat_template is None:
        return prompt, prompt + answer, add_special_tokens
    turns = [*before, _turn("user", question), _turn("assistant", answer)]
    whole = render_turns(tokenizer, turns, False, prompt_format)
    closed = _CLOSED.search(prompt, max(0, len(prompt) - _LONGEST))
    if closed is not None and not whole.startswith(prompt):
        # Gemma 4 closes an empty thought in prompts, and has none in conversations.
        begun = prompt[: closed.start()]
        whole = prompt + whole[len(begun) :] if whole.startswith(begun) else whole
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template's prompt is not the start of its conversation, so where the "
            f"answer starts is unknown; the prompt ends in {prompt[-60:]!r}. Use another "
            "template, or none: set tokenizer.chat_template = None and the tags of "
            "PromptFormat. If the prompt opens a thought, try PromptFormat's "
            'chat_template_kwargs = {"enable_thinking": False}'
        )
    rest = whole[len(prompt) :]
    if answer.strip() not in rest:
        raise ValueError(
            f"the chat template does not print the answer {answer!r:.80} as it is, but "
            f"{rest!r:.80}; change the answer or the template"
        )
    return prompt + _match_opening(rest, answer), whole, add_special_tokens


def render_turns(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Turns,
    begins_answer: bool,
    prompt_format: PromptFormat,
) -> str:
    """A conversation in the chat template; its own system turn replaces the format's."""
    system = prompt_format.system
    render = functools.partial(_render, tokenizer, prompt_format)
    if system is None or any(turn["role"] == "system" for turn in turns):
        return render(turns, begins_answer)
    if system == "":
        return _render_without_system(tokenizer, turns, begins_answer, prompt_format)
    try:
        text = render([_turn("system", system), *turns], begins_answer)
    except templates.TemplateFailure as error:
        raise ValueError(
            f"the chat template refuses a system turn ({error}); set system to None or ''"
        ) from error
    if system.strip() not in text:
        raise ValueError(
            f"the chat template does not print the system turn {system!r:.80}; set system to None "
            "or ''"
        )
    return text


def takes_system_turn(tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat) -> bool:
    """Whether the template prints a system turn: some templates refuse it, others drop it."""
    probe = "a system text"
    try:
        text, _ = render_prompt(tokenizer, "Who?", prompt_format, [_turn("system", probe)])
    except ValueError:
        return False
    return probe in text


def find_opening(
    tokenizer: "PreTrainedTokenizerBase", text: str, turns: Turns, prompt_format: PromptFormat
) -> str:
    """The opening that the template puts between a conversation and an answer of words."""
    thinks = prompt_format.chat_template_kwargs.get("enable_thinking", False)
    if thinks or not any(mark in tokenizer.get_chat_template() for mark in _MARKS):
        return ""
    answer = "An answer."
    whole = render_turns(tokenizer, [*turns, _turn("assistant", answer)], False, prompt_format)
    return _match_opening(whole[len(text) :], answer) if whole.startswith(text) else ""


def _match_opening(text: str, answer: str) -> str:
    """The opening at the start of a text, unless the answer itself begins with one."""
    match = _OPENING.match(text)
    return match[0] if match and not answer.lstrip().startswith(_MARKS) else ""


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    turns: Turns,
    begins_answer: bool,
) -> str:
    """Turns in the chat template, no system turn added or removed."""
    values: dict[str, Any] = {
        name: list(map(str, token)) if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    if prompt_format.date_string is not None:
        values["date_string"] = prompt_format.date_string
    values |= prompt_format.chat_template_kwargs
    values |= {
        "messages": [_turn(turn["role"], turn["content"]) for turn in turns],
        "tools": None,
        "documents": None,
        "add_generation_prompt": begins_answer,
    }
    try:
        return templates.render_template(tokenizer.get_chat_template(), values)
    except ValueError as error:
        name = tokenizer.name_or_path or "the tokenizer"
        raise type(error)(f"the chat template of {name} fails: {error}") from None


def _render_without_system(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Turns,
    begins_answer: bool,
    prompt_format: PromptFormat,
) -> str:
    """Turns without any system turn.

    A template may print a default text where the turn is left out. So an empty one is rendered, and
    the text that the template prints for it alone is cut off.
    """
    render = functools.partial(_render, tokenizer, prompt_format)
    without = render(turns, begins_answer)
    probe = "a system text"
    try:
        if probe not in render([_turn("system", probe), *turns], begins_answer):
            return without  # the template does not print system turns
        empty = render([_turn("system", ""), *turns], begins_answer)
    except templates.TemplateFailure:
        return without  # the template refuses system turns
    try:
        alone = render([_turn("system", "")], False)
    except templates.TemplateFailure:
        alone = ""  # the template expects a question
    candidates = [without, empty]
    if alone and empty.startswith(alone):
        bare = empty.removeprefix(alone)
        bos = tokenizer.bos_token
        if bos and alone.startswith(bos) and not bare.startswith(bos):
            bare = bos + bare
        candidates.append(bare)
    # The shortest one lacks both the default text and the frame of an empty system turn.
    return min(candidates, key=len)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
