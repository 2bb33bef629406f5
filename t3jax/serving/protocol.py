"""Bodies of the OpenAI API, from JSON to requests of the engine.

Every field is either supported or refused by name. T, s and the heads that are on decide what is
unlearned: only a client with the server key may set them.

References:
    OpenAI API reference, completions and chat completions.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from t3jax.data.chat import PromptFormat, check_characters, encode_chat, tokenize
from t3jax.lm.model import LM
from t3jax.sampling.sampler import SamplingOptions
from t3jax.serving.errors import BadRequest, describe
from t3jax.serving.fields import Fields
from t3jax.serving.messages import Request
from t3jax.serving.state import MOST_LIKELY

MOST_ANSWERS = 128  # of one body: prompts times n
_MOST_STOPS = 16

# These decide what is unlearned and need the server key.
SERVER_FIELDS = ("base_temperature", "guidance_scale", "heads")

_SAMPLED = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_COMMON = (*_SAMPLED, "n", "seed", "stop", "stop_token_ids", "stream", "stream_options", "logprobs")
COMPLETION_FIELDS = (*_COMMON, "prompt", "echo", *SERVER_FIELDS)
CHAT_FIELDS = (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", *SERVER_FIELDS)


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """The contents of a body.

    Attributes:
        requests: Prompts times n, in the order of the choices.
        include_usage: Whether the stream ends with the number of tokens.
        echo: Whether the prompt is returned too.
        no_answer: Whether only the echo is returned (`max_tokens` of 0).
        shows_tilt: Whether the client may see the base model's log-probabilities.
        prompt_tokens: Tokens of the prompts, each counted once.
    """

    requests: list[Request]
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: bool
    no_answer: bool
    chat: bool
    shows_tilt: bool
    prompt_tokens: int


class Reader:
    """Reads bodies for one model."""

    def __init__(
        self, lm: LM, names: Sequence[str], prompt_format: PromptFormat, max_new_tokens: int
    ):
        """`names` are the model's for clients; `max_new_tokens` is the default of a body."""
        self.lm = lm
        self.names = names
        self.prompt_format = prompt_format
        self.max_new_tokens = max_new_tokens

    def read(self, body: Mapping[str, object], chat: bool, has_server_key: bool) -> Ask:
        """Reads a body of chat completions or of completions.

        A `BadRequest` names a field that is unknown, not supported, of another type or out of
        range.
        """
        fields = Fields(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
        for name in SERVER_FIELDS:
            if name in body and not has_server_key:
                raise BadRequest(
                    f"{name} decides what is unlearned and needs the server key", name, 403
                )
        self.check_model(fields)
        if chat:
            prompts = [self.encode_messages(fields.take("messages", list))]
        else:
            prompts = self._read_prompts(fields)
        count = fields.whole("n", 1, 1, MOST_ANSWERS)
        if count * len(prompts) > MOST_ANSWERS:
            raise BadRequest(f"prompts times n may be {MOST_ANSWERS} at most", "n")
        logprobs, likeliest = self._read_logprobs(fields, chat)
        echo = False if chat else fields.take("echo", bool, False)
        longest = fields.whole("max_tokens", self.max_new_tokens, 0 if echo else 1, 2**20)
        if chat:
            longest = fields.whole("max_completion_tokens", longest, 1, 2**20)
        stream = fields.take("stream", bool, False)
        stream_options = fields.take("stream_options", dict, {})
        include_usage = Fields(stream_options, ("include_usage",), "stream_options").take(
            "include_usage", bool, False
        )
        if stream_options and not stream:
            raise BadRequest("stream_options needs stream", "stream_options")
        seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
        options = self._read_options(fields, max(longest, 1), seed)
        heads = fields.take("heads", list, None)
        if heads is not None and not all(isinstance(name, str) for name in heads):
            raise BadRequest("heads must be a list of names", "heads")
        requests = [
            Request(
                prompt,
                options,
                sample,
                base_temperature=fields.number("base_temperature", None, 0.001, 1000),
                guidance_scale=fields.number("guidance_scale", None, 0, 1000),
                heads=None if heads is None else tuple(heads),
                scores_prompt=echo and logprobs,
                likeliest=likeliest,
            )
            for prompt in prompts
            for sample in range(count)
        ]
        return Ask(
            requests=requests,
            stream=stream,
            include_usage=include_usage,
            logprobs=logprobs,
            echo=echo,
            no_answer=longest == 0,
            chat=chat,
            shows_tilt=has_server_key,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
        )

    def check_model(self, fields: Fields) -> None:
        """Raises a `BadRequest` if a body names another model."""
        name = fields.take("model", str)
        if name is not None and name not in self.names:
            raise BadRequest(
                f"unknown model {name!r}; this server has {self.names[0]!r}",
                "model",
                404,
                "model_not_found",
            )

    def encode(self, prompt: str, special: bool = True) -> np.ndarray:
        """Tokens of a prompt."""
        try:
            check_characters(prompt, self.lm.max_position)
            return tokenize(self.lm.tokenizer, prompt, special)
        except ValueError as error:
            raise BadRequest(f"prompt: {error}", "prompt") from None

    def encode_messages(self, messages: object) -> np.ndarray:
        """Tokens of a conversation, up to the beginning of the answer."""
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one turn", "messages")
        turns = []
        for i, turn in enumerate(messages):
            where = f"messages[{i}]"
            if not isinstance(turn, dict):
                raise BadRequest(f"{where} must be an object, got {describe(turn)}", where)
            # Some clients add {"type": "message"}, and empty fields of an earlier answer.
            present = {name for name, value in turn.items() if value not in (None, [])}
            if unknown := sorted(present - {"role", "content", "type"}):
                raise BadRequest(f"{where} has fields that are not supported: {unknown}", where)
            content = turn.get("content")
            if isinstance(content, list):
                parts = [
                    part.get("text") if isinstance(part, dict) and part.get("type") == "text" else 0
                    for part in content
                ]
                if not all(isinstance(part, str) for part in parts):
                    raise BadRequest(
                        f"{where}.content: expected parts of type text and no others",
                        where,
                    )
                content = "".join(parts)  # type: ignore[arg-type]
            if not isinstance(content, str) or not isinstance(turn.get("role"), str):
                raise BadRequest(f"{where} needs a role and a content, both texts", where)
            turns.append({"role": turn["role"], "content": content})
        try:
            check_characters("".join(turn["content"] for turn in turns), self.lm.max_position)
            return encode_chat(self.lm.tokenizer, turns, self.prompt_format)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from None

    def _read_prompts(self, fields: Fields) -> list[np.ndarray]:
        prompt = fields.take("prompt", (str, list))
        if prompt is None or prompt == []:
            raise BadRequest("prompt is missing", "prompt")
        if isinstance(prompt, str) or _are_ids(prompt):
            prompt = [prompt]
        if len(prompt) > MOST_ANSWERS:
            raise BadRequest(f"at most {MOST_ANSWERS} prompts", "prompt")
        return [self._encode_prompt(text_or_ids) for text_or_ids in prompt]

    def _encode_prompt(self, prompt: object) -> np.ndarray:
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif _are_ids(prompt):
            if not all(0 <= id < self.lm.vocab_size for id in prompt):
                raise BadRequest(f"token ids must lie in [0, {self.lm.vocab_size})", "prompt")
            ids = np.asarray(prompt, np.int32)
        else:
            raise BadRequest(
                f"prompt must be a text, token ids, or a list of either, got {describe(prompt)}",
                "prompt",
            )
        if not ids.size:
            raise BadRequest("the prompt has no token", "prompt")
        return ids

    def _read_logprobs(self, fields: Fields, chat: bool) -> tuple[bool, int]:
        if not chat:
            count = fields.whole("logprobs", None, 0, MOST_LIKELY)
            return count is not None, count or 0
        with_logprobs = fields.take("logprobs", bool, False)
        count = fields.whole("top_logprobs", 0, 0, MOST_LIKELY)
        if count and not with_logprobs:
            raise BadRequest("top_logprobs needs logprobs", "top_logprobs")
        return with_logprobs, count

    def _read_options(self, fields: Fields, longest: int, seed: int | None) -> SamplingOptions:
        stop = fields.take("stop", (str, list), [])
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(string, str) and string for string in stop):
            raise BadRequest(
                f"stop must be a text or a list of texts, none of them empty, got {describe(stop)}",
                "stop",
            )
        if len(stop) > _MOST_STOPS:
            raise BadRequest(f"stop: at most {_MOST_STOPS} strings", "stop")
        stop_ids = fields.take("stop_token_ids", list, [])
        if stop_ids and not (_are_ids(stop_ids) and min(stop_ids) >= 0):
            raise BadRequest(
                f"stop_token_ids must be a list of token ids, got {describe(stop_ids)}",
                "stop_token_ids",
            )
        top_k = fields.whole("top_k", 0, -1, 2**31 - 1)
        try:
            return SamplingOptions(
                max_new_tokens=longest,
                temperature=fields.number("temperature", 1.0, 0, 1000),
                top_k=max(top_k, 0),  # some clients send -1 for all
                top_p=fields.number("top_p", 1.0, 0, 1),
                min_p=fields.number("min_p", 0.0, 0, 1),
                repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
                seed=secrets.randbits(64) if seed is None else seed % 2**64,
                stop=tuple(stop),
                stop_ids=tuple(stop_ids),
            )
        except ValueError as error:
            raise BadRequest(str(error), str(error).split()[0]) from None


def _are_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)
