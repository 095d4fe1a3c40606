"""Llama as pure functions on a parameter pytree, written with Flax Linen.

The model hands q, k and v of the new tokens of each layer to `attend` and gets the attention output
back. What `state` is (a KV cache, a database session, nothing) is none of its business.

    logits, state = forward(params, config, tokens, positions, attend, state)

The same in three pieces, for programs that hold some of the layers only:

    x = embed(params, config, tokens)
    rotary = rotation(config, positions)
    x, state = run_layers([layer_params(params, i) for i in ...], config, x, rotary, attend, state)
    logits = head(params, config, x)

Letters: B batch, T query tokens, L layers, H query heads, K kv heads, D head_dim, E model dim, F
ffn dim, V vocab.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.models import rope
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.matrices import Matrix, contract, contract_last, take_rows

Params = dict[str, Any]
Attend = Callable[[int, Array, Array, Array, Any], tuple[Array, Any]]
"""`attend(layer, q [B,T,H,D], k [B,T,K,D], v [B,T,K,D], state) -> (out [B,T,H,D], state)`; q and k
already rotated, q not yet scaled by 1/sqrt(D)."""


def forward(
    params: Params,
    config: LlamaConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    state: Any = None,
    *,
    logits_at: Int[Array, " B"] | None = None,
    rope_length: int | None = None,
) -> tuple[Array, Any]:
    """Runs the model over T new tokens of each sequence.

    Args:
      params: pytree as made by `init_params` or a checkpoint reader; a matrix may be a `Matrix`.
      config: architecture (static under jit).
      tokens: token ids.
      positions: position of each token in its sequence, from 0.
      attend: attention with a memory; see `Attend`.
      state: opaque pytree threaded through `attend`, layer by layer.
      logits_at: index in T, per sequence; only those logits are computed (the vocabulary product
        is the largest of a prefill). None: all.
      rope_length: see `rope.inverse_frequencies`; static.

    Returns:
      logits float32 [B, T, V] (or [B, V] with `logits_at`), and the state.
    """
    x, rotary = embed(params, config, tokens), rotation(config, positions, rope_length)
    blocks = [layer_params(params, i) for i in range(config.num_hidden_layers)]
    x, state = run_layers(blocks, config, x, rotary, attend, state)
    if logits_at is not None:
        x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)[:, 0]
    return head(params, config, x), state


def layer_params(params: Params, layer: int) -> Params:
    """The parameters of one layer."""
    return params[f"layers_{layer}"]


def outer_params(params: Params) -> Params:
    """The parameters that no layer has: what `embed` and `head` need."""
    return {name: tree for name, tree in params.items() if not name.startswith("layers_")}


def embed(params: Params, config: LlamaConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """What the first layer takes."""
    result: Any = Llama(config).apply({"params": params}, tokens, method="embedded")
    return result


def rotation(
    config: LlamaConfig, positions: Int[Array, "B T"], rope_length: int | None = None
) -> tuple[Array, Array]:
    """The rotary embedding of these positions, the same for every layer; see `rope.rotate`."""
    return rope.rotation(positions, *rope.inverse_frequencies(config, rope_length))


def run_layers(
    blocks: Sequence[Params],
    config: LlamaConfig,
    x: Float[Array, "B T E"],
    rotary: tuple[Array, Array],
    attend: Attend,
    state: Any = None,
) -> tuple[Float[Array, "B T E"], Any]:
    """Some consecutive layers.

    Args:
      blocks: the parameters of each; see `layer_params`.
      config: architecture.
      x: what `embed`, or the layer before them, made.
      rotary: see `rotation`.
      attend: is told the place of a layer in `blocks`.
      state: opaque pytree threaded through `attend`, layer by layer.
    """
    for i, block in enumerate(blocks):
        run = functools.partial(attend, i)
        layer = DecoderLayer(config, jnp.float32)
        result: Any = layer.apply({"params": block}, x, rotary, run, state)
        x, state = result
    return x, state


def head(
    params: Params, config: LlamaConfig, x: Float[Array, "*rows E"]
) -> Float[Array, "*rows V"]:
    """Logits, float32, of what the last layer made."""
    result: Any = Llama(config).apply({"params": params}, x, method="logits")
    return result


def causal_attend(
    layer: int, q: Array, k: Array, v: Array, state: Any
) -> tuple[Float[Array, "B T H D"], Any]:
    """Full causal attention over the T tokens given, no memory: training, and the plainest
    reference.
    """
    del layer
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], -1, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * d**-0.5
    mask = _under(jnp.tril(jnp.ones((t, t), bool)), scores)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(b, t, h, d), state


def init_params(config: LlamaConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters, for training from scratch and for tests."""
    return nn.meta.unbox(_init(config, key, jnp.dtype(dtype)))


@functools.cache
def abstract_params(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """Shape and dtype of every parameter, nothing allocated."""
    return nn.meta.unbox(_boxed(config, jnp.dtype(dtype)))


@functools.cache
def logical_axes(config: LlamaConfig) -> Params:
    """The same tree with a tuple of logical axis names at each leaf; see `alaya_jax.sharding`."""
    specs = nn.get_partition_spec(_boxed(config, jnp.dtype(jnp.float32)))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def _boxed(config: LlamaConfig, dtype: Any) -> Params:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0), dtype))


def _init(config: LlamaConfig, key: Array, dtype: Any) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    model = Llama(config, param_dtype=dtype)
    variables: Any = model.init(key, tokens, rotation(config, tokens), causal_attend)
    return variables["params"]


