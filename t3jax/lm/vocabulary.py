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
    """Loads the folder's tokenizer, of a class of transformers, never of the folder's own code."""
    from transformers import AutoTokenizer  # here, since the import is slow

    settings = folder / "tokenizer_config.json"
    if settings.exists():
        read_json(settings, _TokenizerSettings)
    try:
        # Without such a file some versions of transformers return an empty tokenizer.
        if not has_tokenizer(folder):
            raise FileNotFoundError(f"there is none of {', '.join(_TOKENIZER_FILES)}")
        # Without trust_remote_code transformers asks on stdin whether to run the folder's code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # transformers' messages are long.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder}: the tokenizer could not be read ({reason:.300}); expected tokenizer.json "
            "and tokenizer_config.json beside config.json, of a class that transformers has: code "
            "of the folder (auto_map) is never run"
        ) from error


def check_vocabulary(path: pathlib.Path, tokenizer: Any, config: LMConfig) -> None:
    """Checks that a tokenizer is the model's.

    Up to a tenth of its tokens may have no row in the embedding, such as Gemma 3's image tokens or
    an added [PAD]: a text with one is refused when it is read.
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
    """The field of tokenizer_config.json that would fail late if it were of another type."""

    model_max_length: float | None = None


class _Ends(msgspec.Struct):
    """The tokens that end a text by a JSON file of a folder."""

    eos_token_id: int | list[int] | None = None

    def ids(self) -> tuple[int, ...]:
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


class _ConfigEnds(_Ends):
    text_config: _Ends | None = None


def read_named_ends(folder: pathlib.Path, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text by generation_config.json and config.json."""
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
    ids, eos_id = named, tokenizer.eos_token_id
    if eos_id is not None:
        ids += ids_within(f"{folder}: the tokenizer", [eos_id], vocab_size)
    if not ids:
        raise ValueError(
            f"{folder}: no end-of-text token: neither generation_config.json, config.json nor the "
            "tokenizer names one"
        )
    return tuple(dict.fromkeys(ids))


def ids_within(source: object, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids of eos tokens, after a check that each is in the vocabulary."""
    ids = tuple(ids)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ValueError(
                f"{source}: eos_token_id {i!r}, expected a token id from 0 to {vocab_size - 1}, "
                "within the model's vocabulary"
            )
    return ids
