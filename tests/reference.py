"""The method stated in PyTorch, and tiny random models of every family made by transformers.

Plain loops and PyTorch's own modules, written to be read beside the paper and not to be fast: what
the JAX code is compared with. Needs torch; nothing here imports t3jax's array functions.
"""

import pathlib

import tiny
import torch
import transformers
from torch.nn import functional

torch.set_num_threads(1)  # its threads wait spinning, which starves JAX's in the same process

_LLAMA = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 261,
    "eos_token_id": 263,
}
# An original context of 32 positions: of a head's 4 rotary pairs one turns often enough to be kept,
# one stands on the ramp, and two are stretched.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    "gqa_tied": {},
    "llama3_untied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False},
    "llama3_one_key_head": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "no_gqa": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {
        "head_dim": 16,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}


# Windows shorter than the texts, soft caps that bend, every bias and norm that a family has.
_WIDE = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA2 = {
    **_WIDE,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "final_logit_softcapping": 1.5,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 3.0],
    "long_factor": [2.0, 4.0, 8.0],
}
_EXPERTS = {"num_experts_per_tok": 2, "pad_token_id": None}
_QWEN_EXPERTS = {
    **_EXPERTS,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
}
_DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
_GEMMA4 = {  # a window shorter than the text; the last layer of each type has others' keys
    "head_dim": 8,
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 3.0,
    "vocab_size_per_layer_input": 264,
    "pad_token_id": None,
}
FAMILIES = {
    "mistral": {"sliding_window": 6},
    "qwen2": {"rope_parameters": {**_YARN, "original_max_position_embeddings": 32}},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "phi3": {
        "sliding_window": 20,
        "rope_parameters": _LONGROPE,
        "original_max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    },
    "gemma": {**_WIDE, "num_key_value_heads": 1},
    "gemma2": {**_GEMMA2, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        **_GEMMA2,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma4_text": {
        **_GEMMA4,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "gemma4_unified_text": {  # as in 12B, but for the keys of the last layers
        **{key: _GEMMA4[key] for key in _GEMMA4 if key != "vocab_size_per_layer_input"},
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "olmo2": {"tie_word_embeddings": False},
    "olmo3": {
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {**_YARN, "original_max_position_embeddings": 32},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "smollm3": {
        "sliding_window": 6,
        "use_sliding_window": True,
        "no_rope_layers": [1, 0],
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "mlp_bias": True,
        "pad_token_id": None,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "glm": {"head_dim": 16, "pad_token_id": None},
    "glm4": {"head_dim": 16, "pad_token_id": None},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "helium": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "exaone4": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "seed_oss": {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu2"},
    "cwm": {
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": LLAMA3_ROPE,
    },
    "ministral": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            **_YARN,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.2,
        },
        "pad_token_id": None,
    },
    "internlm3": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "mlp_bias": True},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 6,
        "attention_types": [[["global", "local"], 1]],
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": None},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "starcoder2": {"sliding_window": 6},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {
        "sliding_window": 6,
        "logit_scale": 0.5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {
        **_EXPERTS,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "attention_bias": True,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "mixtral": {**_EXPERTS, "num_local_experts": 4, "sliding_window": 6},
    "olmoe": {
        **_EXPERTS,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "clip_qkv": 1.0,
        "attention_bias": True,
    },
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "granitemoe": {
        **_EXPERTS,
        "num_local_experts": 4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "gpt_oss": {  # with a clamp that cuts
        **_EXPERTS,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "swiglu_limit": 1.5,
        "sliding_window": 6,
        "rope_parameters": {
            **_YARN,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": False,
    },
    "phimoe": {
        **_EXPERTS,
        "num_local_experts": 6,
        "router_jitter_noise": 0.3,
        "attention_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        "sliding_window": 20,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.5, 3.0, 4.0],
            "long_factor": [2.0, 4.0, 8.0, 9.0],
            "short_mscale": 1.2,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 128,
        },
    },
    "glm4_moe": {
        **_EXPERTS,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
    },
    "dots1": {
        **_EXPERTS,
        "attention_bias": True,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "moe_intermediate_size": 24,
        "moe_k": 2,
        "moe_num_experts": 4,
    },
    "minimax_m2": {**_EXPERTS, "head_dim": 16, "rotary_dim": 8, "num_local_experts": 6},
    "vaultgemma": {**_GEMMA2, "attn_logit_softcapping": 2.0},
    "apertus": {"attention_bias": True, "rope_parameters": LLAMA3_ROPE, "hidden_act": "xielu"},
    "hunyuan_v1_dense": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 5.0, "factor": 1.0},
    },
    "hyperclovax": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 0.5,
        "tie_word_embeddings": False,
    },
    "olmo": {"clip_qkv": 1.0},
    "jais2": {},
    "gptj": {"rotary_dim": 4, "tie_word_embeddings": False, "n_inner": 48},
    "gpt_bigcode": {"n_inner": 48},
    "falcon": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2},
    "bloom": {},
    "mpt": {"attn_config": {"clip_qkv": 1.0}},
    "lfm2": {
        "norm_eps": 1e-5,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "norm_eps": 1e-5,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
    },
    "qwen3_next": {**_DELTA, **_QWEN_EXPERTS, "mlp_only_layers": [1]},
    "qwen3_5_text": {**_DELTA, "attention_bias": True},
    "qwen3_5_moe_text": {**_DELTA, **_QWEN_EXPERTS},
    "gpt_neox": {"hidden_act": "gelu", "tie_word_embeddings": False},
    "gpt2": {"n_inner": 48},
    "phi": {"hidden_act": "gelu_new", "tie_word_embeddings": False},
}
_SEEDS = {  # where the greedy text of the second is dull, or its numbers large
    "bloom": 15, "gemma3_text": 8, "gemma4_text": 8, "gemma4_unified_text": 9, "lfm2": 5,
    **dict.fromkeys(("falcon", "glm4", "gpt_bigcode", "ministral3", "phi3"), 4),
    **dict.fromkeys(("cohere", "cohere2", "gemma2", "gpt_neo", "granitemoe", "hyperclovax"), 3),
    **dict.fromkeys(("jais2", "nemotron", "opt", "starcoder2"), 3),
}  # fmt: skip


def make_llama(name: str, **overrides) -> transformers.LlamaForCausalLM:
    """A tiny Llama of `LLAMAS` with random weights that make it far from uniform."""
    torch.manual_seed(len(name))
    config = transformers.LlamaConfig(**{**_LLAMA, **LLAMAS[name], **overrides})
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.25)
    return model.eval()


