"""Language models from GGUF files, the format of llama.cpp: shape, weights and tokenizer.

A file is read as if it was a Hugging Face folder: its metadata as a `config.json`, and its tensors
as the weights of a `Family` whose modules have llama.cpp's names. Quantised tensors are dequantised
as they are read, a few rows at a time and no others than those wanted; nothing computes with
quantised weights. Not read: models in several files, and mixtures of experts.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from t3jax.lm.config import LMConfig
from t3jax.lm.config_json import lm_config
from t3jax.lm.decoder import Params
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family
from t3jax.lm.weights import place_params

_ARCHITECTURES = {  # llama.cpp's names of the families; "llama" is Mistral too
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi2": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_KEYS = {  # fields of LMConfig, and where the metadata of an architecture has them
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "max_position": "context_length",
    "parallel": "use_parallel_residual",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
_KEYS_OF_SIZES = ("embedding_length", "attention.head_count", "block_count")
_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
# Of these Gemmas the largest alone divides attention scores by another width than the head's;
# files do not say it, and llama.cpp knows them by their layers.
_SCALED_BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}
_ROPE_TENSORS = r"^rope_(freqs|factors_(long|short))\.weight$"

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DEQUANTIZED_AT_ONCE = 1 << 22  # numbers, in float32

# Tokens of these types are never cut.
_CONTROL, _USER_DEFINED = 3, 4
# Byte-level tokenizers, by llama.cpp's names of how text is cut before merges. Those in tiktoken's
# manner look whole words up before they merge, and start with a bos.
_TIKTOKEN = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")
# Cut as GPT-2's; some cut single digits too, which makes no difference as no merge has a digit.
_LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2", "refact", "smollm", "starcoder")
_SENTENCEPIECE = ("tokens", "token_type", "scores", "merges")  # what such a tokenizer is made of
# Files name one token that ends a text; chat models end turns with others too.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open file.

    Attributes:
        path: Where it lies.
        metadata: All of it, by name.
        tensors: The library's description of each tensor, mapped to memory, by name.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words."""
        return self.metadata.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def open_gguf(path: pathlib.Path) -> GGUFFile:
    """Opens a file and reads all but its weights.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        ImportError: If the package `gguf` is not installed.
        ValueError: If it is no whole GGUF file, or is one of several that make a model.
    """
    library = _library()
    try:
        reader = library.GGUFReader(path)
        metadata = {name: _value(field) for name, field in reader.fields.items()}
    except Exception as error:  # whatever reading past the end or nonsense leads to
        raise ValueError(
            f"{path}: not a whole GGUF file, or one of a newer kind than the installed gguf reads "
            f"({error}); expected a GGUF file or a Hugging Face folder. Download it again, or "
            "upgrade gguf"
        ) from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path}: one of {parts} files of a model; join them with `llama-gguf-split --merge`"
        )
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def read_config(file: GGUFFile) -> LMConfig:
    """Reads a model's shape from the metadata.

    Args:
        file: The open file.

    Returns:
        The decoder's shape.

    Raises:
        ValueError: If the architecture is unknown, a value is missing, or one is not implemented.
    """
    try:
        return lm_config(_hf_config(file))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def load_params(
    file: GGUFFile,
    config: LMConfig,
    dtype: Any,
    shardings: Callable[[Params], Any] | None = None,
) -> Params:
    """Reads a model's weights, as `t3jax.lm.weights.load_params` does from a folder.

    Args:
        file: The open file.
        config: The model's shape, from `read_config`.
        dtype: Dtype of the weights in memory.
        shardings: Gives the tree of shardings for the abstract parameter tree; None puts
            everything on the default device.

    Returns:
        The parameter tree, placed.

    Raises:
        ValueError: If names or shapes do not fit the config, or a tensor is quantised in a way that
            the package `gguf` does not know.
    """
    for tensor in file.tensors.values():
        if not _readable(tensor):
            raise ValueError(
                f"{file.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the "
                "installed gguf cannot dequantise; use a file quantised otherwise, such as Q8_0"
            )
    tensors = {
        name: (_Tensor(tensor, _head_width(file, config, name), _shift(config, name), dtype), name)
        for name, tensor in file.tensors.items()
        if not re.match(_ROPE_TENSORS, name)
    }
    family = _family(file.architecture, FAMILIES[config.model_type])
    return place_params(file.path, config, family, tensors, dtype, shardings)


