"""Fine-tunes a language model on question-answer data: all of its weights, or LoRA.

The same as `t3jax finetune`; `python finetune.py --help` lists its fields.
"""

from t3jax import commands

if __name__ == "__main__":
    commands.main("finetune")
