"""Text in, text out: the `Sampler`.

It renders prompts, has them answered by `t3jax.sampling.batch`, looks for stop strings and turns
tokens into text. It holds no random state: the same call gives the same answers.
"""

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from t3jax import hosts
from t3jax.data.chat import PromptFormat, check_characters, encode_prompt
from t3jax.head_io import Head, check_head_fits, common_default, place_head
from t3jax.lm.model import LM
from t3jax.refinements import PLAIN, Refinements
from t3jax.sampling.batch import Asked, Batch
from t3jax.sampling.loop import Program, Weights
from t3jax.sampling.next_token import Controls, Logprobs
from t3jax.sampling.text import Detokenizer

REFUSAL_THRESHOLD = 3.0  # nats, see `SamplingOptions`
ABSURD_PERPLEXITY = 30.0  # under the base: answers above it are no language, see `generate`

# Where the base is not sure, its own draws are unlikely too. Measured with SmolLM2-135M, H the mean
# of its entropy along the answers: the perplexity of its own answers is .3 to 1.1 times exp(H), and
# that of broken ones above the limit 2.2 times and more. Answers that loop stay below both.
_TIMES_ITS_OWN = 2.0
_LARGEST = 1e6  # of T, s and what else divides or multiplies logits: far from float32's end
_SMALLEST = 1e-6