def read_tokenizer(file: GGUFFile) -> Any:
    """Makes a transformers tokenizer of the file's, chat template included.

    Args:
        file: The open file.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the file has none, or one that would not be read as llama.cpp reads it.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import: only who loads a model waits

    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as conversion
    except ImportError as error:
        raise _not_installed("transformers 5.22") from error

    prefix = "tokenizer.ggml."
    stored = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    tokens, kind, cut = (stored.get(key) for key in ("tokens", "model", "pre"))
    splits = conversion.GGUF_PRE_TOKENIZER_SPLITS
    known = {*splits, *_LIKE_GPT2}
    if not tokens:
        raise ValueError(f"{file.path}: no tokenizer in it (tokenizer.ggml.tokens is missing)")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: tokenizer {kind!r} is not supported; known: gpt2, llama")
    if kind == "gpt2" and cut not in known:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre {cut!r} is not supported, so text would be cut "
            f"wrongly; known: {', '.join(sorted(known))}"
        )
    try:
        if kind == "gpt2":  # transformers' own way would add GPT-2's special token to all of them
            backend = _byte_level(stored, splits.get(str(cut)))
        else:
            described = {key: stored[key] for key in _SENTENCEPIECE if key in stored}
            described["tokenizer_type"] = kind
            backend, _ = conversion.convert_gguf_tokenizer(file.architecture, described)
            if file.architecture == "llama" and not stored.get("add_space_prefix", True):
                backend.pre_tokenizer.prepend_scheme = "never"
    except Exception as error:  # whatever lists that do not fit each other lead to
        raise ValueError(
            f"{file.path}: the tokenizer could not be read ({type(error).__name__}: {error}); "
            "expected tokens, their types, and merges or scores that fit each other"
        ) from error
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(file, key) for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
        add_bos_token=stored.get("add_bos_token", kind == "llama" or cut in _TIKTOKEN),
        add_eos_token=stored.get("add_eos_token", False),
        chat_template=file.metadata.get("tokenizer.chat_template"),
    )


def _byte_level(stored: Mapping[str, Any], split: str | None) -> Any:
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
    """Tokens that end an answer: those that the file names, and the ends of turns it knows.

    Raises:
        ValueError: If there is none, or one is no token of the file.
    """
    named = (_token_id(file, key) for key in ("eos", "eot", "eom"))
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ends = [i for i, token in enumerate(tokens) if token in _TURN_ENDS]
    ids = tuple(dict.fromkeys([*(i for i in named if i is not None), *ends]))
    if not ids:
        raise ValueError(f"{file.path}: no end-of-text token (tokenizer.ggml.eos_token_id)")
    return ids


def _token_id(file: GGUFFile, name: str) -> int | None:
    """A special token's id, within the file's tokens; None if the file does not name it."""
    key = f"tokenizer.ggml.{name}_token_id"
    value, count = file.metadata.get(key), len(file.metadata.get("tokenizer.ggml.tokens", []))
    if value is None or (type(value) is int and 0 <= value < count):
        return value
    raise ValueError(
        f"{file.path}: {key} is {value!r}, expected a token id from 0 to {count - 1}, one of "
        "the file's tokens"
    )


def _not_installed(what: str) -> ImportError:
    return ImportError(f"reading GGUF files needs {what}: pip install 't3jax[gguf]'")


def _library() -> ModuleType:
    try:
        import gguf  # an optional extra
    except ImportError as error:
        raise _not_installed("the package gguf") from error
    return gguf


def _value(field: Any) -> Any:
    """A value of the metadata; a float32 as the shortest number that it stands for."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # ggml counts from the inside


