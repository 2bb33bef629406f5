"""Error messages for model folders that do not load, with the way out."""

import difflib
from collections.abc import Mapping

from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Json
from t3jax.lm.wrappers import WRAPPERS

# Types that people have and that are of another kind, by what they need.
_OTHER = {
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "minimax_m2"),
            *("ernie4_5_moe", "granitemoeshared", "hunyuan_v1_moe"),
        ),
        "its mixture of experts is of another kind",
    ),
    **dict.fromkeys(
        (*("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "mamba", "mamba2", "nemotron_h"),),
        "some of its layers are recurrent",
    ),
    **dict.fromkeys(
        ("gemma3n", "gemma4", "gemma4_text", "gemma4_unified"), "its layers are of unequal shape"
    ),
    **dict.fromkeys(("bloom", "falcon", "mpt"), "its attention has a bias by distance"),
    **dict.fromkeys(("bart", "t5", "mt5"), "it is no decoder-only model"),
    **dict.fromkeys(("bert", "roberta", "modernbert"), "it does not generate text"),
}


def explain_unknown(config: Json) -> str:
    """Why the type of a `config.json` does not load, the nearest that does, and what to do."""
    model_type = config.get("model_type")
    known = sorted([*FAMILIES, *WRAPPERS])
    said = f"model_type {model_type!r:.60} is not supported"
    if not isinstance(model_type, str):
        return f"{said}; known: {known}"
    if model_type in _OTHER:
        said += f": {_OTHER[model_type]}"
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
        return (
            f"{said}, but its text model is a {text['model_type']}, which is: save that alone, "
            "with save_pretrained of its language model"
        )
    nearest = difflib.get_close_matches(model_type, known, 1, 0.7)
    near = f"the nearest supported type is {nearest[0]!r}; " if nearest else ""
    return (
        f"{said}; {near}known: {known}. Another architecture can be given as functions "
        "(t3jax.make_lm, docs/your_model.md); another name in config.json would be read as "
        "another model, with other logits"
    )


def explain_quantized(quantized: object) -> str:
    """Why quantised weights do not load, and what does."""
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    return (
        f"quantization_config: weights quantised by {method or 'an unnamed method'} are not "
        "supported; load the unquantised folder with dtype=int8, or a GGUF file"
    )