# A base to which a quarter of the vocabulary is as good as any has no language to lose.
_FLAT = 0.25


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw an answer.

    Attributes:
        max_new_tokens: Longest answer, tokens.
        temperature: Sampling temperature on the tilted distribution; 0 is greedy. 1 / T, drawn from
            all tokens, is plain guidance of the strength T · s.
        top_k: Draw among the k likeliest tokens; 0 among all.
        top_p: Draw among the likeliest tokens whose probability reaches p; 1 among all.
        min_p: Draw among tokens at least this share as likely as the likeliest; 0 among all.
        truncate_on: What decides top-k, top-p and min-p. "guided" is the guided distribution
            without its tempering: base logits + T · s · log f. "tilted" is the tempered one that is
            drawn from; its order of the tokens is the same, so top-k is too. "base" is the base
            model's: where it is sure of what is to be forgotten, a tight top-p or min-p keeps
            that token alone.
        repetition_penalty: Above 1, tokens already in prompt or answer become less likely.
        num_samples: Answers to each prompt.
        seed: Seed of the draws, 0 to 2^64 - 1.
        stop: Strings that end an answer; they are cut off. Special tokens may be in them.
        stop_ids: Token ids that end an answer, besides the model's own.
        logprobs: Whether to return log-probabilities of the chosen tokens.
        refusal: Text in the place of each answer whose `Sample.log_ratio` exceeds
            `refusal_threshold`; None serves the alternative answer. It needs T = 1.
        refusal_threshold: Nats. An answer drawn from the base itself exceeds it with a probability
            of at most exp(-threshold) (Markov's inequality).
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    truncate_on: str = "guided"
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool = False
    refusal: str | None = None
    refusal_threshold: float = REFUSAL_THRESHOLD

    def __post_init__(self):
        temperature, penalty = _number(self.temperature), _number(self.repetition_penalty)
        in_range = f"{_SMALLEST:g} to {_LARGEST:g}"
        checks = {
            "max_new_tokens": (1 <= _integer(self.max_new_tokens) <= 2**20, "1 to 2^20"),
            "temperature": (
                temperature == 0 or _SMALLEST <= temperature <= _LARGEST,
                f"0 (greedy) or more: {in_range}",
            ),
            "top_k": (0 <= _integer(self.top_k) < 2**31, "0 (all), or 1 to 2^31 - 1"),
            "top_p": (0 < _number(self.top_p) <= 1, "in (0, 1]"),
            "min_p": (0 <= _number(self.min_p) <= 1, "in [0, 1]"),
            "truncate_on": (
                self.truncate_on in ("guided", "base", "tilted"),
                "'guided', 'base' or 'tilted'",
            ),
            "repetition_penalty": (_SMALLEST <= penalty <= _LARGEST, in_range),
            "num_samples": (1 <= _integer(self.num_samples) <= 10**6, "1 to 10^6"),
            "seed": (0 <= _integer(self.seed) < 2**64, "an integer, 0 to 2^64 - 1"),
            "stop": (
                isinstance(self.stop, tuple | list)
                and all(isinstance(each, str) and each for each in self.stop),
                "non-empty strings",
            ),
            "stop_ids": (
                isinstance(self.stop_ids, tuple | list)
                and all(_integer(each) >= 0 for each in self.stop_ids),
                "token ids",
            ),
            "refusal": (
                self.refusal is None or (isinstance(self.refusal, str) and self.refusal.strip()),
                "a text, or None",
            ),
            "refusal_threshold": (_number(self.refusal_threshold) > 0, "positive"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def controls(self, rows: int, base_temperature: float, guidance_scale: float) -> Controls:
        """Makes the controls of rows that are all drawn so.

        Args:
            rows: B.
            base_temperature: T.
            guidance_scale: s.

        Returns:
            NumPy arrays `[B]`.
        """
        return Controls.filled(
            rows,
            base_temperature=base_temperature,
            guidance_scale=guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def truncates(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def returns_logprobs(self) -> bool:
        """Whether the program returns the log-probabilities under the served distribution."""
        return self.logprobs or self.refusal is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """An answer.

    Attributes:
        text: The answer, without special tokens and stop strings.
        tokens: Its token ids, the closing one included; those of a cut stop string too.
        base_logprobs: Log-probability of each token under the base model, nats; None unless asked.
        guided_logprobs: The same under the tempered and tilted distribution.
        base_perplexity: Perplexity of the tokens under the base model; None without a head, unless
            log-probabilities are asked for.
        log_ratio: Log-likelihood of the tokens under the served distribution less that under the
            base model, nats: how much the answer speaks for the head having changed it. None unless
            log-probabilities or a refusal are asked for.
        refused: Whether `text` is the refusal; the other fields are those of the answer drawn.
    """

    text: str
    tokens: list[int]
    base_logprobs: list[float] | None = None
    guided_logprobs: list[float] | None = None
    base_perplexity: float | None = None
    log_ratio: float | None = None
    refused: bool = False


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
                or s and none is given, refinements have no head, or a number is out of range.
        """
        heads = [head] if isinstance(head, Head) else list(head or ())
        for name, size in (("batch_size", batch_size), ("chunk", chunk)):
            if not 1 <= _integer(size) <= 2**20:
                raise ValueError(f"{name} must be 1 to 2^20, got {size!r}")
        for each in heads:
            check_head_fits(each, lm)
        if not heads and refinements != PLAIN:
            raise ValueError(f"the refinements {refinements.name} need a head")
        self.lm = lm
        if base_temperature is None:
            base_temperature = common_default(heads, "base_temperature", 1.0)
        if guidance_scale is None:
            guidance_scale = common_default(heads, "guidance_scale", 0.0)
        _check_guidance(base_temperature, guidance_scale)
        self.base_temperature = base_temperature
        self.guidance_scale = guidance_scale
        self.refinements = refinements
        self.prompt_format = prompt_format or PromptFormat()
        self.batch_size = batch_size
        self.chunk = chunk
        self._detokenizer = Detokenizer(lm.tokenizer)
        self._heads = tuple(each.config for each in heads)
        self._weights = Weights(
            lm.params,
            tuple(place_head(each.params, lm.mesh) for each in heads),
            tuple(np.float32(each.prior_shift) for each in heads),
        )

    def __call__(self, prompts: Sequence[str], *options: Any, **fields: Any) -> list[str]:
        """The answers' texts; see `generate`.

        With several samples for each prompt they follow one another, prompt by prompt.
        """
        return [sample.text for sample in self.generate(prompts, *options, **fields)]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        options: SamplingOptions | None = None,
        *,
        base_temperature: float | None = None,
        guidance_scale: float | None = None,
        progress: str | None = None,
        **fields: Any,
    ) -> list[Sample]:
        """Answers prompts.

        Args:
            prompts: Questions, rendered with the chat template; or token ids, taken as they are.
            options: How to draw; None takes the defaults, which are greedy.
            base_temperature: T for this call; None takes the sampler's.
            guidance_scale: s for this call; None takes the sampler's. T = 1, s = 0 is the base
                model, drawn with the same random numbers.
            progress: Label of a progress bar; None shows none.
            **fields: Fields of `SamplingOptions`, in the place of those in `options`.

        Returns:
            One `Sample` for each prompt, in order; with `num_samples` n, n consecutive ones each.

        Warns:
            UserWarning: If a head is served with s > 0 and the base finds the answers absurd: their
                median perplexity under it exceeds `ABSURD_PERPLEXITY`, and twice what its own draws
                have at the same places. Or if answers are empty: one under a head with s > 0, or
                most of the base's. Or, once a process, if a head is served with s > 0 and the
                base's distribution decides a truncation.

        Raises:
            ValueError: If an option is out of range, there are no prompts, a prompt is empty or
                holds a token that the model does not have, or prompt and answer together exceed
                the model's context.
            FloatingPointError: If logits or scores are NaN or infinite; names the prompt.
        """
        request = self._request(prompts, options, base_temperature, guidance_scale, fields)
        tokens: list[list[int]] = [[] for _ in request.rows]
        logprobs: list[list[Logprobs | None]] = [[] for _ in request.rows]
        hidden = not progress or not hosts.is_lead()
        with tqdm.tqdm(total=len(request.rows), desc=progress, delay=1, disable=hidden) as bar:
            for piece in self._batch(request).run():
                tokens[piece.prompt] += piece.tokens
                logprobs[piece.prompt].append(piece.logprobs)
                bar.update(piece.last)
        joined = [_joined(pieces) for pieces in logprobs]
        self._check_fluency(request, joined)
        samples = [self._sample(request, *answer) for answer in zip(tokens, joined, strict=True)]
        self._check_contents(request, samples)
        return samples

    def stream(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        options: SamplingOptions | None = None,
        *,
        base_temperature: float | None = None,
        guidance_scale: float | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """Answers one prompt, yielding text as it comes; `"".join` of it is the whole answer.

        Args:
            prompt: A question, or token ids.
            options: As for `generate`, with one sample.
            base_temperature: T for this call; None takes the sampler's.
            guidance_scale: s for this call; None takes the sampler's.
            **fields: As for `generate`.

        Yields:
            Pieces of text; with a `refusal` a single one, since the whole answer decides.

        Warns:
            UserWarning: As `generate`.
        """
        request = self._request([prompt], options, base_temperature, guidance_scale, fields)
        if len(request.rows) != 1:
            raise ValueError("stream gives one answer: num_samples must be 1")
        tokens: list[int] = []
        logprobs: list[Logprobs | None] = []
        shown = ""
        for piece in self._batch(request).run():
            tokens += piece.tokens
            logprobs.append(piece.logprobs)
            if request.options.refusal is not None:
                continue  # the whole answer decides
            sure = self._detokenizer.settled_text(tokens, request.options.stop)
            if sure.startswith(shown) and len(sure) > len(shown):
                yield sure[len(shown) :]
                shown = sure
        joined = _joined(logprobs)
        sample = self._sample(request, tokens, joined)
        if rest := sample.text[len(shown) :]:
            yield rest
        self._check_fluency(request, [joined])
        self._check_contents(request, [sample])

    def _request(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        options: SamplingOptions | None,
        base_temperature: float | None,
        guidance_scale: float | None,
        fields: dict[str, Any],
    ) -> "_Request":
        known = {field.name for field in dataclasses.fields(SamplingOptions)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown sampling options {unknown}; known: {sorted(known)}")
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError("prompts must be a list with at least one prompt")
        chosen = dataclasses.replace(options or SamplingOptions(), **fields)
        temperature = self.base_temperature if base_temperature is None else base_temperature
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        _check_guidance(temperature, scale)
        if chosen.stop and self.lm.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which the model lacks; use stop_ids")
        for name, ends in (("stop_ids", chosen.stop_ids), ("eos_ids", self.lm.eos_ids)):
            if beyond := [id for id in ends if not 0 <= _integer(id) < self.lm.vocab_size]:
                raise ValueError(
                    f"{name} {beyond}: {self.lm.name} has the tokens 0 to {self.lm.vocab_size - 1} "
                    "only, so that no answer could end there"
                )
        if chosen.refusal is not None and self._tilts(scale) and temperature != 1:
            raise ValueError(
                f"a refusal needs base_temperature = 1, got {temperature}: tempering changes every "
                "answer, so that its log-likelihood ratio says nothing about the head"
            )
        if chosen.truncate_on == "base" and chosen.truncates and self._tilts(scale):
            _warn_of_the_base()
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
            if self.lm.tokenizer is None:
                raise ValueError(f"prompt {i} is a text, and the model has no tokenizer; give ids")
            try:
                check_characters(prompt, self.lm.max_position)
                ids = encode_prompt(self.lm.tokenizer, prompt, self.prompt_format)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
            if not ids.size:
                raise ValueError(f"prompt {i} has no token in the model's prompt format")
        else:
            ids = np.asarray(prompt)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
                raise ValueError(f"prompt {i}: expected a text or token ids, got {prompt!r:.80}")
        if beyond := ids[(ids < 0) | (ids >= self.lm.vocab_size)].tolist():
            raise ValueError(
                f"prompt {i} holds token id {beyond[0]}: token ids must lie in "
                f"[0, {self.lm.vocab_size}), the vocabulary of {self.lm.name}"
            )
        return ids.astype(np.int32)

    def _batch(self, request: "_Request") -> Batch:
        """All answers of a request."""
        options = request.options
        program = Program(
            self.lm.apply,
            self.lm.unembed,
            self.lm.init_cache,
            self._heads,
            options.truncate_on,
            options.returns_logprobs,
            self.lm.mesh,
            self.refinements,
        )

        def ended(tokens: list[int], new: int) -> int | None:
            return self._detokenizer.stop_at(tokens, new, options.stop)

        return Batch(
            program,
            self._weights,
            [Asked(request.encoded[prompt], (prompt, j)) for prompt, j in request.rows],
            controls=request.controls,
            stop_ids=[*self.lm.eos_ids, *options.stop_ids],
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            rows=self.batch_size,
            chunk=self.chunk,
            ended=ended if options.stop else None,
        )

    def _tilts(self, scale: float) -> bool:
        """Whether what is served is not the base alone."""
        return bool(self._heads) and scale > 0

    def _check_fluency(self, request: "_Request", answers: Sequence[Logprobs | None]) -> None:
        """Warns if the base finds answers absurd."""
        measured = [answer for answer in answers if answer is not None]
        if not measured or not self._tilts(request.guidance_scale):
            return
        median = float(np.median([_perplexity(answer.base) for answer in measured]))
        entropies = np.concatenate([np.asarray(answer.base_entropy) for answer in measured])
        usual = _perplexity(-entropies)
        if usual > _FLAT * self.lm.vocab_size:
            return
        if median > max(ABSURD_PERPLEXITY, _TIMES_ITS_OWN * usual):
            strength = request.base_temperature * request.guidance_scale
            warnings.warn(
                f"the answers are no language to {self.lm.name}: their median perplexity under it "
                f"is {median:.0f}, its own draws have about {usual:.0f}, and T·s is {strength:g} "
                f"(T = {request.base_temperature:g}, s = {request.guidance_scale:g}); take a "
                "smaller guidance_scale, base_temperature = 1, a head trained by distillation, or "
                "a top_p below 1",
                stacklevel=3,
            )

    def _sample(self, request: "_Request", tokens: list[int], logprobs: Logprobs | None) -> Sample:
        text = self._detokenizer.text(tokens, request.options.stop)
        if logprobs is None:
            return Sample(text, tokens)
        options = request.options
        sample = Sample(text, tokens, base_perplexity=_perplexity(logprobs.base))
        if not options.returns_logprobs:
            return sample
        assert logprobs.guided is not None  # the program returns it
        log_ratio = float(np.sum(logprobs.guided - logprobs.base, dtype=np.float64))
        sample = dataclasses.replace(sample, log_ratio=log_ratio)
        if options.refusal is not None and log_ratio > options.refusal_threshold:
            sample = dataclasses.replace(sample, text=options.refusal, refused=True)
        if not options.logprobs:
            return sample
        base, _, guided = (np.asarray(part).tolist() for part in logprobs)
        return dataclasses.replace(sample, base_logprobs=base, guided_logprobs=guided)

    def _check_contents(self, request: "_Request", samples: Sequence[Sample]) -> None:
        """Warns of answers without contents: nothing leaks from them, and nothing is forgotten."""
        closing = {*self.lm.eos_ids, *request.options.stop_ids}

        def is_empty(sample: Sample) -> bool:
            if self.lm.tokenizer is None:
                return closing.issuperset(sample.tokens)
            return not sample.text.strip()

        count = sum(map(is_empty, samples))
        # A base model ends at once now and then, where it is drawn from for its own text.
        if 2 * count > len(samples) or (count and self._tilts(request.guidance_scale)):
            warnings.warn(
                f"{count} of {len(samples)} answers are empty: they end before any word. That is "
                "no forgetting; look at stop, at stop_ids, and at what the base model answers",
                stacklevel=3,
            )


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked call: options, the method's T and s, prompts, and (prompt, sample) of each row."""

    options: SamplingOptions
    base_temperature: float
    guidance_scale: float
    encoded: list[np.ndarray]
    rows: list[tuple[int, int]]

    def controls(self, rows: int) -> Controls:
        return self.options.controls(rows, self.base_temperature, self.guidance_scale)


@functools.cache  # once a process
def _warn_of_the_base() -> None:
    warnings.warn(
        'truncate_on="base" can bring the forgotten text back: where the base is sure, its nucleus '
        "is the token to forget, and a tight top_p or min_p keeps that token alone; use "
        'truncate_on="guided"',
        stacklevel=4,
    )


def _check_guidance(base_temperature: float, guidance_scale: float) -> None:
    if not _SMALLEST <= _number(base_temperature) <= _LARGEST:
        raise ValueError(
            f"base_temperature must be positive, {_SMALLEST:g} to {_LARGEST:g}, got "
            f"{base_temperature!r}"
        )
    if not 0 <= _number(guidance_scale) <= _LARGEST:
        raise ValueError(f"guidance_scale must be 0 to {_LARGEST:g}, got {guidance_scale!r}")


def _number(value: Any) -> float:
    """A number as it is, and anything else as NaN, which no range holds."""
    try:
        return math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _integer(value: Any) -> int:
    """An integer as it is, and anything else as -1."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1


def _joined(pieces: Sequence[Logprobs | None]) -> Logprobs | None:
    """Of a whole answer, from those of its pieces."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _perplexity(logprobs: Any) -> float:
    """Of tokens with these log-probabilities; of surprises beyond all floats, a huge one."""
    return math.exp(min(-float(np.mean(logprobs, dtype=np.float64)), 700.0))
