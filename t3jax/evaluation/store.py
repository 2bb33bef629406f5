"""Scores and answers of a model, computed once and stored on disk.

A file's name ends in its cache key, a digest of all that it depends on (model, heads, T and s,
tokens, options, code; see `t3jax.digests`): a change of any of them computes anew. Files are
written whole or not at all, so that a run resumes where it was killed. A file whose bytes have
changed is computed anew.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from t3jax import checked, digests, hosts
from t3jax.data.chat import Example
from t3jax.evaluation.scoring import TextScores, padding_id, score_texts
from t3jax.evaluation.settings import Setting
from t3jax.head_io import Head
from t3jax.lm.model import LM
from t3jax.sampling import Sample, Sampler

_SCORING_CODE = "t3jax.evaluation.scoring"
_SAMPLING_CODE = "t3jax.sampling.sampler"
_DIGITS = 20  # of a cache key in a file's name


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
        """Settings refer to the heads by index; `rows` answers are decoded together.

        The folder is made with the first result.
        """
        self.lm = lm
        self.heads = tuple(heads)
        self.folder = pathlib.Path(folder)
        self.rows = rows
        self.progress = progress

    def with_heads(self, heads: Sequence[Head]) -> "Store":
        """A store of the same model and folder with other heads."""
        return Store(self.lm, heads, self.folder, rows=self.rows, progress=self.progress)

    def scores(
        self,
        label: str,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        reference_mask: bool = False,
        moments: bool = False,
    ) -> list[TextScores]:
        """Scores texts; the settings that are not stored share one pass over the texts."""
        digest = digests.examples_digest(examples)
        paths = self._paths(
            [
                (
                    f"scores-{label}-{setting.name}",
                    [self._distribution(setting), digest, f"{reference_mask} {moments}"],
                )
                for setting in settings
            ],
            ".npz",
            _SCORING_CODE,
        )
        scores = [checked.read_stored(path, _read_scores) for path in paths]
        stored = hosts.of_lead([setting_scores is not None for setting_scores in scores])
        if todo := np.flatnonzero(~stored).tolist():
            computed = score_texts(
                self.lm,
                examples,
                [settings[k] for k in todo],
                self.heads,
                reference_mask=reference_mask,
                moments=moments,
                progress=f"score {label}" if self.progress else None,
            )
            for k, new in zip(todo, computed, strict=True):
                if hosts.is_lead():
                    _write_scores(paths[k], new)
                hosts.wait_for(paths[k])
                scores[k] = _read_scores(paths[k])
        return [
            _read_scores(path) if setting_scores is None else setting_scores
            for path, setting_scores in zip(paths, scores, strict=True)
        ]

    def answers(
        self,
        label: str,
        prompts: Sequence[np.ndarray],
        setting: Setting,
        reference_mask: bool = False,
        **options: Any,
    ) -> list[Sample]:
        """Answers prompts, given as token ids; the samples are ordered by prompt.

        Greedy text depends on T · s alone, so settings of equal product share one run, unless they
        are gated or protect tokens. `label` is for file names and the progress bar.
        `reference_mask` removes padding tokens inside prompts, since the reference evaluator masks
        them, and positions do not count them, when it generates; a prompt that ends in padding
        raises a ValueError. The options are fields of `SamplingOptions`.
        """
        if reference_mask:
            prompts = _drop_padding(prompts, padding_id(self.lm), label)
        setting = _merge_greedy(setting, options.get("temperature", 0.0))
        digest = digests.examples_digest([Example(prompt, len(prompt)) for prompt in prompts])
        parts = [self._distribution(setting), digest, repr(sorted(options.items()))]
        (path,) = self._paths([(f"answers-{label}-{setting.name}", parts)], ".json", _SAMPLING_CODE)
        stored = checked.read_stored(path, checked.read_json) if hosts.is_lead() else None
        if not hosts.of_lead(stored is not None):
            samples = self._make_sampler(setting).generate(
                [prompt.tolist() for prompt in prompts],
                progress=f"answer {label} ({setting.name})" if self.progress else None,
                **options,
            )
            content = [{"text": sample.text, "tokens": sample.tokens} for sample in samples]
            if hosts.is_lead():
                checked.write_json(path, content)
            hosts.wait_for(path)
        return [Sample(**sample) for sample in checked.read_json(path)]

    def _paths(
        self, results: Sequence[tuple[str, list[str]]], suffix: str, code: str
    ) -> list[pathlib.Path]:
        """The files of results, each given as its name and the parts of its cache key.

        The same distribution may have several names: the key alone identifies a file.
        """
        model, code = digests.model_digest(self.lm), digests.code_digest(code)
        stored = {path.stem[-_DIGITS:]: path for path in self.folder.glob(f"*{suffix}")}
        keys = [digests.make_key(model, *parts, code)[:_DIGITS] for _, parts in results]
        return [
            stored.get(key, self.folder / f"{name}-{key}{suffix}")
            for (name, _), key in zip(results, keys, strict=True)
        ]

    @functools.cached_property
    def _head_digests(self) -> list[str]:
        return [
            f"{head.config} {head.prior_shift!r} {digests.params_digest(head.params)}"
            for head in self.heads
        ]

    def _distribution(self, setting: Setting) -> str:
        knobs = f"{setting.base_temperature!r} {setting.guidance_scale!r} {setting.refinements}"
        return " ".join([knobs, *(self._head_digests[index] for index in setting.heads)])

    def _make_sampler(self, setting: Setting) -> Sampler:
        # The base model runs in a head's program, at s = 0: one program fewer to compile.
        heads = [self.heads[index] for index in setting.heads] or self.heads[:1]
        return Sampler(
            self.lm,
            heads,
            base_temperature=setting.base_temperature,
            guidance_scale=setting.guidance_scale,
            refinements=setting.refinements,
            batch_size=self.rows,
        )


def _drop_padding(prompts: Sequence[np.ndarray], padding: int, label: str) -> list[np.ndarray]:
    for i, prompt in enumerate(prompts):
        if prompt[-1] == padding:
            raise ValueError(
                f"{label}, prompt {i} ends in the padding token {padding}, which "
                "reference_mask would mask; use correct masking for this model"
            )
    return [prompt[prompt != padding] for prompt in prompts]


def _merge_greedy(setting: Setting, temperature: float) -> Setting:
    """Maps settings of the same greedy answers to one of them."""
    if temperature != 0 or setting.refinements.gated or setting.refinements.protected:
        return setting
    product = setting.base_temperature * setting.guidance_scale
    if not product:
        return Setting(setting.name)
    return dataclasses.replace(setting, base_temperature=1.0, guidance_scale=product)


def _write_scores(path: pathlib.Path, scores: TextScores) -> None:
    arrays = {name: value for name, value in vars(scores).items() if value is not None}
    checked.write_arrays(path, arrays)


def _read_scores(path: pathlib.Path) -> TextScores:
    return TextScores(**checked.read_arrays(path))
