"""Meta-learning with low-rank adapters (LoRA-ML): a base that is easy to adapt.

The answer is known for linear maps (`linear`) and for a shallow network (`shallow`). `head_start`
learns a start for heads. `t3jax.finetuning` trains a language model by LoRA-ML.
"""
