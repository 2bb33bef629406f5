"""Meta-learning with low-rank adapters (LoRA-ML): which base is best to adapt from.

Here are the experiments whose answer is known: linear maps (`linear`) and a shallow network
(`shallow`). `t3jax.finetuning` does it to a language model, `t3jax.training.meta` to a head.
"""
