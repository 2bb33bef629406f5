"""The tokenizer of a model folder, and the tokens that end a text."""

import pathlib
from collections.abc import Iterable
from typing import Any

import msgspec

from t3jax.json_files import read_json
from t3jax.lm.config import LMConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The folder's tokenizer: of a class of transformers, never of the folder's own code."""
    from transformers import AutoTokenizer  # slow to import: only who loads a model waits

    settings = folder / "tokenizer_config.json"
    if settings.exists():
        read_json(settings, _TokenizerSettings)
    try:
        # Without any of these some versions of transformers make an empty tokenizer up.
        if not has_tokenizer(folder):
            raise FileNotFoundError(f"there is none of {', '.join(_TOKENIZER_FILES)}")
        # Left open, transformers would ask on stdin whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # transformers has pages
        raise ValueError(
            f"{folder}: the tokenizer could not be read ({reason:.300}); expected tokenizer.json "
            "and tokenizer_config.json beside config.json, of a class that transformers has: code "
            "of the folder (auto_map) is never run"
        ) from error


def check_vocabulary(path: pathlib.Path, tokenizer: Any, config: LMConfig) -> None:
    """Checks that a tokenizer is the model's.

    Some tokens may lie beyond the embedding, such as Gemma 3's of images or a [PAD] that was added:
    a text that holds one is refused when it is read.
    """
    ids = tokenizer.get_vocab().values()
    beyond = sum(i >= config.vocab_size for i in ids)
    if beyond > len(ids) / 10:
        raise ValueError(
            f"{path}: {beyond} of the tokenizer's {len(ids)} tokens, up to id {max(ids)}, lie "
            f"beyond the vocab_size {config.vocab_size} of the config; the tokenizer belongs to "
            "another model"
        )


class _TokenizerSettings(msgspec.Struct):
    """What of tokenizer_config.json would fail late if it were of another type."""

    model_max_length: float | None = None


class _Ends(msgspec.Struct):
    """What a JSON file of a folder says about the end of a text."""

    eos_token_id: int | list[int] | None = None

    def ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


class _ConfigEnds(_Ends):
    text_config: _Ends | None = None


def read_named_ends(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text: of generation_config.json, and of config.json."""
    ids: tuple[int, ...] = ()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            ends = read_json(path, _ConfigEnds)
            ids += ids_within(path, ends.ids(), vocab_size)
            if ends.text_config is not None:
                ids += ids_within(path, ends.text_config.ids(), vocab_size)
    return ids


def join_ends(
    folder: pathlib.Path, named: tuple[int, ...], tokenizer: Any, vocab_size: int
) -> tuple[int, ...]:
    """Tokens that end a text: those that files of the folder name, then the tokenizer's."""
    own = tokenizer.eos_token_id
    ids = (
        named if own is None else named + ids_within(f"{folder}: the tokenizer", [own], vocab_size)
    )
    if not ids:
        raise ValueError(
            f"{folder}: no end-of-text token: neither generation_config.json, config.json nor the "
            "tokenizer names one"
        )
    return tuple(dict.fromkeys(ids))


def ids_within(where: Any, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids of eos tokens, each in the vocabulary."""
    ids = tuple(ids)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ValueError(
                f"{where}: eos_token_id {i!r}, expected a token id from 0 to {vocab_size - 1}, "
                "within the model's vocabulary"
            )
    return ids
