"""What a model says of texts and prompts, computed once and kept on disk.

An evaluation asks for scores and answers by setting; what an earlier run finished is read. A file's
name carries a digest of all that it depends on (model, heads, T and s, tokens, options, code; see
`t3jax.digests`): a change of any of them computes anew, and a file appears whole or not at all, so
that a run that was killed goes on where it was. A file whose bytes have changed is computed anew.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from t3jax import checked, digests, hosts
from t3jax.data.chat import Example
from t3jax.evaluation.scoring import Setting, TextScores, padding_id, score_texts
from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.sampling import Sample, Sampler

_SCORING_CODE = "t3jax.evaluation.scoring"
_SAMPLING_CODE = "t3jax.sampling.sampler"


class Store:
    """Scores and answers of a model and its heads, kept in a folder.

    Several stores may share a folder.
    """

    def __init__(
        self,
        lm: LM,
        heads: Sequence[Head] = (),
        folder: pathlib.Path | str = "out/evaluation/store",
        *,
        rows: int = 16,
        progress: bool = False,
    ):
        """Remembers what to compute with; computes and writes nothing.

        Args:
            lm: The base model.
            heads: The heads that settings refer to by index.
            folder: Where results are kept; made when the first is.
            rows: Answers decoded together.
            progress: Whether to show progress bars.
        """
        self.lm = lm
        self.heads = tuple(heads)
        self.folder = pathlib.Path(folder)
        self.rows = rows
        self.progress = progress

    def with_heads(self, heads: Sequence[Head]) -> "Store":
        """The same model and folder with other heads."""
        return Store(self.lm, heads, self.folder, rows=self.rows, progress=self.progress)

    def scores(
        self,
        label: str,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        reference_mask: bool = False,
        moments: bool = False,
    ) -> list[TextScores]:
        """Scores texts; those settings that are not stored share one pass over the texts.

        Args:
            label: What the texts are, for file names and the progress bar.
            examples: Tokenised texts.
            settings: What to score under.
            reference_mask: See `score_texts`.
            moments: See `score_texts`.

        Returns:
            One `TextScores` for each setting.

        Raises:
            ValueError: As `score_texts`.
        """
        digest = digests.examples_digest(examples)
        paths = [
            self._path(
                f"scores-{label}-{setting.name}",
                ".npz",
                [self._distribution(setting), digest, f"{reference_mask} {moments}"],
                _SCORING_CODE,
            )
            for setting in settings
        ]
        scores = [checked.read_stored(path, _read_scores) for path in paths]
        stored = hosts.of_lead([of_setting is not None for of_setting in scores])
        if todo := np.flatnonzero(~stored).tolist():
            found = score_texts(
                self.lm,
                examples,
                [settings[k] for k in todo],
                self.heads,
                reference_mask=reference_mask,
                moments=moments,
                progress=f"score {label}" if self.progress else None,
            )
            for k, new in zip(todo, found, strict=True):
                if hosts.is_lead():
                    _write_scores(paths[k], new)
                hosts.wait_for(paths[k])
                scores[k] = _read_scores(paths[k])
        return [
            _read_scores(path) if of_setting is None else of_setting
            for path, of_setting in zip(paths, scores, strict=True)
        ]

    def answers(
        self,
        label: str,
        prompts: Sequence[np.ndarray],
        setting: Setting,
        reference_mask: bool = False,
        **options: Any,
    ) -> list[Sample]:
        """Answers prompts.

        Greedy text depends on T · s alone, so settings of equal product share one run, unless they
        are gated or protect tokens.

        Args:
            label: What the prompts are, for file names and the progress bar.
            prompts: Token ids.
            setting: What to sample from.
            reference_mask: Mask padding tokens inside prompts, as the reference evaluator does when
                it generates: positions then do not count them, as if they were not there.
            **options: Fields of `SamplingOptions`.

        Returns:
            Samples, prompt by prompt.

        Raises:
            ValueError: As `Sampler.generate`; or a prompt ends in padding under `reference_mask`.
        """
        if reference_mask:
            padding = padding_id(self.lm)
            for i, prompt in enumerate(prompts):
                if prompt[-1] == padding:
                    raise ValueError(
                        f"{label}, prompt {i} ends in the padding token {padding}, which "
                        "reference_mask would mask; use correct masking for this model"
                    )
            prompts = [prompt[prompt != padding] for prompt in prompts]
        refined = setting.refinements.gated or setting.refinements.protected
        if options.get("temperature", 0.0) == 0 and not refined:
            product = setting.base_temperature * setting.guidance_scale
            setting = (
                dataclasses.replace(setting, base_temperature=1.0, guidance_scale=product)
                if product
                else Setting(setting.name)
            )
        digest = digests.examples_digest([Example(prompt, len(prompt)) for prompt in prompts])
        path = self._path(
            f"answers-{label}-{setting.name}",
            ".json",
            [self._distribution(setting), digest, repr(sorted(options.items()))],
            _SAMPLING_CODE,
        )
        stored = checked.read_stored(path, checked.read_json) if hosts.is_lead() else None
        if not hosts.of_lead(stored is not None):
            samples = self._sampler(setting).generate(
                [prompt.tolist() for prompt in prompts],
                progress=f"answer {label} ({setting.name})" if self.progress else None,
                **options,
            )
            content = [{"text": sample.text, "tokens": sample.tokens} for sample in samples]
            if hosts.is_lead():
                checked.write_json(path, content)
            hosts.wait_for(path)
        return [Sample(**sample) for sample in checked.read_json(path)]

    def _path(self, name: str, suffix: str, parts: list[str], code: str) -> pathlib.Path:
        model = digests.model_digest(self.lm)
        digest = digests.make_key(model, *parts, digests.code_digest(code))[:20]
        # The same distribution may have several names: only the digest identifies a file.
        stored = next(self.folder.glob(f"*-{digest}{suffix}"), None)
        return stored or self.folder / f"{name}-{digest}{suffix}"

    @functools.cached_property
    def _head_digests(self) -> list[str]:
        return [
            f"{head.config} {head.prior_shift!r} {digests.params_digest(head.params)}"
            for head in self.heads
        ]

    def _distribution(self, setting: Setting) -> str:
        knobs = f"{setting.base_temperature!r} {setting.guidance_scale!r} {setting.refinements}"
        return " ".join([knobs, *(self._head_digests[index] for index in setting.heads)])

    def _sampler(self, setting: Setting) -> Sampler:
        # The base model is any head's program at s = 0: one program fewer to compile.
        heads = [self.heads[index] for index in setting.heads] or self.heads[:1]
        return Sampler(
            self.lm,
            heads,
            base_temperature=setting.base_temperature,
            guidance_scale=setting.guidance_scale,
            refinements=setting.refinements,
            batch_size=self.rows,
        )


def _write_scores(path: pathlib.Path, scores: TextScores) -> None:
    arrays = {name: value for name, value in vars(scores).items() if value is not None}
    checked.write_arrays(path, arrays)


def _read_scores(path: pathlib.Path) -> TextScores:
    return TextScores(**checked.read_arrays(path))