class Llama(nn.Module):
    """The names and shapes of all parameters. `param_dtype` matters only when they are made."""

    config: LlamaConfig
    param_dtype: Any = jnp.float32

    def setup(self):
        cfg, dtype = self.config, self.param_dtype
        self.embed = _Embed(cfg.vocab_size, cfg.hidden_size, dtype)
        self.layers = [DecoderLayer(cfg, dtype) for _ in range(cfg.num_hidden_layers)]
        self.norm = RMSNorm(cfg.rms_norm_eps, dtype)
        if not cfg.tie_word_embeddings:
            self.lm_head = _Linear((cfg.vocab_size,), ("embed", "vocab"), dtype)

    def __call__(self, tokens, rotary, attend):
        x = self.embedded(tokens)
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, rotary, functools.partial(attend, i), None)
        return self.logits(x)

    def embedded(self, tokens):
        return self.embed(tokens)

    def logits(self, x):
        x = self.norm(x)
        with jax.named_scope("logits"):
            if self.config.tie_word_embeddings:
                return self.embed.logits(x)
            return self.lm_head(x, preferred_element_type=jnp.float32)


class DecoderLayer(nn.Module):
    """One decoder layer: attention and a gated MLP, each behind a norm and a residual."""

    config: LlamaConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rotary, attend, state):
        cfg, dtype = self.config, self.param_dtype
        y = RMSNorm(cfg.rms_norm_eps, dtype, name="attention_norm")(x)
        y, state = Attention(cfg, dtype, name="attention")(y, rotary, attend, state)
        x = x + y
        y = RMSNorm(cfg.rms_norm_eps, dtype, name="mlp_norm")(x)
        return x + MLP(cfg, dtype, name="mlp")(y), state


class Attention(nn.Module):
    """Projections and rotation; the attention itself is the caller's."""

    config: LlamaConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rotary, attend, state):
        cfg, bias = self.config, self.config.attention_bias
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads

        def project(n, axis, name):
            axes = ("embed", axis, "head_dim")
            return _Linear((n, cfg.head_dim), axes, self.param_dtype, bias, name=name)(x)

        with jax.named_scope("qkv"):
            q = rope.rotate(project(heads, "heads", "q"), *rotary)
            k = rope.rotate(project(kv_heads, "kv_heads", "k"), *rotary)
            v = project(kv_heads, "kv_heads", "v")
        with jax.named_scope("attend"):
            out, state = attend(q, k, v, state)
        o_axes = ("heads", "head_dim", "embed")
        o = _Linear((cfg.hidden_size,), o_axes, self.param_dtype, bias, name="o")
        return o(out), state


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        cfg, bias = self.config, self.config.mlp_bias
        ffn = (cfg.intermediate_size,)
        gate = _Linear(ffn, ("embed", "ffn"), self.param_dtype, bias, name="gate")(x)
        up = _Linear(ffn, ("embed", "ffn"), self.param_dtype, bias, name="up")(x)
        down = _Linear((cfg.hidden_size,), ("ffn", "embed"), self.param_dtype, bias, name="down")
        return down(nn.silu(gate) * up)


class RMSNorm(nn.Module):
    """x / rms(x) * scale: statistics in float32, scale applied in the dtype of x, as HF does."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        init = _partitioned(nn.initializers.ones_init(), "norm")
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return _under(scale, y) * y.astype(x.dtype)


class _Embed(nn.Module):
    """The embedding table [V, E]: rows by token id, and logits where the head is tied to it."""

    rows: int
    width: int
    param_dtype: Any

    def setup(self):
        init = _partitioned(nn.initializers.normal(0.02), "vocab", "embed")
        shape = (self.rows, self.width)
        self.embedding = _kernel(self, "embedding", init, shape, self.param_dtype)

    def __call__(self, tokens):
        if isinstance(self.embedding, Matrix):
            return self.embedding.rows(tokens)
        return take_rows(self.embedding, tokens)

    def logits(self, x):
        """Logits float32 [..., V] of x [..., E]."""
        return contract_last(x, self.embedding)


class _Linear(nn.Module):
    """Contracts the trailing axes of x with a kernel of logical axes `axes`; optional bias."""

    features: tuple[int, ...]
    axes: tuple[str, ...]
    param_dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, preferred_element_type=None):
        n_in = len(self.axes) - len(self.features)
        in_shape = x.shape[x.ndim - n_in :]
        init = nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "normal",
            in_axis=tuple(range(n_in)),
            out_axis=tuple(range(n_in, len(self.axes))),
        )
        init = _partitioned(init, *self.axes)
        kernel = _kernel(self, "kernel", init, in_shape + self.features, self.param_dtype)
        y = contract(x, kernel, n_in, preferred_element_type)
        if self.use_bias:
            init = _partitioned(nn.initializers.zeros_init(), *self.axes[n_in:])
            y = y + _under(self.param("bias", init, self.features, self.param_dtype), y)
        return y


def _kernel(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], dtype: Any):
    """A parameter of a module, or the `Matrix` that stands in its place."""
    given = module.get_variable("params", name)
    if isinstance(given, Matrix):
        return given
    return module.param(name, init, shape, dtype)


def _under(x: Array, y: Array) -> Array:
    """x with axes of one in front, as many as y has: whatever JAX is told of rank promotion."""
    return jnp.expand_dims(x, tuple(range(y.ndim - x.ndim)))


def _partitioned(init: Callable, *axes: str) -> Callable:
    """An initializer whose result carries its logical axes."""
    return nn.with_partitioning(init, axes)
