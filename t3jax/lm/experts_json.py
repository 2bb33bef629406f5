"""Experts in a `config.json`, in both directions."""

from typing import Any

from t3jax.lm.config import ExpertsConfig, LMConfig
from t3jax.lm.family import Family, Json, take_section

SWITCH = "enable_moe_block"  # where a family has models with experts and without
_SHARED = {"n_shared_experts", "moe_num_shared_experts"}  # of a chosen one's width, side by side


def read_experts(
    family: Family, config: Json, values: dict[str, Any], num_layers: int
) -> dict[str, ExpertsConfig]:
    """The experts of a model.

    Args:
        family: The row of the family.
        config: The `config.json` with the family's defaults.
        values: Fields of `LMConfig` so far; those of the experts, `experts.NAME`, are taken out.
        num_layers: Number of layers.

    Returns:
        `experts`, or nothing in families without.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    found = take_section(values, "experts.")
    if not found or not config.get(SWITCH, True):
        return {}
    for name in _SHARED & family.defaults.keys():
        found["shared"] = (config[name] or 0) * found["size"]
    if family.dense is not None:
        dense = tuple(family.dense(config, layer) for layer in range(num_layers))
        found["dense"] = dense if any(dense) else ()
    experts = ExpertsConfig(**found)
    count, chosen, groups = experts.count, experts.chosen, experts.groups
    if chosen > count:
        raise ValueError(f"a token is sent to {chosen} experts, but there are {count}")
    if count % groups or experts.chosen_groups > groups:
        raise ValueError(
            f"{count} experts in {groups} groups of which {experts.chosen_groups} are chosen: "
            "expected equal groups, and no more chosen than there are"
        )
    if groups > 1 and (count < 2 * groups or chosen > count // groups * experts.chosen_groups):
        raise ValueError(
            f"{count} experts in {groups} groups, {chosen} chosen from {experts.chosen_groups}: "
            "expected two experts in a group or more, and as many as are chosen"
        )
    return {"experts": experts}


def write_experts(config: LMConfig, family: Family) -> dict[str, Any]:
    """The fields of `config.json` that read back as the experts, but for those of the table."""
    experts = config.experts
    content: dict[str, Any] = {}
    if SWITCH in family.defaults:
        content[SWITCH] = experts is not None
    if experts is None:
        return content
    dense = [layer for layer, each in enumerate(experts.dense) if each]
    for name in _SHARED & family.defaults.keys():
        content[name] = experts.shared // experts.size
    if "mlp_only_layers" in family.defaults:
        content |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if "first_k_dense_replace" in family.defaults:
        content["first_k_dense_replace"] = len(dense)
    return content
