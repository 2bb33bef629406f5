"""Multimodal models: the parts of their folders that are the text model's.

Weights for images and sound are not read. For texts the text model computes the same as the whole.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from t3jax.json_files import show_json
from t3jax.lm.families import FAMILIES
from t3jax.lm.family import Family, Json
from t3jax.lm.refusals import explain_unknown

# Defaults of transformers' class, which published configs leave out.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_TEXT_TYPES = {  # types of text models that differ from a family in their name alone
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A multimodal model.

    Attributes:
        text: Family of the text model.
        others: Whether its config may name another family.
        tied: Whether the LM head is the embedding table if the config does not say.
        text_ties: Whether the text model's config may also say it.
        defaults: Values of fields that the text model's config lacks.
        transposed: Matrices of experts, gate and up first, that published folders store [in, out]
            and transformers 5 writes [out, in].
    """

    text: str
    others: bool = True
    tied: bool = False
    text_ties: bool = False
    defaults: Json = dataclasses.field(default_factory=dict)
    transposed: tuple[str, ...] = ()


_QWEN2_VL = Wrapper("qwen2", others=False, text_ties=True, defaults={"rope_theta": 1e6})
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", others=False, tied=True),
    "gemma4": Wrapper("gemma4_text", others=False, tied=True),
    "gemma4_unified": Wrapper("gemma4_unified_text", others=False, tied=True),
    "idefics3": Wrapper("llama", defaults=_LLAMA),
    "internvl": Wrapper("qwen2", tied=True),
    "lfm2_vl": Wrapper("lfm2", tied=True),
    "llava": Wrapper("llama", text_ties=True, defaults=_LLAMA),
    "llava_next": Wrapper("llama", defaults=_LLAMA),
    "llava_onevision": Wrapper("qwen2", text_ties=True),
    "mistral3": Wrapper("mistral", tied=True),
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_vl": _QWEN2_VL,
    "qwen3_5": Wrapper("qwen3_5_text", others=False),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", others=False),
    "qwen3_vl": Wrapper("qwen3", others=False, defaults={"rope_theta": 5e5}),
    "qwen3_vl_moe": Wrapper(
        "qwen3_moe",
        others=False,
        defaults={"rope_theta": 5e5, "norm_topk_prob": True},
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "smolvlm": Wrapper("llama", defaults=_LLAMA),
}


def text_config(config: Json) -> dict[str, Any]:
    """The text model's part of a multimodal `config.json`, with its family as `model_type`.

    Raises:
        ValueError: If the text model is of no known family.
    """
    wrapper = WRAPPERS[config["model_type"]]
    # Folders of Qwen 2 VL have the fields of the text model at the top.
    text = config.get("text_config", {**config, "model_type": wrapper.text})
    model_type = text.get("model_type", wrapper.text) if isinstance(text, Mapping) else None
    family = _TEXT_TYPES.get(str(model_type), model_type)
    if model_type is None or (family != wrapper.text and not wrapper.others):
        detail = f" with model_type {show_json(model_type)}" if isinstance(text, Mapping) else ""
        raise ValueError(
            f"text_config is {show_json(text)}{detail}, expected an object for {wrapper.text}"
        )
    if family not in [*FAMILIES]:  # a list, since the value may be unhashable
        raise ValueError(f"text_config: {explain_unknown(text, WRAPPERS)}")
    if config["model_type"] == "gemma3" and text.get("final_logit_softcapping") is not None:
        raise ValueError(
            "text_config.final_logit_softcapping is "
            f"{show_json(text['final_logit_softcapping'])}, expected null: the multimodal class of "
            "transformers leaves the cap out"
        )
    tied = config.get("tie_word_embeddings", wrapper.tied)
    if wrapper.text_ties:
        tied = tied or text.get("tie_word_embeddings", False)
    defaults = {} if family != wrapper.text else wrapper.defaults
    merged = {**defaults, **text, "model_type": family, "tie_word_embeddings": tied}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(merged.get(name), Mapping):
            merged[name] = _drop_sections(merged[name])
    return merged


def _drop_sections(rope: Json) -> dict[str, Any]:
    """Rotary settings for texts, where the positions of time, height and width are the same."""
    rope = {k: v for k, v in rope.items() if k not in ("mrope_section", "mrope_interleaved")}
    return {
        name: "default" if name in ("rope_type", "type") and value == "mrope" else value
        for name, value in rope.items()
    }


# Names of text models in checkpoints of multimodal models, and of parts that are not read.
_WRAPPED = (
    (r"^language_model\.(?=model\.|lm_head\.)", ""),
    (r"^model\.(language_model|text_model)\.", "model."),
    (r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector)\..*", None),
    (r"^(model\.)?(audio_tower|vision_embedder|embed_vision|embed_audio)\..*", None),
    (r"^(model\.)?image_newline$", None),
)


def checkpoint_name(family: Family, name: str) -> str | None:
    """The name of a stored weight in the family's table; None if it is no part of the decoder.

    Rotary buffers of old checkpoints are no part either: they follow from the config.
    """
    buffer = (r".*\.rotary_emb\.inv_freq$", None)
    for pattern, replacement in (*_WRAPPED, *family.renamed, buffer):
        if re.search(pattern, name):
            if replacement is None:
                return None
            name = re.sub(pattern, replacement, name, count=1)
    return name
