"""`alaya plan`: how attention would be answered on this machine, before a model is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import note, report, show

if TYPE_CHECKING:
    from alaya_jax.budget import Budget
    from alaya_jax.models.config import LlamaConfig
    from alaya_jax.optimizer.choice import PlanChoice
    from alaya_jax.rope import Rope


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model, as --model takes it; or a known architecture, such as llama-3.1-8b.",
        ),
    ] = options.MODEL,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens of each sequence, such as 32768 or 128k.",
            show_default="as many as the model takes",
        ),
    ] = None,
    rope: options.Rope = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences served at once.")] = 1,
    recovery: options.Recovery = 0.95,
    tpot: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time for a token, at most; refused if out of reach."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device memory for keys, values and indexes, such as 8GiB.",
            show_default="what the device has beside the weights",
        ),
    ] = None,
    host_memory: options.HostMemory = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float32, bfloat16 or float16.",
            show_default="as stored; quantized: float32 on a CPU, else bfloat16",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show the plan that attention=auto takes, and what it costs.

    Time and memory are predicted; no weights are read. The first run on a machine measures it for
    the model's shape of layer, some seconds. How many keys the model needs comes from
    `alaya calibrate`, if that has been run on the model.

    Examples:
      alaya plan smollm2-135m --length 8k
      alaya plan llama-3.1-8b --length 32k
      alaya plan ~/models/Llama-3.1-8B --length 128k --tpot 0.24 --memory 8GiB
      alaya plan ~/models/Llama-3.2-1B --recovery 0.9 --batch 4 --json
    """
    tokens = None if length is None else options.length(length)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(
            f"{dtype!r}; use float32, bfloat16 or float16", param_hint="--dtype"
        )

    from alaya_jax.cli import runtime
    from alaya_jax.query.auto import Auto

    asked = Auto(tpot=tpot, recovery=recovery, device_memory=memory)
    runtime.start_jax()

    from alaya_jax.budget import Budget
    from alaya_jax.errors import PlanError
    from alaya_jax.optimizer.situation import choose_before
    from alaya_jax.runtime.reading import least
    from alaya_jax.units import nbytes

    config, kind, of_model = described(model, options.rope(rope))
    tokens = tokens or config.max_length
    choice = choose_before(asked, config, dtype or kind, tokens, batch=batch, **of_model)
    if tokens > config.max_length:
        note(f"{model} declares at most {config.max_length:,} tokens.")
    plans = [layer.plan for layer in choice.layers]
    pages = -(-tokens // choice.work.page_size)
    need = least(plans, config, choice.work.page_size, choice.work.dtype, [pages] * batch)
    budget = Budget.for_pages(choice.work, batch * pages + 1, choice.work.page_size)
    limit = Budget(host=host_memory).host_bytes
    if limit is not None and (problem := need.problem(limit)):
        raise PlanError(f"{problem} (--host-memory)")
    if json:
        host = {"least": need.nbytes, "leaves": need.leaves, "limit": limit}
        report({"model": model, **choice.to_dict(), "host": host, "budget": budget.device_bytes})
    else:
        show(choice.table())
        note(_budgets(choice, budget, memory))
        note(
            f"Read in a database's files, it keeps at least {nbytes(need.nbytes)} of them in "
            "memory (--host-memory)."
        )


def _budgets(choice: "PlanChoice", budget: "Budget", memory: str | None) -> str:
    """Which budgets hold so many tokens, and the indexes that were chosen."""
    from alaya_jax.units import bytes_of, nbytes

    needed = budget.device_bytes
    found = f"A database holds it in aj.Budget(device={needed}) ({nbytes(needed)}, --memory)"
    asked, beside = choice.memory, choice.memory - choice.work.kv_bytes
    if memory is not None and bytes_of(memory, "--memory") < needed:
        page = choice.work.kv_bytes // choice.work.held * choice.work.page_size
        found += f", or in Budget(device={asked + page}, indexes={max(beside, 1)})"
    return f"{found}."


def described(model: str, rope: "Rope | None" = None) -> "tuple[LlamaConfig, str, dict[str, Any]]":
    """A model's architecture, the dtype it would have, and what else a plan depends on."""
    import math

    import jax

    from alaya_jax import checkpoint, configs
    from alaya_jax.checkpoint import bundled
    from alaya_jax.model import served_as
    from alaya_jax.models.config import LlamaConfig, RopeConfig
    from alaya_jax.models.llama import abstract_params
    from alaya_jax.optimizer.situation import default_dtype
    from alaya_jax.rope import stretched

    if model in configs.names() and model not in bundled.MODELS and not Path(model).exists():
        fields = configs.load(model)
        config = LlamaConfig.from_hf(fields)
        leaves = jax.tree.leaves(abstract_params(config))
        rest = {"fingerprint": "", "directory": None}
        parameters = sum(math.prod(leaf.shape) for leaf in leaves)
        config, _ = stretched(config, "", rope)
        return config, fields["torch_dtype"], {"parameters": parameters, **rest}
    data = checkpoint.inspect(model)
    config = LlamaConfig(**{**data["config"], "rope": RopeConfig(**data["config"]["rope"])})
    config, fingerprint = stretched(config, data["fingerprint"], rope)
    place = Path(data["path"])
    return (
        config,
        default_dtype(data["parameters_by_stored_type"]),
        {
            "parameters": data["parameters"],
            "fingerprint": served_as(fingerprint, config),
            "directory": place if place.is_dir() else None,
        },
    )
