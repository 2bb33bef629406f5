"""Makes `adapter.npz` beside it: a LoRA adapter as peft writes it, and what peft computes with it.

    python tests/golden/make_adapter.py

Needs torch, transformers and peft. The base is `qwen2.npz`; the adapter has rank-stabilised scaling
and another rank in one kind of layer. `config` is the text of its `adapter_config.json`;
`tensors/NAME` are its weights; `logits` are those of the base file's `left/tokens`, at
attended positions.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import reference  # noqa: E402

if __name__ == "__main__":
    base = dict(np.load(HERE / "qwen2.npz"))
    config = json.loads(str(base["config"]))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    weights = {k[8:]: torch.tensor(v).float() for k, v in base.items() if k.startswith("weights/")}
    model.load_state_dict(weights, strict=False)
    recipe = peft.LoraConfig(
        r=3,
        lora_alpha=4,
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, recipe).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    tokens, mask = (base[f"left/{name}"] for name in ("tokens", "mask"))
    logits = reference.read(adapted, torch.tensor(tokens).long(), torch.tensor(mask))[1].numpy()
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        text = (pathlib.Path(folder) / "adapter_config.json").read_text()
        tensors = safetensors.numpy.load_file(pathlib.Path(folder) / "adapter_model.safetensors")
    arrays = {f"tensors/{name}": tensor for name, tensor in tensors.items()}
    np.savez_compressed(HERE / "adapter.npz", config=text, logits=logits[mask], **arrays)
