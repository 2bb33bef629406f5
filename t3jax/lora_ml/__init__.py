"""Meta-learning with low-rank adapters (LoRA-ML): which base is best to adapt from.

The experiments whose answer is known are linear maps (`linear`) and a shallow network (`shallow`);
`head_start` makes a start for heads. `t3jax.finetuning` does it to a language model.
"""