def _readable(tensor: Any) -> bool:
    library, kind = _library(), tensor.tensor_type
    if kind.name in _PLAIN:
        return True
    try:
        library.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return len(tensor.shape) == 2


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` that the metadata amounts to."""
    if file.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ValueError(f"architecture {file.architecture!r} is not supported; known: {known}")
    if file.get("expert_count"):
        raise ValueError("mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("token_embd.weight is missing; expected the weights of a language model")
    model_type = _ARCHITECTURES[file.architecture]
    family = FAMILIES[model_type]
    values = {field: file.get(key) for field, key in _KEYS.items()}
    values = {field: value for field, value in values.items() if value is not None}
    if lists := [_KEYS[field] for field, value in values.items() if isinstance(value, list)]:
        raise ValueError(f"layers of different sizes are not supported: {', '.join(lists)}")
    for field in ("hidden_size", "num_heads", "num_layers"):
        if field not in values:
            raise ValueError(f"{file.architecture}.{_KEYS[field]} is missing")
    for key in (*_KEYS_OF_SIZES, "attention.key_length", "rope.dimension_count"):
        if (size := file.get(key)) is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{file.architecture}.{key} is {size!r}, expected an integer >= 1")
    by_hidden_size = values["hidden_size"] // values["num_heads"]
    head_dim = file.get("attention.key_length", by_hidden_size)
    scaled_otherwise = (file.architecture, values["num_layers"]) in _SCALED_BY_HIDDEN_SIZE
    norm = "layer_norm" if family.fixed.get("norm") == "layer" else "layer_norm_rms"
    values |= {
        "vocab_size": _shape(file.tensors["token_embd.weight"])[0],
        "norm_eps": file.get(f"attention.{norm}_epsilon"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": by_hidden_size if scaled_otherwise else head_dim,
        "tied": "output.weight" not in file.tensors,
        **{field: bias in file.tensors for field, bias in _BIASES.items()},
    }
    names = family.all_fields
    config = {names[field]: value for field, value in values.items() if field in names}
    config["model_type"] = model_type
    return config | _windows(file, family) | _ropes(file, family, head_dim)


def _windows(file: GGUFFile, family: Family) -> dict[str, Any]:
    window = file.get("attention.sliding_window")
    pattern = file.get("attention.sliding_window_pattern")
    if not window:
        return {} if window is None else {"sliding_window": None}
    if family.slides is None or "use_sliding_window" in family.defaults:
        raise ValueError("attention.sliding_window is not supported in this architecture")
    config: dict[str, Any] = {"sliding_window": window}
    if isinstance(pattern, list):
        config["layer_types"] = [f"{'sliding' if each else 'full'}_attention" for each in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    return config


def _ropes(file: GGUFFile, family: Family, head_dim: int) -> dict[str, Any]:
    if "rope" in family.fixed:
        return {}
    rope = {
        "rope_theta": file.get("rope.freq_base", 1e4),
        "partial_rotary_factor": file.get("rope.dimension_count", head_dim) / head_dim,
    }
    full = rope | _rope_scaling(file)
    if "rope_local_base_freq" in family.defaults:
        local = rope | {"rope_theta": file.get("rope.freq_base_swa", 1e4)}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    config: dict[str, Any] = {"rope_parameters": full}
    if "original_max_position_embeddings" in family.defaults:
        config["original_max_position_embeddings"] = full.get("original_max_position_embeddings")
    return config


def _rope_scaling(file: GGUFFile) -> dict[str, Any]:
    original = file.get("rope.scaling.original_context_length")
    if (short := file.tensors.get("rope_factors_short.weight")) is not None:
        return {
            "rope_type": "longrope",
            "short_factor": short.data.tolist(),
            "long_factor": file.tensors["rope_factors_long.weight"].data.tolist(),
            "attention_factor": file.get("rope.scaling.attn_factor"),
            "original_max_position_embeddings": original,
        }
    if (stretch := file.tensors.get("rope_freqs.weight")) is not None:
        # Llama 3's, worked out for each pair: the same stretch whatever the length of the text.
        return {
            "rope_type": "longrope",
            "short_factor": stretch.data.tolist(),
            "long_factor": stretch.data.tolist(),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": file.get("context_length"),
        }
    factor = file.get("rope.scaling.factor", file.get("rope.scale_linear")) or 1.0
    kind = file.get("rope.scaling.type", "linear")
    if kind == "none" or factor == 1.0:
        return {}
    optional = {
        "attention_factor": file.get("rope.scaling.yarn_attn_factor"),
        "beta_fast": file.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": file.get("rope.scaling.yarn_beta_slow"),
        "original_max_position_embeddings": original,
    }
    return {"rope_type": kind, "factor": factor, **optional}


def _family(architecture: str, family: Family) -> Family:
    """The family as llama.cpp stores it: under other names, and as plain stacked matrices."""
    library = _library()
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    names = library.get_tensor_name_map(kinds[architecture], 1)

    def stored(module: str) -> str:
        name = names.get_name(module.replace("{i}", "0"))
        return module if name is None else name.replace("blk.0.", "blk.{i}.")

    weights = {key: stored(module) for key, module in family.weights.items()}
    return dataclasses.replace(family, weights=weights, grouped={}, transposed=())


def _head_width(file: GGUFFile, config: LMConfig, name: str) -> int:
    """Width of the heads whose rows llama.cpp has permuted; 0 where it has not."""
    permuted = file.architecture == "llama" and re.search(r"\.attn_[qk]\.", name)
    return config.head_dim if permuted else 0


def _shift(config: LMConfig, name: str) -> float:
    """What is added to a stored weight: there the offset of Gemma's norms is part of it."""
    return -1.0 if config.norm == "rms_offset" and name.endswith("norm.weight") else 0.0


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a file, to be read in parts as one of a safetensors file is.

    Attributes:
        stored: The library's description.
        head_width: Rows of a head, permuted so that the two of a rotary pair are neighbours; here
            they are half a head apart. 0: not permuted.
        shift: Added to the stored numbers.
        dtype: Of what is read from a quantised tensor.
    """

    stored: Any
    head_width: int
    shift: float
    dtype: Any

    def get_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return _shape(self.stored)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Rows, or rows and columns."""
        rows, *columns = index
        data = self.stored.data[self._stored_rows(rows)]
        kind = self.stored.tensor_type
        if (plain := _PLAIN.get(kind.name)) is not None:
            # A copy, since an array may alias it, and what is mapped changes with the file.
            part = np.array(data.view(plain)[(slice(None), *columns)])
            return part + np.float32(self.shift) if self.shift else part
        return self._dequantized(data, *columns)

    def _stored_rows(self, rows: slice) -> slice | np.ndarray:
        if not self.head_width:
            return rows
        head, row = np.divmod(np.arange(rows.start, rows.stop), self.head_width)
        half, pair = np.divmod(row, self.head_width // 2)
        return head * self.head_width + 2 * pair + half

    def _dequantized(self, data: np.ndarray, columns: slice) -> np.ndarray:
        library = _library()
        kind = self.stored.tensor_type
        numbers, size = library.GGML_QUANT_SIZES[kind]  # numbers of a block, and its bytes
        first, last = columns.start // numbers, -(-columns.stop // numbers)
        blocks = data[:, first * size : last * size]
        within = slice(columns.start - first * numbers, columns.stop - first * numbers)
        out = np.empty((len(data), columns.stop - columns.start), self.dtype)
        rows = max(1, _DEQUANTIZED_AT_ONCE // ((last - first) * numbers))
        for start in range(0, len(data), rows):
            some = library.dequantize(blocks[start : start + rows], kind)
            out[start : start + rows] = some[:, within]
        return out
