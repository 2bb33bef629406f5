"""Shape of a decoder: all that `t3jax.lm.decoder` needs to know, in the field's words.

`config_json.py` reads it from a Hugging Face `config.json`, and `config_writing.py` writes it.
"""

import dataclasses
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        kind: "default"; "linear" (all wavelengths stretched by `factor`); "dynamic" (stretched in
            texts beyond `max_position` only, which are not read); "llama3" (long wavelengths
            stretched by `factor`, short ones kept, a ramp between); "yarn" (the same with a ramp
            over the pairs); "longrope" (each pair has its own stretch); or "proportional" (only the
            first pairs of the whole head rotate).
        factor: The stretch; 1 for "default". "longrope": the context's, see `short_factors`.
        low_freq_factor: "llama3": wavelengths above original / low are stretched.
        high_freq_factor: "llama3": wavelengths below original / high are kept.
        original_max_position: "llama3", "yarn", "longrope": context length before the stretch,
            tokens.
        rotated: Share of a head's width that is rotated, its first part. "proportional": share of
            the pairs.
        attention_factor: "yarn", "longrope": cosine and sine are multiplied by it.
        beta_fast: "yarn": pairs with more turns over the original context are kept.
        beta_slow: "yarn": pairs with fewer turns are stretched.
        truncate: "yarn": the ramp starts and ends at whole pairs.
        interleaved: Pairs are neighbours in a head, (0, 1), (2, 3) and so on; else number i of the
            first half is paired with number i of the second.
        query_growth: b: queries at position p are multiplied by 1 + b log(1 + floor(p / original)),
            which is 1 within the original context.
        short_factors: "longrope": the stretch of each pair in texts within the original context.
            Longer texts are not read: every key would have to be rotated anew, by `long_factors`.
        long_factors: "longrope": kept for `config.json`.
        long_attention_factor: "longrope": likewise, if it differs from `attention_factor`.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    rotated: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    interleaved: bool = False
    query_growth: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Layers whose MLP is one of several for each token, chosen by a router: a mixture of experts.

    Attributes:
        count: E, experts of a layer.
        chosen: Experts that a token is sent to.
        size: F, width of an expert.
        router: The function from logits to weights: "softmax"; "sigmoid"; "softmax_corrected"; or
            "sparsemixer" (two experts, each weighed by a softmax over those that are nearly as
            good). "sigmoid" and "softmax_corrected" add a bias for the choice, not to the weights.
        normed: The weights of the chosen experts are divided by their sum.
        smoothing: Added to this sum.
        scale: The weights are multiplied by it.
        bias: The router and the experts' projections have biases.
        clamp: c: the gate's projection is clipped to at most c, the other one to -c and c, and 1 is
            added to the latter; None: neither.
        groups: "sigmoid": number of equal groups of consecutive experts.
        chosen_groups: "sigmoid": number of groups, those with the best pair of experts, from which
            a token chooses.
        jitter: "sparsemixer": an expert is nearly as good if its logit is less than twice this
            share below the best one.
        scaled: The router's input is divided by its root mean square and multiplied by a learned
            vector and D^-1/2; the weight of each expert is multiplied by a learned number.
        beside: The layer also has an MLP. Both read the residual stream, each through its norm, the
            router without one; the two outputs are normed separately and added.
        shared: Width of an MLP that every token is also sent to; 0: none.
        shared_gate: Its output is multiplied by the sigmoid of a linear map of the input.
        dense: For each layer whether it has an MLP and no experts; () if none has.
    """

    count: int
    chosen: int
    size: int
    router: str = "softmax"
    normed: bool = False
    smoothing: float = 0.0
    scale: float = 1.0
    bias: bool = False
    clamp: float | None = None
    groups: int = 1
    chosen_groups: int = 1
    jitter: float = 0.0
    shared: int = 0
    shared_gate: bool = False
    scaled: bool = False
    beside: bool = False
    dense: tuple[bool, ...] = ()

    @property
    def corrected(self) -> bool:
        """Whether a bias is added for the choice, see `router`."""
        return self.router in ("sigmoid", "softmax_corrected")


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Heads of a layer of attention.

    Attributes:
        num_kv_heads: K, key-value heads.
        head_dim: h, width of a head.
        values_are_keys: Values have no projection: they are the projected keys, before their norm
            and rotation.
    """

    num_kv_heads: int
    head_dim: int
    values_are_keys: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Layers with a gated delta net instead of attention.

    Attributes:
        key_heads: K, heads of queries and keys.
        value_heads: Heads of values, an equal number for each key head.
        key_dim: Width of a head of queries and keys.
        value_dim: Width of a head of values.
        taps: W, tokens that the convolution of a channel spans, the last one its own.
        layers: For each layer whether it is one.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    layers: tuple[bool, ...]

    @property
    def channels(self) -> int:
        """C, the channels of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Layers with a short convolution between two gates instead of attention.

    Attributes:
        channels: C, numbers of a token that are convolved, each by itself.
        taps: W, tokens that the convolution spans, the last one its own.
        layers: For each layer whether it is one.
    """

    channels: int
    taps: int
    layers: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder-only language model; the defaults are Llama's.

    Attributes:
        model_type: The family, in Hugging Face's words.
        vocab_size: V, tokens the model scores; the tokenizer may know fewer.
        hidden_size: D, width of the residual stream.
        intermediate_size: F, width of the MLP; of an expert, see `experts`.
        num_layers: Number of blocks.
        num_heads: H, query heads.
        num_kv_heads: K, key-value heads; H / K queries share one.
        head_dim: Width of a head.
        max_position: Longest text the model was made for, tokens.
        norm_eps: Added to the mean square, or the variance, in norms.
        rope: Rotary positions; None: a learned vector for each of the `max_position` positions is
            added to the embeddings, unless `alibi` is set.
        first_position: Row of the first position in the table of these vectors.
        tied: The LM head is the embedding table.
        attention_bias: Query, key, value and output projections have biases.
        qkv_bias: Query, key and value projections have biases, whatever the output projection has.
        o_bias: The output projection has a bias, whatever the others have.
        mlp_bias: The MLP's projections have biases.
        head_bias: The LM head has a bias.
        activation: The MLP's: "silu", "gelu", "gelu_pytorch_tanh" (GELU by its approximation),
            "quick_gelu" (x sigmoid(1.702 x)), "relu", "relu2" (its square) or "xielu" (with two
            numbers that each MLP has learned).
        gated: The MLP has a gate: down(activation(gate(x)) * up(x)), else down(activation(up(x))).
        norm: "rms"; "layer" (mean subtracted, with bias unless `norm_bias` is false); either with
            "_offset" (1 is added to the weight); or "rms_float32" (the product with the weight is
            taken in float32).
        norm_bias: See `norm`.
        norm_weight: Norms have a weight; else they do nothing but norm.
        embedding_norm: Embeddings are normed.
        norms: Where a block norms: "pre" (the input of attention and of the MLP); "post" (their
            outputs); "both"; or "shared" (one norm, whose output both read; with `parallel`).
        parallel: Attention and MLP of a block both read the block's input.
        experts: Experts instead of MLPs; None: every layer has an MLP.
        delta: Gated delta nets instead of attention; None: no layer has one.
        conv: Short convolutions likewise.
        output_gate: Attention's output is multiplied by the sigmoid of a linear map of its input.
        qkv_clip: c: queries, keys and values are clipped to -c and c, before rotation; None not.
        qk_norm: Queries and keys are normed before rotation: "head" each head by itself, "each" the
            same with a weight for each head, "width" all heads together; None not.
        qk_norm_after: They are normed after rotation, each head by itself.
        value_norm: Values are divided by their root mean square, each head by itself.
        whole_heads: Heads of the layers that are not local; None: as in local layers.
        borrows: For each layer whether it has no keys and values of its own: it attends to those of
            the last earlier layer that has, local if it is local itself; () if none borrows.
        borrowing_size: Width of the MLPs of borrowing layers; 0: F.
        layer_inputs: P, width of a vector of each token that a layer also reads, the sum of a row
            of a table and a linear map of the embedding; 0: none.
        layer_multiplier: A layer's output is multiplied by a number of its own, which is not
            trained.
        scaled_embedding: Embeddings are multiplied by sqrt(D), rounded to the weights' dtype.
        embedding_multiplier: Embeddings are multiplied by it.
        residual_multiplier: The outputs of attention and MLP are multiplied by it.
        query_pre_attn_scalar: Attention scores are divided by its square root; None: `head_dim`.
        attention_multiplier: Attention scores are multiplied by it instead; None: not.
        logit_scale: Logits are multiplied by it.
        sinks: Each head has a logit of its own, learned, beside its scores in the softmax: the
            weights sum to less than 1.
        attention_softcap: c: attention scores become c tanh(score / c); None not.
        logit_softcap: The same for the logits.
        window: Tokens that a local layer attends to, the query's own included; 0: no local layers.
        alibi: Attention scores fall with the distance of a key, by a slope of each query head.
        local: For each layer whether it is local; () if none is.
        unrotated: For each layer whether its queries and keys are not rotated; () if all are.
        local_rope: Rotary positions of the local layers; None: `rope`.
        quantized: Matrices are int8 in memory, with a scale for each row.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig | None
    tied: bool
    first_position: int = 0
    attention_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_bias: bool = True
    norm_weight: bool = True
    embedding_norm: bool = False
    norms: str = "pre"
    parallel: bool = False
    experts: ExpertsConfig | None = None
    delta: DeltaConfig | None = None
    conv: ConvConfig | None = None
    output_gate: bool = False
    qkv_clip: float | None = None
    qk_norm: str | None = None
    qk_norm_after: bool = False
    value_norm: bool = False
    whole_heads: HeadsConfig | None = None
    borrows: tuple[bool, ...] = ()
    borrowing_size: int = 0
    layer_inputs: int = 0
    layer_multiplier: bool = False
    scaled_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    query_pre_attn_scalar: int | None = None
    attention_multiplier: float | None = None
    logit_scale: float = 1.0
    sinks: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int = 0
    alibi: bool = False
    local: tuple[bool, ...] = ()
    unrotated: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    quantized: bool = False

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        e = self.experts
        return e is not None and not (e.dense and e.dense[layer])

    def has_delta(self, layer: int) -> bool:
        """Whether a layer has a gated delta net, and no attention."""
        return self.delta is not None and self.delta.layers[layer]

    def has_conv(self, layer: int) -> bool:
        """Whether a layer has a short convolution, and no attention."""
        return self.conv is not None and self.conv.layers[layer]

    def is_local(self, layer: int) -> bool:
        """Whether a layer has the window."""
        return bool(self.local) and self.local[layer]

    def heads(self, layer: int) -> HeadsConfig:
        """The heads of a layer."""
        if self.whole_heads is not None and not self.is_local(layer):
            return self.whole_heads
        return HeadsConfig(self.num_kv_heads, self.head_dim)

    def lender(self, layer: int) -> int | None:
        """The layer whose keys and values a layer attends to; None: its own."""
        if not self.borrows or not self.borrows[layer]:
            return None
        same_kind = (i for i in range(layer) if self.is_local(i) == self.is_local(layer))
        return max((i for i in same_kind if not self.borrows[i]), default=None)

    def mlp_size(self, layer: int) -> int:
        """Width of a layer's MLP."""
        borrows = self.borrows and self.borrows[layer]
        return (borrows and self.borrowing_size) or self.intermediate_size

    def block_kind(self, layer: int) -> Hashable:
        """A key that is equal for layers whose weights and states have the same shape."""
        unequal = self.whole_heads is not None or bool(self.borrows)
        return (
            self.has_delta(layer),
            self.has_conv(layer),
            self.has_experts(layer),
            unequal and self.is_local(layer),
            bool(self.borrows) and self.borrows[layer],
        )

    def keep_layers(self, layers: Sequence[int]) -> "LMConfig":
        """The shape of a model with the given layers alone."""

        def keep(by_layer: tuple[bool, ...]) -> tuple[bool, ...]:
            return tuple(by_layer[layer] for layer in layers) if by_layer else ()

        e, d, c = self.experts, self.delta, self.conv
        return dataclasses.replace(
            self,
            num_layers=len(layers),
            local=keep(self.local),
            unrotated=keep(self.unrotated),
            borrows=keep(self.borrows),
            experts=None if e is None else dataclasses.replace(e, dense=keep(e.dense)),
            delta=None if d is None else dataclasses.replace(d, layers=keep(d.layers)),
            conv=None if c is None else dataclasses.replace(c, layers=keep(c.layers)),
        )