def make_family(name: str, **overrides) -> transformers.PreTrainedModel:
    """A tiny model of `FAMILIES` with random weights, whose greedy text keeps changing."""
    torch.manual_seed(_SEEDS.get(name, 2))
    settings = {**_LLAMA, **FAMILIES[name], **overrides}
    config = transformers.AutoConfig.for_model(name, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    gemma = "gemma" in name
    centred = (
        (gemma and not name.startswith("gemma4"))
        or name == "nemotron"
        or name.startswith(("qwen3_next", "qwen3_5"))
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("weight") and ("norm" in path or "ln_" in path):
                parameter.uniform_(0.5, 1.5)
                # There it is what is added to 1.
                parameter -= 1.0 if centred and "linear_attn" not in path else 0.0
            elif "embed" in path or "lm_head" in path or "wte" in path:
                parameter.normal_(0.0, 0.1 if gemma else 0.25)  # Gemma's is multiplied by sqrt(D)
            else:
                # GPT-Neo's scores are not divided by anything.
                parameter.normal_(0.0, 0.3 if name == "gpt_neo" else 0.5)
        for path, buffer in model.named_buffers():
            if "correction" in path or "expert_bias" in path:  # of a router's scores
                buffer.copy_(torch.rand_like(buffer).half())
            elif "layer_scalar" in path:
                buffer.copy_((0.5 + torch.rand_like(buffer)).half())
    return model.eval()


_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 1,
    "embed_dim": 8,
    "hidden_size": 32,
    "num_heads": 1,
    "out_hidden_size": 32,
    "intermediate_size": 8,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
WRAPPERS = {  # fields of the text model's config, and the vision model's
    "qwen2_vl": ({"rope_parameters": _MROPE}, _QWEN_VISION),
    "qwen2_5_vl": ({"rope_parameters": _MROPE}, _QWEN_VISION),
    "qwen3_vl": (
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "head_dim": 8},
        _QWEN_VISION,
    ),
    "qwen3_vl_moe": (
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}, **_QWEN_EXPERTS, "head_dim": 8},
        _QWEN_VISION,
    ),
    "qwen3_5": (
        {"model_type": "qwen3_5_text", **_DELTA, "rope_parameters": _MROPE},
        _QWEN_VISION,
    ),
    "qwen3_5_moe": (
        {"model_type": "qwen3_5_moe_text", **_DELTA, **_QWEN_EXPERTS, "rope_parameters": _MROPE},
        _QWEN_VISION,
    ),
    "gemma4": (
        {"model_type": "gemma4_text", **_GEMMA4, "pad_token_id": 0}
        | {"hidden_size_per_layer_input": 8},
        {**_VISION, "head_dim": 8, "position_embedding_size": 16},
    ),
    "gemma4_unified": (
        {"model_type": "gemma4_unified_text", **_GEMMA4, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "pad_token_id": 0},
        {"mm_embed_dim": 8, "mm_posemb_size": 4, "patch_size": 4},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", **FAMILIES["lfm2"]},
        {**_VISION, "model_type": "siglip2_vision_model", "num_patches": 16},
    ),
    "llava": ({"model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}),
    "llava_next": ({"model_type": "mistral"}, {**_VISION, "model_type": "clip_vision_model"}),
    "llava_onevision": ({"model_type": "qwen2"}, {**_VISION, "model_type": "siglip_vision_model"}),
    "mistral3": (
        {"model_type": "ministral3", "head_dim": 8, **FAMILIES["ministral3"]},
        {**_VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "idefics3": ({"model_type": "llama", "pad_token_id": 0}, _VISION),
    "smolvlm": ({"model_type": "llama", "pad_token_id": 0}, _VISION),
    "internvl": (
        {"model_type": "qwen3", "head_dim": 8},
        {**_VISION, "image_size": [8, 8], "patch_size": [4, 4]},
    ),
}


def make_wrapper(name: str, tied: bool) -> transformers.PreTrainedModel:
    """A tiny multimodal model of `WRAPPERS` with random weights."""
    torch.manual_seed(0)
    text, vision = WRAPPERS[name]
    text = {**_LLAMA, **text, "tie_word_embeddings": tied}
    config = transformers.AutoConfig.for_model(
        name, text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(0.5, 1.5)
                if name.startswith("qwen3_5") and "linear_attn" not in path:
                    parameter -= 1.0  # there it is what is added to 1
            else:
                parameter.normal_(0.0, 0.25)
    return model.eval()


def save_model(model: transformers.PreTrainedModel, folder: pathlib.Path) -> pathlib.Path:
    """Writes a model as transformers does, with the byte tokenizer of `tiny`."""
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def read(
    model: transformers.LlamaForCausalLM, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [B, T, D], after the final norm, and logits [B, T, V]."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
    out = model(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=positions,
        output_hidden_states=True,
        use_cache=False,
    )
    return out.hidden_states[-1], out.logits


@torch.no_grad()
def greedy(model: transformers.LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    """The tokens that transformers' own `generate` adds to a prompt."""
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=steps)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def continue_batch(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, steps: int
) -> torch.Tensor:
    """The tokens `[B, steps]` that `generate` adds to prompts padded on the left; no stop."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        tokens, attention_mask=mask.long(), do_sample=False, max_new_tokens=steps, pad_token_id=0
    )
    return out[:, tokens.shape[1] :]


def causal_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the attended states [B, T, D] up to each position; 0 before the first."""
    out = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            attended = hidden[row, : t + 1][mask[row, : t + 1]]
            if len(attended):
                out[row, t] = attended.mean(dim=0)
    return out


class GuidanceHead(torch.nn.Module):
    """`g(v) = W2[v] · act(U hbar)` as a stack of linear layers, the last one without a bias."""

    ACTIVATIONS = {  # noqa: RUF012
        "identity": torch.nn.Identity,
        "relu": torch.nn.ReLU,
        "gelu": torch.nn.GELU,
        "tanh": torch.nn.Tanh,
    }

    def __init__(self, width, vocab, rank, activation="identity", num_hidden_layers=1, bias=False):
        super().__init__()
        layers = []
        for i in range(num_hidden_layers):
            layers += [torch.nn.Linear(width if i == 0 else rank, rank, bias=bias)]
            layers += [self.ACTIVATIONS[activation]()]
        self.proj = torch.nn.Sequential(*layers, torch.nn.Linear(rank, vocab, bias=False))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.proj(pooled)


def guided(
    logits: torch.Tensor, scores: torch.Tensor, temperature: float, scale: float
) -> torch.Tensor:
    """Log-probabilities of the tempered and tilted distribution."""
    tempered = functional.log_softmax(logits / temperature, dim=-1)
    return functional.log_softmax(tempered + scale * functional.logsigmoid(scores), dim=-1)


def loss(
    scores: torch.Tensor, tokens: torch.Tensor, answer: torch.Tensor, retain: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of "retain" over answer tokens, from all-token scores [B, T, V].

    `answer` [B, T] marks answer tokens, `retain` [B] retain sequences: for an answer token x_t the
    score is g_{t-1}(x_t). The sum over both sets is divided by the number of answer tokens.
    """
    chosen = scores[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    labels = retain[:, None].float().expand_as(chosen)
    losses = functional.binary_cross_entropy_with_logits(chosen, labels, reduction="none")
    counted = answer[:, 1:]
    return losses[counted].sum() / counted.sum()


@torch.no_grad()
def guided_greedy(
    model: transformers.LlamaForCausalLM,
    head: GuidanceHead,
    prompt: list[int],
    steps: int,
    temperature: float,
    scale: float,
) -> list[int]:
    """Greedy guided tokens, the whole text read anew for each; stops after end-of-text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens = list(prompt)
    while len(tokens) < len(prompt) + steps:
        ids = torch.tensor([tokens])
        hidden, logits = read(model, ids, torch.ones_like(ids, dtype=torch.bool))
        pooled = hidden[0].mean(dim=0)
        tokens.append(int(guided(logits[0, -1], head(pooled), temperature, scale).argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]
