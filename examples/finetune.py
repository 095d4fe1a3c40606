"""Fine-tunes a Llama on text files: LoRA or all weights, on any mesh, resumable bit for bit.

    python examples/finetune.py smollm2-135m contract.txt --out runs/contract
    python examples/finetune.py configs/llama-tiny.json tests/data/declaration.txt \\
        --out runs/tiny --lora-rank 0 --steps 200 --learning-rate 3e-3
    python examples/finetune.py --help

What is worth copying from here: parameters, adapters and the optimizer's state lie on the mesh by
the same `ShardingRules` as in serving; an adapter is a `Matrix` (see alaya_jax.models.matrices) in
the place of a matrix, so that the model needs no change; the batch of a step is a function of the
seed and the step's number alone, so that a checkpoint need not hold the state of a data loader.
"""

import dataclasses
import functools
import json as jsons
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import alaya_jax as aj
from alaya_jax import checkpoint
from alaya_jax.cli.terminal import help_text
from alaya_jax.errors import RequestError
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.progress import progress_bar
from alaya_jax.sharding import parse_axes, tree_shardings

Tree = dict[str, Any]
SETTINGS, LOG, STEPS, MODEL = "settings.json", "log.jsonl", "steps", "model"
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


# --- adapters ---------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen matrix W and a trained A B of low rank (LoRA, arXiv 2106.09685): W + scale * A B.

    Attributes:
      base: the matrix, an array or itself a `Matrix`.
      a: float32 [inputs..., rank].
      b: float32 [rank, outputs...]; starts at zero, so that training starts from the base.
      scale: alpha / rank.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    def contract(self, x: jax.Array, n: int, preferred_element_type: Any = None) -> jax.Array:
        if hasattr(self.base, "contract"):
            y = self.base.contract(x, n, preferred_element_type)
        else:
            y = jnp.tensordot(x, self.base, n, preferred_element_type=preferred_element_type)
        low = jnp.tensordot(x, self.a.astype(x.dtype), n)
        return y + (jnp.tensordot(low, self.b.astype(x.dtype), 1) * self.scale).astype(y.dtype)

    def contract_last(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError("the embedding takes no adapter here")

    rows = contract_last

    def merged(self) -> jax.Array:
        """The matrix that does the same by itself, in the base's type."""
        change = jnp.tensordot(self.a, self.b, 1) * self.scale
        return (self.base.astype(jnp.float32) + change).astype(self.base.dtype)


def adapter_shapes(config: LlamaConfig, rank: int, targets: tuple[str, ...]) -> tuple[Tree, Tree]:
    """Shape, and logical axes, of every adapter: two trees with {a, b} where a kernel would be."""
    shapes: Tree = {}
    axes: Tree = {}
    kernels = llama.abstract_params(config)
    for (*path, last), logical in flat(llama.logical_axes(config)).items():
        if last != "kernel" or path[-1] not in targets:
            continue
        shape = functools.reduce(lambda node, key: node[key], [*path, last], kernels).shape
        n = 2 if path[-1] == "o" else 1  # axes that are contracted
        put(shapes, path, {"a": (*shape[:n], rank), "b": (rank, *shape[n:])})
        put(axes, path, {"a": (*logical[:n], None), "b": (None, *logical[n:])})
    return shapes, axes


def init_adapters(shapes: Tree, key: jax.Array) -> Tree:
    """A drawn with variance 1 / inputs, B zero."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    tree = jax.tree.unflatten(structure, list(zip(keys, leaves, strict=True)))

    def make(pair: Tree) -> Tree:
        (key, a), (_, b) = pair["a"], pair["b"]
        return {"a": jax.random.normal(key, a) / np.sqrt(np.prod(a[:-1])), "b": jnp.zeros(b)}

    return jax.tree.map(make, tree, is_leaf=lambda x: isinstance(x, dict) and "a" in x)


def adapted(params: Tree, adapters: Tree, scale: float) -> Tree:
    """The parameters with an `Adapted` in the place of each kernel that has an adapter."""
    if "a" in adapters:
        return params | {"kernel": Adapted(params["kernel"], adapters["a"], adapters["b"], scale)}
    return params | {key: adapted(params[key], below, scale) for key, below in adapters.items()}


def merge(params: Tree) -> Tree:
    """Plain parameters that compute the same."""
    return jax.tree.map(
        lambda x: x.merged() if isinstance(x, Adapted) else x,
        params,
        is_leaf=lambda x: isinstance(x, Adapted),
    )


def flat(tree: Tree, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def put(tree: Tree, path: list[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


# --- training ---------------------------------------------------------------------------------


def mean_loss(params: Tree, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    """Cross entropy in nats of each next token, over tokens int32 [B, T + 1]."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.arange(inputs.shape[1])[None]
    logits, _ = llama.forward(params, config, inputs, positions, llama.causal_attend)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step(
    optimizer: optax.GradientTransformation, loss: Callable[[Tree, Tree, jax.Array], jax.Array]
) -> Callable:
    """One compiled update of {params, optimizer}, which is donated: updated in place."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Tree, frozen: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state["params"], frozen, tokens)
        changes, inner = optimizer.update(gradient, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], changes), "optimizer": inner}, value

    return step


def batch_of(tokens: np.ndarray, size: int, length: int, seed: int, step: int) -> np.ndarray:
    """int32 [size, length + 1]: windows of the text, by seed and number of the step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - length, size)
    return tokens[starts[:, None] + np.arange(length + 1)]


