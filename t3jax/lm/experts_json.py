"""Experts in a `config.json`, in both directions."""

from typing import Any

from t3jax.lm.config import ExpertsConfig, LMConfig
from t3jax.lm.family import Family, Json, take_section

SWITCH = "enable_moe_block"  # of a family that has models with experts and without
_SHARED = {"n_shared_experts", "moe_num_shared_experts"}  # each of a chosen expert's width


def read_experts(
    family: Family, config: Json, values: dict[str, Any], num_layers: int
) -> dict[str, ExpertsConfig]:
    """The field `experts` of `LMConfig`, if the model has experts.

    Its parts, `experts.NAME`, are taken out of `values`.

    Raises:
        ValueError: If the numbers do not fit together.
    """
    fields = take_section(values, "experts.")
    if not fields or not config.get(SWITCH, True):
        return {}
    for name in _SHARED & family.defaults.keys():
        fields["shared"] = (config[name] or 0) * fields["size"]
    if family.dense is not None:
        dense = tuple(family.dense(config, layer) for layer in range(num_layers))
        fields["dense"] = dense if any(dense) else ()
    experts = ExpertsConfig(**fields)
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
    """The fields of `config.json` for experts that are not in the family's table."""
    experts = config.experts
    content: dict[str, Any] = {}
    if SWITCH in family.defaults:
        content[SWITCH] = experts is not None
    if experts is None:
        return content
    dense = [layer for layer, is_dense in enumerate(experts.dense) if is_dense]
    for name in _SHARED & family.defaults.keys():
        content[name] = experts.shared // experts.size
    if "mlp_only_layers" in family.defaults:
        content |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if "first_k_dense_replace" in family.defaults:
        content["first_k_dense_replace"] = len(dense)
    return content
