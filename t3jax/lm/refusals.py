"""Error messages for model folders that do not load, with the way out."""

import difflib
from collections.abc import Collection, Mapping

from t3jax.json_files import show_json
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Json

# Known types that are not supported, with the reason.
_UNSUPPORTED = {
    **dict.fromkeys(
        (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2"),
            *("dbrx", "exaone_moe", "glm_moe_dsa", "granitemoeshared", "hunyuan_v1_moe"),
            *("jetmoe", "llama4", "llama4_text"),
        ),
        "its mixture of experts is of another kind",
    ),
    **dict.fromkeys(
        (
            *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear"),
            *("mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen4_exp", "recurrent_gemma"),
            *("rwkv", "zamba", "zamba2"),
        ),
        "some of its layers are recurrent, of a kind that is not known",
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "its layers have several streams"),
    **dict.fromkeys(("bart", "t5", "mt5", "t5gemma", "whisper"), "it is no decoder-only model"),
    **dict.fromkeys(("bert", "roberta", "modernbert"), "it does not generate text"),
}


# The nearest supported type, if the name does not show it.
_NEAREST = {
    "aya_vision": "cohere2",
    "chatglm": "glm4",
    "codegen": "gptj",
    "dbrx": "mixtral",
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2"), "glm4_moe"),
    "deepseek_v2": "qwen2_moe",
    "exaone": "exaone4",
    "falcon_h1": "llama",
    **dict.fromkeys(("gemma3n", "gemma4_assistant"), "gemma4"),
    "gemma3n_text": "gemma4_text",
    "hunyuan_v1_moe": "mixtral",
    "jetmoe": "granitemoe",
    **dict.fromkeys(("llama4", "llama4_text"), "mixtral"),
    "lfm2_audio": "lfm2_vl",
    **dict.fromkeys(("minicpm", "minicpm3", "nanochat"), "llama"),
    "olmo_hybrid": "olmo3",
    "paligemma": "gemma3",
    "phi4_multimodal": "phi3",
    "pixtral": "mistral3",
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_audio"), "qwen2"),
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel"), "falcon"),
    **dict.fromkeys(
        (
            *("bamba", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2"),
            *("recurrent_gemma", "rwkv", "zamba", "zamba2"),
        ),
        "qwen3_5_text",
    ),
    "smollm4": "smollm3",
}


def _find_families(architectures: object) -> list[str]:
    """The families whose transformers classes a config names."""
    if not isinstance(architectures, list):
        return []
    return [name for name, family in FAMILIES.items() if family.architecture in architectures]


def explain_unknown(config: Json, wrappers: Collection[str]) -> str:
    """Why the type of a `config.json` does not load, the nearest that does, and what to do.

    `wrappers` are the known types beside the families.
    """
    model_type = config.get("model_type")
    known = sorted([*FAMILIES, *wrappers])
    known_text = f"Known types: {', '.join(known)}"
    if not isinstance(model_type, str):
        message = f"model_type is {show_json(model_type)}, expected the name of a family"
        if names := _find_families(config.get("architectures")):
            message += f"; of the architectures named there it is {' or '.join(names)}"
        return f"{message}. {known_text}"
    if model_type in wrappers:
        return (
            f"model_type {show_json(model_type)} is a whole multimodal model, expected the type of "
            "a text model"
        )
    message = f"model_type {show_json(model_type)} is not supported"
    if model_type in _UNSUPPORTED:
        message += f": {_UNSUPPORTED[model_type]}"
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get("model_type") in [*FAMILIES]:
        return (
            f"{message}, but its text model is a {text['model_type']}, which is: save that alone, "
            "with save_pretrained of its language model"
        )
    similar = difflib.get_close_matches(model_type, known, 1, 0.7)
    if nearest := [_NEAREST[model_type]] if model_type in _NEAREST else similar:
        message += f"; the nearest supported type is {nearest[0]}"
    return (
        f"{message}. Take a model of a known type, or give this one as functions (t3jax.make_lm, "
        "docs/your_model.md); another name in config.json would be read as another model, with "
        f"other logits. {known_text}"
    )