def start_state(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree | None, place: Any
) -> tuple[Tree, Any]:
    """The state before the first step, and the shardings of all of it.

    The optimizer's moments lie like the parameters they belong to; its counters on all devices.
    """
    abstract = jax.eval_shape(optimizer.init, params)
    if shardings is None:
        shardings = jax.tree.map(lambda x: place, params)
    inner = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, abstract, shardings, transform_non_params=lambda _: place
    )
    state = {"params": params, "optimizer": jax.jit(optimizer.init, out_shardings=inner)(params)}
    return state, {"params": shardings, "optimizer": inner}


# --- what is trained, on what -------------------------------------------------------------------


def open_model(
    name: str, mesh: Mesh | None, dtype: str | None, seed: int, quantize: Any = None
) -> aj.Model:
    """A checkpoint of any format, or a config.json with random weights and bytes as tokens."""
    if not name.endswith(".json"):
        return aj.load(name, mesh=mesh, dtype=dtype, quantize=quantize)
    if quantize is not None:
        raise RequestError("--quantize is for a checkpoint; random weights have nothing to keep")
    config = LlamaConfig.from_hf(jsons.loads(Path(name).read_text()))
    make = functools.partial(llama.init_params, config, dtype=dtype or config.dtype)
    shardings = None
    if mesh is not None:
        axes = llama.logical_axes(config)
        shardings = tree_shardings(mesh, aj.ShardingRules(), axes, llama.abstract_params(config))
    params = jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
    return aj.Model(config, params, fingerprint=f"random-{seed}", name=Path(name).stem, mesh=mesh)


