"""The page for people: contexts, requests, a chat. One file, which loads nothing else."""

import functools
from importlib import resources

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


@functools.cache
def html() -> str:
    """The page."""
    return resources.files(__package__).joinpath("page.html").read_text("utf-8")
