"""Attention as query processing over paged keys: select, attend, merge.

engine    runs a plan for a batch, on one device or a mesh
kernels   the same by the operations of pallas_kernels, where they can run
retrieve  what a plan keeps of the keys outside the window
paged     attention and scores over a range of keys, tile by tile
kept      attention over the keys that were kept
partial   attention over parts of the keys, and their merge
"""

from alaya_jax.attention.softmax import Partial, merge

__all__ = ["Partial", "merge"]
