"""The tokenizer of a GGUF file, and the tokens that end an answer."""

from collections.abc import Mapping
from typing import Any

from t3jax.lm.gguf_file import GGUFFile, not_installed

# Tokens of these types are never cut.
_CONTROL, _USER_DEFINED = 3, 4
# Byte-level tokenizers, by llama.cpp's names of their pre-tokenizers. Those in tiktoken's manner
# look up whole words before they merge, and start with a bos.
_TIKTOKEN = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "midm-2.0", "pixtral", "tekken"),
)
# Pre-tokenizers like GPT-2's; some also split digits, but no merge has a digit.
_LIKE_GPT2 = (
    *("command-r", "exaone4", "gpt-2", "mpt", "olmo", "phi-2", "refact", "smollm", "starcoder"),
)
_CUT_LIKE = {"chatglm-bpe": "llama-bpe", "glm4": "llama-bpe", "stablelm2": "qwen2"}
_KINDS = ("gpt2", "llama", "gemma4")
_SENTENCEPIECE = ("tokens", "token_type", "scores", "merges")  # the parts of such a tokenizer
# Files name one token that ends a text; chat models also end turns with others.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
# Ends of answers in several channels, of which <|end|> ends one.
_ANSWER_ENDS = ("<|return|>", "<|call|>")


def read_tokenizer(file: GGUFFile) -> Any:
    """Makes a transformers tokenizer from a file's, chat template included.

    Raises:
        ValueError: If the file has none, or one that would not be read as llama.cpp reads it.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import: only who loads a model waits

    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as conversion
    except ImportError as error:
        raise not_installed("transformers 5.22") from error

    prefix = "tokenizer.ggml."
    stored = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    tokens, kind, cut = (stored.get(key) for key in ("tokens", "model", "pre"))
    splits = dict(conversion.GGUF_PRE_TOKENIZER_SPLITS)
    splits |= {name: splits[other] for name, other in _CUT_LIKE.items()}
    known = {*splits, *_LIKE_GPT2}
    if not tokens:
        raise ValueError(f"{file.path}: no tokenizer in it (tokenizer.ggml.tokens is missing)")
    if kind not in _KINDS:
        raise ValueError(
            f"{file.path}: tokenizer {kind!r} is not supported; known: {', '.join(_KINDS)}"
        )
    if kind == "gpt2" and cut not in known:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre {cut!r} is not supported, so text would be cut "
            f"wrongly; known: {', '.join(sorted(known))}"
        )
    try:
        if kind == "gpt2":  # transformers' own way would add GPT-2's special token to all of them
            backend = _make_byte_level(stored, splits.get(str(cut)))
        else:
            parts = {key: stored[key] for key in _SENTENCEPIECE if key in stored}
            parts["tokenizer_type"] = kind
            backend, _ = conversion.convert_gguf_tokenizer(file.architecture, parts)
            if file.architecture == "llama" and not stored.get("add_space_prefix", True):
                backend.pre_tokenizer.prepend_scheme = "never"
    except Exception as error:  # lists that do not fit each other raise errors of many types
        raise ValueError(
            f"{file.path}: the tokenizer could not be read ({type(error).__name__}: {error}); "
            "expected tokens, their types, and merges or scores that fit each other"
        ) from error
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _read_token_id(file, key) for name, key in names.items()}
    adds_bos = stored.get("add_bos_token", kind == "llama" or cut in _TIKTOKEN)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
        # Gemma 4's files say that they add one, unlike its folders: its chat template does.
        add_bos_token=adds_bos and kind != "gemma4",
        add_eos_token=stored.get("add_eos_token", False),
        chat_template=file.metadata.get("tokenizer.chat_template"),
    )


def _make_byte_level(stored: Mapping[str, Any], split: str | None) -> Any:
    """Byte-level BPE after a split of the text by a regular expression; None is GPT-2's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(stored["tokens"])},
            [tuple(merge.split(" ")) for merge in stored["merges"]],
            ignore_merges=stored["pre"] in _TIKTOKEN,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(stored["tokens"], stored["token_type"], strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return backend


def read_eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """Tokens that end an answer: those that the file names, and its tokens that end turns.

    Raises:
        ValueError: If there is none, or one is no token of the file.
    """
    named = (_read_token_id(file, key) for key in ("eos", "eot", "eom"))
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ending = {*_TURN_ENDS, *_ANSWER_ENDS}
    if set(_ANSWER_ENDS) <= set(tokens):
        ending.remove("<|end|>")
    ends = [i for i, token in enumerate(tokens) if token in ending]
    ids = tuple(dict.fromkeys([*(i for i in named if i is not None), *ends]))
    if not ids:
        raise ValueError(f"{file.path}: no end-of-text token (tokenizer.ggml.eos_token_id)")
    return ids


def _read_token_id(file: GGUFFile, name: str) -> int | None:
    """A special token's id, within the file's tokens; None if the file does not name it."""
    key = f"tokenizer.ggml.{name}_token_id"
    value, count = file.metadata.get(key), len(file.metadata.get("tokenizer.ggml.tokens", []))
    if value is None or (type(value) is int and 0 <= value < count):
        return value
    raise ValueError(
        f"{file.path}: {key} is {value!r}, expected a token id from 0 to {count - 1}, one of "
        "the file's tokens"
    )
