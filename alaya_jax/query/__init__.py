"""What may be asked of the keys (`queries`), how it is answered (`plan`), who decides (`auto`)."""

from alaya_jax.query.queries import (
    DIPR,
    NEAR,
    Custom,
    Full,
    Query,
    Tiles,
    TopK,
    Window,
)

__all__ = ["DIPR", "NEAR", "Custom", "Full", "Query", "Tiles", "TopK", "Window"]
