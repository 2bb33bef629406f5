"""Text in, text out: the `Sampler`.

It renders prompts, answers them with `t3jax.sampling.batch`, finds stop strings and turns tokens
into text. It has no random state: the same call gives the same answers.
"""

import dataclasses
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
from t3jax.sampling import warn
from t3jax.sampling.batch import Answering, Batch, Prompt
from t3jax.sampling.loop import Program, Weights
from t3jax.sampling.next_token import Controls, Logprobs
from t3jax.sampling.options import SamplingOptions, as_integer, check_guidance
from t3jax.sampling.text import Detokenizer


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
        log_ratio: Log-likelihood of the tokens under the served distribution less the one under
            the base model, nats: the evidence that the head changed the answer. None unless
            log-probabilities or a refusal are asked for.
        refused: Whether `text` is the refusal; the other fields describe the answer drawn.
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

    A value that changes from call to call (T, s, temperature, top-p, ...) never recompiles. Another
    number of rows, bucket of prompt or answer lengths, choice of log-probabilities, or distribution
    that decides truncation does.

    Example:
        >>> sampler = t3jax.Sampler(t3jax.load_lm("demo/base"))
        >>> sampler(["When is the birthday of Ivan Rossi, and which city saw the birth?"])
        ['It was on 17 March 1985 that Ivan Rossi was born, in the city of Toronto.']
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
            chunk: Steps between two host syncs: a finished row wastes fewer.

        Raises:
            ValueError: If a head's vocabulary or width is not the model's, heads have different T
                or s and none is given, refinements have no head, or a number is out of range.
        """
        heads = [head] if isinstance(head, Head) else list(head or ())
        for name, size in (("batch_size", batch_size), ("chunk", chunk)):
            if not 1 <= as_integer(size) <= 2**20:
                raise ValueError(f"{name} must be 1 to 2^20, got {size!r}")
        for classifier in heads:
            check_head_fits(classifier, lm)
        if not heads and refinements != PLAIN:
            raise ValueError(f"the refinements {refinements.name} need a head")
        self.lm = lm
        if base_temperature is None:
            base_temperature = common_default(heads, "base_temperature", 1.0)
        if guidance_scale is None:
            guidance_scale = common_default(heads, "guidance_scale", 0.0)
        check_guidance(base_temperature, guidance_scale)
        self.base_temperature = base_temperature
        self.guidance_scale = guidance_scale
        self.refinements = refinements
        self.prompt_format = prompt_format or PromptFormat()
        self.batch_size = batch_size
        self.chunk = chunk
        self._detokenizer = Detokenizer(lm.tokenizer)
        self._heads = tuple(classifier.config for classifier in heads)
        self._weights = Weights(
            lm.params,
            tuple(place_head(classifier.params, lm.mesh) for classifier in heads),
            tuple(np.float32(classifier.prior_shift) for classifier in heads),
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
                median perplexity under it exceeds `warn.ABSURD_PERPLEXITY`, and twice that of its
                own draws at the same places. If answers are empty: one under a head with s > 0, or
                most of the base's. Once a process, if a head is served with s > 0 and the base's
                distribution decides a truncation.

        Raises:
            ValueError: If an option is out of range, there are no prompts, a prompt is empty or
                holds a token that the model does not have, or prompt and answer together exceed
                the model's context.
            FloatingPointError: If logits or scores are NaN or infinite; names the prompt.
        """
        request = self._make_request(prompts, options, base_temperature, guidance_scale, fields)
        tokens: list[list[int]] = [[] for _ in request.rows]
        logprobs: list[list[Logprobs | None]] = [[] for _ in request.rows]
        hidden = not progress or not hosts.is_lead()
        with tqdm.tqdm(total=len(request.rows), desc=progress, delay=1, disable=hidden) as bar:
            for piece in self._make_batch(request).run():
                tokens[piece.prompt] += piece.tokens
                logprobs[piece.prompt].append(piece.logprobs)
                bar.update(piece.last)
        joined = [_join(pieces) for pieces in logprobs]
        samples = [self._sample(request, *answer) for answer in zip(tokens, joined, strict=True)]
        self._warn(request, joined, samples)
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

        The arguments are those of `generate`, with one sample.

        Yields:
            Pieces of text; with a `refusal` a single one, since the whole answer decides.

        Warns:
            UserWarning: As `generate`.
        """
        request = self._make_request([prompt], options, base_temperature, guidance_scale, fields)
        if len(request.rows) != 1:
            raise ValueError("stream gives one answer: num_samples must be 1")
        tokens: list[int] = []
        logprobs: list[Logprobs | None] = []
        shown = ""
        for piece in self._make_batch(request).run():
            tokens += piece.tokens
            logprobs.append(piece.logprobs)
            if request.options.refusal is not None:
                continue  # the whole answer decides
            sure = self._detokenizer.settled_text(tokens, request.options.stop)
            if sure.startswith(shown) and len(sure) > len(shown):
                yield sure[len(shown) :]
                shown = sure
        joined = _join(logprobs)
        sample = self._sample(request, tokens, joined)
        if rest := sample.text[len(shown) :]:
            yield rest
        self._warn(request, [joined], [sample])

    def _make_request(
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
        check_guidance(temperature, scale)
        if chosen.stop and self.lm.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, which the model lacks; use stop_ids")
        for name, ends in (("stop_ids", chosen.stop_ids), ("eos_ids", self.lm.eos_ids)):
            if beyond := [id for id in ends if not 0 <= as_integer(id) < self.lm.vocab_size]:
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
            warn.warn_of_the_base()
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

    def _make_batch(self, request: "_Request") -> Batch:
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

        def find_end(tokens: list[int], new: int) -> int | None:
            return self._detokenizer.stop_at(tokens, new, options.stop)

        answering = Answering(
            request.controls,
            [*self.lm.eos_ids, *options.stop_ids],
            options.max_new_tokens,
            options.seed,
            find_end if options.stop else None,
        )
        prompts = [Prompt(request.encoded[i], (i, j)) for i, j in request.rows]
        return Batch(program, self._weights, prompts, answering, self.batch_size, self.chunk)

    def _tilts(self, scale: float) -> bool:
        """Whether a head tilts the served distribution."""
        return bool(self._heads) and scale > 0

    def _sample(self, request: "_Request", tokens: list[int], logprobs: Logprobs | None) -> Sample:
        text = self._detokenizer.text(tokens, request.options.stop)
        if logprobs is None:
            return Sample(text, tokens)
        options = request.options
        sample = Sample(text, tokens, base_perplexity=warn.perplexity(logprobs.base))
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

    def _warn(
        self, request: "_Request", answers: Sequence[Logprobs | None], samples: Sequence[Sample]
    ) -> None:
        """Warns of absurd and of empty answers."""
        tilts = self._tilts(request.guidance_scale)
        if tilts:
            warn.warn_of_absurd_answers(
                [answer for answer in answers if answer is not None],
                request.base_temperature,
                request.guidance_scale,
                self.lm.name,
                self.lm.vocab_size,
            )
        closing = {*self.lm.eos_ids, *request.options.stop_ids}

        def is_empty(sample: Sample) -> bool:
            if self.lm.tokenizer is None:
                return closing.issuperset(sample.tokens)
            return not sample.text.strip()

        count = sum(map(is_empty, samples))
        # A base model that samples its own text gives an empty answer now and then.
        if 2 * count > len(samples) or (count and tilts):
            warn.warn_of_empty_answers(count, len(samples))


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


def _join(pieces: Sequence[Logprobs | None]) -> Logprobs | None:
    """The log-probabilities of a whole answer."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