def read_tokens(model: aj.Model, files: list[Path], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on, and the last tenth of each file, which is only used to judge."""
    train, held_out = [], []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if model.tokenizer is not None:
            tokens = model.encode(text, allow_special=False)
        else:
            tokens = model.check_tokens(np.frombuffer(text.encode(), np.uint8).astype(np.int32))
        cut = len(tokens) - len(tokens) // 10
        train.append(tokens[:cut])
        held_out.append(tokens[cut:])
    both = np.concatenate(train), np.concatenate(held_out)
    for name, tokens in zip(("to train on", "to judge by"), both, strict=True):
        if len(tokens) <= length:
            raise RequestError(
                f"{len(tokens)} tokens {name} are fewer than --length {length} and one: give more "
                "text, or a smaller --length"
            )
    return both


def check_settings(out: Path, settings: Tree, resume: bool) -> None:
    """Makes the directory of a run, or sees that the run in it is this one."""
    file = out / SETTINGS
    if file.exists():
        if not resume:
            raise RequestError(f"{out} holds a run; go on with it by --resume, or remove it")
        begun = jsons.loads(file.read_text())
        if differing := [key for key in settings if begun.get(key) != settings[key]]:
            raise RequestError(
                f"the run in {out} was begun with other settings: {', '.join(differing)} differ; "
                "a resumed run is the same as an unbroken one only with the same settings"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} is there already and holds no run; name another place")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(jsons.dumps(settings, indent=2) + "\n")


def checkpointer(out: Path) -> Any:
    """Orbax's own: a directory a step, whole or not there; the last two are kept."""
    keep = ocp.training.preservation_policies.LatestN(2)
    return ocp.training.Checkpointer(
        (out / STEPS).resolve(), preservation_policy=keep, cleanup_tmp_directories=True
    )


# --- the command ---------------------------------------------------------------------------------


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint (HF, Orbax or Meta directory, .gguf, bundled name), or a "
            "config.json for random weights with bytes as tokens.",
        ),
    ],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="UTF-8 text.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run is kept.")],
    lora_rank: Annotated[int, typer.Option(metavar="R", min=0, help="0 trains all weights.")] = 8,
    lora_alpha: Annotated[float, typer.Option(metavar="A", help="Adapters count A / R.")] = 16.0,
    lora_targets: Annotated[
        str, typer.Option(metavar="NAMES", help="Matrices that get an adapter.")
    ] = ",".join(LINEAR),
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Updates in all.")] = 100,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Windows an update.")] = 8,
    length: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens a window.")] = 128,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", help="At its highest: a tenth of the run rises to it.")
    ] = 1e-3,
    weight_decay: Annotated[float, typer.Option(metavar="W", help="AdamW's.")] = 0.0,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Of the loaded weights; bfloat16 halves a frozen base and is too coarse to train.",
            show_default="as stored; float32 with --lora-rank 0",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="int8 or int4: keep the frozen base so while adapters are trained; they join "
            "the weights as stored.",
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES", help="Devices, such as data=2,tensor=4.", show_default="one device"
        ),
    ] = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps to a checkpoint.")] = 50,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of batches and adapters.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR, or begin.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Fine-tune a model on text files, and write the result as a Hugging Face checkpoint.

    DIR gets settings.json, log.jsonl (a line a step: loss in nats a token), steps/ (Orbax, the last
    two checkpoints) and in the end model/, with adapters merged into the weights: load it with
    alaya_jax.load, `alaya ask --model DIR/model` or transformers. The last tenth of each file is
    held out: its loss is given before and after.

    A run that was killed goes on with --resume and the same settings, and ends in the same bits as
    one that was not.

    Examples:
      python examples/finetune.py smollm2-135m contract.txt --out runs/contract
      python examples/finetune.py llama.orbax a.txt b.txt --out runs/a --mesh data=2,tensor=4
      python examples/finetune.py smollm2-135m contract.txt --out runs/contract --resume
    """
    try:
        result = run(**{key: value for key, value in locals().items() if key != "json"})
    except aj.AlayaError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if json:
        typer.echo(jsons.dumps(result))
        return
    before, after = result["held_out_loss"]
    typer.echo(
        f"{result['model']}: {result['steps']} steps, {result['trained']:,} of "
        f"{result['parameters']:,} parameters, held-out loss {before:.3f} -> {after:.3f}"
    )


def run(
    model: str,
    files: list[Path],
    out: Path,
    *,
    lora_rank: int,
    lora_alpha: float,
    lora_targets: str,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    weight_decay: float,
    dtype: str | None,
    quantize: str | None,
    mesh: str | None,
    every: int,
    seed: int,
    resume: bool,
) -> Tree:
    """The whole run; arguments as the command's, result as its --json."""
    settings = {key: value for key, value in locals().items() if key not in ("resume", "out")}
    settings["files"] = [str(file) for file in files]
    targets = tuple(part.strip() for part in lora_targets.split(","))
    if unknown := set(targets) - set(LINEAR):
        raise RequestError(f"--lora-targets {sorted(unknown)}; there are {', '.join(LINEAR)}")
    devices = None if mesh is None else aj.make_mesh(**parse_axes(mesh))
    full = lora_rank == 0
    if full and quantize is not None:
        raise RequestError("--quantize needs --lora-rank of 1 or more: trained weights stay whole")
    dtype = dtype or ("float32" if full else None)
    base = open_model(model, devices, dtype, seed, quantize)
    if (out / MODEL).exists():
        raise RequestError(f"{out / MODEL} is there: this run is complete; name another --out")
    config, rules, tokenizer = base.config, base.rules, base.tokenizer
    train, held_out = read_tokens(base, files, length)
    check_settings(out, settings | {"fingerprint": base.fingerprint}, resume)

    place: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    rows, shardings = place, None
    shapes, axes = adapter_shapes(config, lora_rank, targets)
    if devices is not None:
        place = NamedSharding(devices, PartitionSpec())
        rows = rules.sharding(devices, ("batch", None), (batch, length + 1))
    if full:
        frozen, params = {}, base.params
        if devices is not None:
            shardings = jax.tree.map(lambda x: x.sharding, params)
    else:
        make = functools.partial(init_adapters, shapes)
        if devices is not None:
            abstract = jax.eval_shape(make, jax.random.key(seed))
            shardings = tree_shardings(devices, rules, axes, abstract)
        frozen, params = base.params, jax.jit(make, out_shardings=shardings)(jax.random.key(seed))

    def assembled(params: Tree, frozen: Tree) -> Tree:
        return params if full else adapted(frozen, params, lora_alpha / lora_rank)

    def loss(params: Tree, frozen: Tree, tokens: jax.Array) -> jax.Array:
        return mean_loss(assembled(params, frozen), config, tokens)

    warmup = max(1, steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay)
    )
    judge, update = jax.jit(loss), make_step(optimizer, loss)
    state, where = start_state(optimizer, params, shardings, place)
    trained = sum(x.size for x in jax.tree.leaves(params))
    judged_by = jax.device_put(batch_of(held_out, batch, length, seed, 0), rows)
    before = float(judge(params, frozen, judged_by))
    del params, base

    started = time.perf_counter()
    with checkpointer(out) as saved:
        begun = 0
        if resume and saved.latest is not None:
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
            )
            begun = saved.latest.step
            state = saved.load(begun, abstract)
        log = out / LOG
        lines = log.read_text().splitlines()[:begun] if begun else []
        log.write_text("".join(line + "\n" for line in lines))  # what was lost runs again
        total = (steps - begun) * batch * length
        with log.open("a") as file, progress_bar("training", total) as advance:
            for step in range(begun, steps):
                tokens = jax.device_put(batch_of(train, batch, length, seed, step), rows)
                state, value = update(state, frozen, tokens)
                file.write(jsons.dumps({"step": step + 1, "loss": float(value)}) + "\n")
                file.flush()
                advance(batch * length)
                if (step + 1) % every == 0 or step + 1 == steps:
                    saved.save(step + 1, state)
    after = float(judge(state["params"], frozen, judged_by))
    seconds = time.perf_counter() - started
    if quantize is not None:
        frozen = open_model(model, devices, dtype, seed).params
    merged = jax.jit(lambda *trees: merge(assembled(*trees)))(state["params"], frozen)
    shutil.rmtree(out / f".{MODEL}.unfinished", ignore_errors=True)  # of a run killed right here
    checkpoint.save(out / MODEL, config, merged, tokenizer, to="hf")
    losses = [jsons.loads(line)["loss"] for line in log.read_text().splitlines()]
    return {
        "model": str(out / MODEL),
        "steps": steps,
        "resumed_at": begun,
        "trained": trained,
        "parameters": sum(x.size for x in jax.tree.leaves(merged)),
        "losses": losses,
        "held_out_loss": [before, after],
        "seconds": seconds,
        "tokens_per_s": total / seconds if total else 0.0,
    }


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(help=help_text(finetune))(finetune)

if __name__ == "__main__":
    app()
