"""Placement of arrays: one mesh, `(data, fsdp, model)`, and rules of which the first match holds.

Rows of a batch are split over `data` and `fsdp` together; the vocabulary, attention heads and MLP
width over `model`. `fsdp` also splits the other dimension of the matrices, which are gathered layer
by layer as they are used: it saves memory where `data` keeps a copy. A dimension that its axes do
not divide is not split. The same code runs on one device.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

DATA, FSDP, MODEL = "data", "fsdp", "model"
ROWS = (DATA, FSDP)
LOGITS = P(ROWS, MODEL)  # and all other arrays of rows and vocabulary

# Weights of the language model and the head, [out, in], by path.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|lm_head)/weight$", P(MODEL, FSDP)),  # vocabulary, of layer_embed too
    (r"(embed|lm_head)/(bias|scale)$", P(MODEL)),
    (r"positions/weight$", P(None, FSDP)),
    (r"/experts/(gate|up)/weight$", P(MODEL, None, FSDP)),  # experts, [expert, out, in]
    (r"/experts/down/weight$", P(MODEL, FSDP)),
    (r"/experts/(gate|up|down)/bias$", P(MODEL)),
    (r"/experts/(gate|up)/scale$", P(MODEL)),
    (r"/experts/down/scale$", P(MODEL, FSDP)),
    (r"layer_projection/weight$", P(MODEL)),
    (r"/input/opening/weight$", P(None, FSDP)),  # narrow
    (r"/input/out/weight$", P(FSDP)),
    (r"/(q|k|v|gate|up)/weight$", P(MODEL, FSDP)),  # heads, MLP width
    (r"/conv/out_gate/weight$", P(MODEL, FSDP)),  # channels
    (r"/conv/taps/weight$", P(MODEL)),
    (r"/conv/out_gate/scale$", P(MODEL)),
    (r"/delta/(strength|fading)/weight$", P(MODEL, FSDP)),  # heads
    (r"/delta/(\w_conv/weight|fading_bias|log_rate)$", P(MODEL)),
    (r"/(q|k|v|gate|up)/(bias|scale)$", P(MODEL)),
    (r"/(o|down)/weight$", P(FSDP, MODEL)),
    (r"/(o|down)/scale$", P(FSDP)),
    # LoRA's factors, split like the weights that they update.
    (r"/(q|k|v|gate|up)/(lora_)?a$", P(None, FSDP)),
    (r"/(q|k|v|gate|up)/(lora_)?b$", P(MODEL, None)),
    (r"/(o|down)/(lora_)?a$", P(None, MODEL)),
    (r"/(o|down)/(lora_)?b$", P(FSDP, None)),
    (r"^output$", P(MODEL, None)),  # the head's W2, vocabulary
    (r"", P()),  # norms, remaining biases, the head's hidden layers
)


def make_mesh(shape: Sequence[int] = (-1, 1, 1), devices: Sequence[Any] | None = None) -> Mesh:
    """A `(data, fsdp, model)` mesh.

    Args:
        shape: Devices along `data`, `fsdp` and `model`; at most one -1 takes the remaining ones.
        devices: The devices to use; None means all.

    Returns:
        A mesh with automatic axes: the compiler places arrays without a rule.

    Raises:
        ValueError: If the shape does not use every device exactly once.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(shape)
    are_whole = all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not are_whole or len(shape) != 3 or shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise ValueError(
            f"mesh {shape}: expected (data, fsdp, model), three positive whole numbers of which "
            "one may be -1; rows over 2 devices and the vocabulary over 4 is (2, 1, 4)"
        )
    known = math.prod(n for n in shape if n != -1)
    sizes = [len(devices) // known if n == -1 else n for n in shape]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh (data, fsdp, model) = {shape} does not fit {len(devices)} devices; their "
            "product must be the number of devices, and one of them may be -1"
        )
    names, types = (DATA, FSDP, MODEL), (AxisType.Auto,) * 3
    try:
        return jax.make_mesh(sizes, names, types, devices=devices)
    except NotImplementedError:
        # This shape needs a split axis of the devices' network: (8, 8, 1) of TPUs 4 x 4 x 4.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, names, axis_types=types)


def row_shards(mesh: Mesh) -> int:
    """Number of parts of the rows of a batch, whose number has to be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Shardings of a tree of weights by `PARAM_RULES`, a tree of the same structure."""
    return jax.tree.map_with_path(
        lambda path, leaf: fit_sharding(mesh, _rule(path), leaf.shape), params
    )


def place_abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """A tree of abstract arrays with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def gather_weights(mesh: Mesh | None, params: PyTree, after: jax.Array) -> PyTree:
    """Gathers weights along `fsdp` for products, inside of jit, once `after` has been computed.

    Compilers would otherwise gather the weights of all layers at once, and before the loop of
    decoding.
    """
    if mesh is None or mesh.shape[FSDP] == 1:
        return params
    params, _ = jax.lax.optimization_barrier((params, after))

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        return constrain(leaf, mesh, [None if axis == FSDP else axis for axis in _rule(path)])

    return jax.tree.map_with_path(gather, params)


def lookup(mesh: Mesh | None, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `[B, T, D]` of a table `[V, D]` for ids `[B, T]`, inside of jit.

    Along `fsdp` the ids are looked up in the local columns, and the result is resharded to rows:
    the table is not gathered.
    """
    ids = constrain(ids, mesh, [DATA])
    rows = jnp.take(table, ids, axis=0)
    return constrain(constrain(rows, mesh, [DATA, None, FSDP]), mesh, [ROWS])


def _rule(path: tuple) -> P:
    name = "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)
    return next(spec for pattern, spec in PARAM_RULES if re.search(pattern, name))


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding that splits rows over `data` and `fsdp`, and no other axis."""
    return fit_sharding(mesh, P(ROWS), shape)


def attention_specs(mesh: Mesh, heads: int, length: int) -> tuple[P, P, P]:
    """Specs of queries `[B, K, G, T, h]`, keys `[B, K, h, S]` and values `[B, K, S, h]`.

    Attention is split by rows, and by the K key heads over `model`. Where `model` does not divide
    the key heads, it splits the T queries of a text, whose keys and values are then replicated; for
    a single token it splits the width, so that the cache is not moved.
    """
    if heads % mesh.shape[MODEL] == 0:
        return P(ROWS, MODEL), P(ROWS, MODEL), P(ROWS, MODEL)
    if length > 1:
        return P(ROWS, None, None, MODEL), P(ROWS), P(ROWS)
    return (
        P(ROWS, None, None, None, MODEL),
        P(ROWS, None, MODEL),
        P(ROWS, None, None, MODEL),
    )


def constrain(
    x: jax.Array, mesh: Mesh | None, spec: Sequence[str | tuple[str, ...] | None] | P
) -> jax.Array:
    """Constrains the sharding of an array, inside of jit; unchanged without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit_sharding(mesh, P(*spec), x.shape))


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
    """Replicates a tree on all devices, inside of jit, so that every host reads the same values."""
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def fit_sharding(mesh: Mesh, spec: P, shape: Sequence[int]) -> NamedSharding:
    """`spec` on `mesh`, without the axes that do not divide the dimension they split."""

    def devices(axes: str | tuple[str, ...] | None) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(mesh.shape[name] for name in names)

    parts = [
        axes if size % devices(axes) == 0 else None for axes, size in zip(spec, shape, strict=False)
    ]
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(mesh, P(*parts))
