"""Text in, text out: the `Sampler`.

It renders prompts, has them answered by `t3jax.sampling.batch`, looks for stop strings and turns
tokens into text. It holds no random state: the same call gives the same answers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from t3jax import hosts
from t3jax.data.chat import PromptFormat, encode_prompt
from t3jax.head_io import Head, check_head_fits, common_default, place_head
from t3jax.lm.model import LM
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling.batch import Asked, Batch
from t3jax.sampling.loop import Program, Weights


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer.

    Attributes:
        max_new_tokens: Longest answer, tokens.
        temperature: Sampling temperature on the tilted distribution; 0 is greedy.
        top_k: Draw among the k likeliest tokens; 0 among all.
        top_p: Draw among the likeliest tokens whose probability reaches p; 1 among all.
        min_p: Draw among tokens at least this share as likely as the likeliest; 0 among all.
        truncate_on: Whether "base" or "tilted" decides top-k, top-p and min-p. On the base, a
            tight top-p or min-p keeps but one token where the base is sure: the one to forget.
        repetition_penalty: Above 1, tokens already in prompt or answer become less likely.
        num_samples: Answers to each prompt.
        seed: Of the draws.
        stop: Strings that end an answer; they are cut off.
        stop_ids: Token ids that end an answer, besides the model's own.
        logprobs: Whether to return log-probabilities of the chosen tokens.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    truncate_on: str = "base"
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "truncate_on": (self.truncate_on in ("base", "tilted"), "'base' or 'tilted'"),
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "stop": (not isinstance(self.stop, str) and "" not in self.stop, "non-empty strings"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """An answer.

    Attributes:
        text: The answer, without special tokens and stop strings.
        tokens: Its token ids, the closing one included; those of a cut stop string too.
        base_logprobs: Log-probability of each token under the base model, nats; None unless asked.
        guided_logprobs: The same under the tempered and tilted distribution.
    """

    text: str
    tokens: list[int]
    base_logprobs: list[float] | None = None
    guided_logprobs: list[float] | None = None


class Sampler:
    """Answers prompts with a base model, tempered and tilted by a head or several.

    A value that changes from call to call (T, s, temperature, top-p, ...) never recompiles. What
    does: another number of rows, another bucket of prompt or answer lengths, with or without
    log-probabilities, the distribution that decides truncation.
    """

    def __init__(
        self,
        lm: LM,
        head: Head | Sequence[Head] | None = None,
        *,
        base_temperature: float | None = None,
        guidance_scale: float | None = None,
        refinements: Refinements = PLAIN,
        prompt_format: PromptFormat | None = None,
        batch_size: int = 16,
        chunk: int = 8,
    ):
        """Places the heads beside the model.

        Args:
            lm: The frozen base model.
            head: The classifier, or one for each of several forget requests; None samples from the
                base model itself.
            base_temperature: T; None takes the heads' own (1 without a head).
            guidance_scale: s; None takes the heads' own.
            refinements: Extensions of the paper's method; they need a head.
            prompt_format: How a question becomes a prompt; None is the chat template's default.
            batch_size: Rows decoded together, at most.
            chunk: Steps between two looks of the host: what a row may run on in vain.

        Raises:
            ValueError: If a head's vocabulary or width is not the model's, heads have different T
                or s and none is given, or refinements have no head.
        """
        heads = [head] if isinstance(head, Head) else list(head or ())
        for each in heads:
            check_head_fits(each, lm)
        if not heads and refinements != PLAIN:
            raise ValueError(f"the refinements {refinements.name} need a head")
        self.lm = lm
        if base_temperature is None:
            base_temperature = common_default(heads, "base_temperature", 1.0)
        if guidance_scale is None:
            guidance_scale = common_default(heads, "guidance_scale", 0.0)
        self.base_temperature = base_temperature
        self.guidance_scale = guidance_scale
        self.refinements = refinements
        self.prompt_format = prompt_format or PromptFormat()
        self.batch_size = batch_size
        self.chunk = chunk
        self._activations = tuple(each.config.activation for each in heads)
        self._weights = Weights(
            lm.params,
            tuple(place_head(each.params, lm.mesh) for each in heads),
            tuple(np.float32(each.prior_shift) for each in heads),
        )

    def __call__(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """The answers' texts; see `generate`.

        With several samples for each prompt they follow one another, prompt by prompt.
        """
        return [sample.text for sample in self.generate(prompts, **options)]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        *,
        base_temperature: float | None = None,
        guidance_scale: float | None = None,
        progress: str | None = None,
        **options: Any,
    ) -> list[Sample]:
        """Answers prompts.

        Args:
            prompts: Questions, rendered with the chat template; or token ids, taken as they are.
            base_temperature: T for this call; None takes the sampler's.
            guidance_scale: s for this call; None takes the sampler's. T = 1, s = 0 is the base
                model, drawn with the same random numbers.
            progress: Label of a progress bar; None shows none.
            **options: Fields of `SamplingOptions`.

        Returns:
            One `Sample` for each prompt, in order; with `num_samples` n, n consecutive ones each.

        Raises:
            ValueError: If an option is out of range, there are no prompts, a prompt is empty, or
                prompt and answer together exceed the model's context.
        """
        request = self._request(prompts, base_temperature, guidance_scale, options)
        tokens: list[list[int]] = [[] for _ in request.rows]
        logprobs: list[list[tuple[float, float]]] = [[] for _ in request.rows]
        hidden = not progress or not hosts.is_lead()
        with tqdm.tqdm(total=len(request.rows), desc=progress, delay=1, disable=hidden) as bar:
            for piece in self._batch(request).run():
                tokens[piece.prompt] += piece.tokens
                logprobs[piece.prompt] += piece.logprobs
                bar.update(piece.last)
        return [self._sample(request, *answer) for answer in zip(tokens, logprobs, strict=True)]

    def stream(self, prompt: str | Sequence[int] | np.ndarray, **options: Any) -> Iterator[str]:
        """Answers one prompt, yielding text as it comes; `"".join` of it is the whole answer.

        Args:
            prompt: A question, or token ids.
            **options: As for `generate`, one sample.

        Yields:
            Pieces of text.
        """
        base_temperature = options.pop("base_temperature", None)
        guidance_scale = options.pop("guidance_scale", None)
        request = self._request([prompt], base_temperature, guidance_scale, options)
        if len(request.rows) != 1:
            raise ValueError("stream gives one answer: num_samples must be 1")
        tokens: list[int] = []
        shown = ""
        for piece in self._batch(request).run():
            tokens += piece.tokens
            text = self._text(tokens, request.options.stop)
            # What may still change is held back: half a character, or the start of a stop string.
            held = max((len(s) - 1 for s in request.options.stop), default=0)
            sure = text[: len(text) - held].rstrip("\ufffd")
            if sure.startswith(shown) and len(sure) > len(shown):
                yield sure[len(shown) :]
                shown = sure
        rest = self._text(tokens, request.options.stop)[len(shown) :]
        if rest:
            yield rest

    def _request(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        base_temperature: float | None,
        guidance_scale: float | None,
        options: dict[str, Any],
    ) -> "_Request":
        known = {field.name for field in dataclasses.fields(SamplingOptions)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown sampling options {unknown}; known: {sorted(known)}")
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError("prompts must be a list with at least one prompt")
        chosen = SamplingOptions(**options)
        temperature = _first(base_temperature, self.base_temperature)
        scale = _first(guidance_scale, self.guidance_scale)
        if not temperature > 0 or not scale >= 0:
            raise ValueError(
                f"base_temperature must be positive and guidance_scale not negative, got "
                f"{temperature} and {scale}"
            )
        encoded = [self._encode(i, prompt) for i, prompt in enumerate(prompts)]
        for i, ids in enumerate(encoded):
            if len(ids) + chosen.max_new_tokens > self.lm.max_position:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
                    f"{chosen.max_new_tokens} that exceeds the {self.lm.max_position} of "
                    f"{self.lm.name}'s context: shorten the prompt or ask for less"
                )
        rows = [(i, j) for i in range(len(prompts)) for j in range(chosen.num_samples)]
        return _Request(chosen, temperature, scale, encoded, rows)

    def _encode(self, i: int, prompt: str | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError(f"prompt {i} is empty")
            return encode_prompt(self.lm.tokenizer, prompt, self.prompt_format)
        ids = np.asarray(prompt, np.int32)
        if not ids.size or ids.min() < 0 or ids.max() >= self.lm.vocab_size:
            raise ValueError(
                f"prompt {i}: token ids must lie in [0, {self.lm.vocab_size}), got {ids}"
            )
        return ids

    def _batch(self, request: "_Request") -> Batch:
        """All answers of a request."""
        options = request.options
        program = Program(
            self.lm.apply,
            self.lm.unembed,
            self.lm.init_cache,
            self._activations,
            options.truncate_on,
            options.logprobs,
            self.lm.mesh,
            self.refinements,
        )

        def stopped(tokens: list[int]) -> bool:
            text = self._text(tokens, ())
            return any(string in text for string in options.stop)

        return Batch(
            program,
            self._weights,
            [Asked(request.encoded[prompt], (prompt, j)) for prompt, j in request.rows],
            knobs=request.knobs,
            stop_ids=[*self.lm.eos_ids, *options.stop_ids],
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            rows=self.batch_size,
            chunk=self.chunk,
            ended=stopped if options.stop else None,
        )

    def _sample(
        self, request: "_Request", tokens: list[int], logprobs: list[tuple[float, float]]
    ) -> Sample:
        text = self._text(tokens, request.options.stop)
        if not request.options.logprobs:
            return Sample(text, tokens)
        return Sample(text, tokens, [b for b, _ in logprobs], [g for _, g in logprobs])

    def _text(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        if self.lm.tokenizer is None:
            return ""
        text = self.lm.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for string in stop if (at := text.find(string)) >= 0]
        return text[: min(ends)] if ends else text


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked call: options, the method's T and s, prompts, and (prompt, sample) of each row."""

    options: SamplingOptions
    base_temperature: float
    guidance_scale: float
    encoded: list[np.ndarray]
    rows: list[tuple[int, int]]

    @property
    def knobs(self) -> dict[str, float]:
        """Fields of `Controls`."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {
            "base_temperature": self.base_temperature,
            "guidance_scale": self.guidance_scale,
            **{name: getattr(self.options, name) for name in names},
        }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
