"""Error messages for model folders that do not load, with the way out."""

import difflib
from collections.abc import Iterable, Mapping

from t3jax.json_files import show_json
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Json

# Types that people have and that are of another kind, by what they need.
_OTHER = {
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "llama4"),
            *("granitemoeshared", "hunyuan_v1_moe"),
        ),
        "its mixture of experts is of another kind",
    ),
    **dict.fromkeys(
        (*("bamba", "falcon_h1", "granitemoehybrid", "mamba", "mamba2", "nemotron_h"),),
        "some of its layers are recurrent",
    ),
    "gemma3n": "its layers have several streams",
    **dict.fromkeys(("bart", "t5", "mt5"), "it is no decoder-only model"),
    **dict.fromkeys(("bert", "roberta", "modernbert"), "it does not generate text"),
}


# What loads and is closest in kind, where the name does not say it.
_NEAREST = {
    "codegen": "gptj",
    "deepseek_v2": "qwen2_moe",
    "deepseek_v3": "glm4_moe",
    "exaone": "exaone4",
    "falcon_h1": "llama",
    "gemma3n": "gemma4",
    "hunyuan_v1_moe": "mixtral",
    "llama4": "mixtral",
}


def explain_unknown(config: Json, others: Iterable[str]) -> str:
    """Why the type of a `config.json` does not load, the nearest that does, and what to do.

    Args:
        config: The `config.json`.
        others: Known types beside the families.
    """
    model_type = config.get("model_type")
    known = sorted([*FAMILIES, *others])
    listed = f"Known types: {', '.join(known)}"
    if not isinstance(model_type, str):
        return f"model_type is {show_json(model_type)}, expected the name of a family. {listed}"
    said = f"model_type {show_json(model_type)} is not supported"
    if model_type in _OTHER:
        said += f": {_OTHER[model_type]}"
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
        return (
            f"{said}, but its text model is a {text['model_type']}, which is: save that alone, "
            "with save_pretrained of its language model"
        )
    nearest = difflib.get_close_matches(model_type, known, 1, 0.7)
    if near := [_NEAREST[model_type]] if model_type in _NEAREST else nearest:
        said += f"; the nearest supported type is {near[0]}"
    return (
        f"{said}. Take a model of a known type, or give this one as functions (t3jax.make_lm, "
        "docs/your_model.md); another name in config.json would be read as another model, with "
        f"other logits. {listed}"
    )
