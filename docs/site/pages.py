"""mkdocs hook: pages that lie at the top of the repository, and the package laid out to be read."""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "start.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files at the top of the repository, and what the site calls them."""


@event_priority(100)  # before mkdocstrings, which passes over a folder that is not there yet
def on_config(config: Any) -> None:
    """The package as an installation has it, where `models/` and its like lie inside."""
    package = ROOT / "build" / "docs" / "alaya_jax"
    shutil.rmtree(package.parent, ignore_errors=True)
    shutil.copytree(ROOT / "alaya_jax", package)
    for name in ("models", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / name, package / name)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie above docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the top of the repository, as the site has them."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        pages = {f"]({name}": f"]({to}" for name, to in PAGES.items()}
    else:
        pages = {f"](../{name}": f"]({to}" for name, to in PAGES.items()}
    for link, to in pages.items():
        markdown = markdown.replace(link, to)
    return markdown
