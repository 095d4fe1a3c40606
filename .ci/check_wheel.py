"""Checks an installed alaya_jax from the outside: what it put where, and that all of it imports."""

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import PurePosixPath

files = importlib.metadata.files("alaya_jax") or []
if not files:
    sys.exit("alaya_jax is not installed from a wheel")
inside = {PurePosixPath(f).parts[0] for f in files if not str(f).startswith("..")}
stray = {top for top in inside if top != "alaya_jax" and not top.endswith(".dist-info")}
if stray:
    sys.exit(f"the wheel puts {sorted(stray)} into site-packages beside alaya_jax")

import alaya_jax  # noqa: E402

names = [m.name for m in pkgutil.walk_packages(alaya_jax.__path__, "alaya_jax.")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:  # a module may need an extra, if it says so
        if "pip install 'alaya_jax[" not in str(error):
            raise
missing = {"alaya_jax.models.llama", "alaya_jax.pallas_kernels", "alaya_jax.cli"} - set(names)
if missing:
    sys.exit(f"the wheel lacks {sorted(missing)}")

from alaya_jax import configs  # noqa: E402

if configs.load("llama-3.1-8b")["hidden_size"] != 4096:
    sys.exit("the wheel's configs are not what the repository holds")
print(f"alaya_jax {importlib.metadata.version('alaya_jax')}: {len(names)} modules import")
