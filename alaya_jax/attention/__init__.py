"""Attention as query processing over paged keys: select, attend, merge.

engine     runs a plan for a batch, on one device or a mesh
kernels    runs it with the operations of pallas_kernels where they apply
layer      the arguments for a whole batch: queries, and a layer's memory
rows       the arguments for one sequence: query rows, and the attention over their window
window     which positions belong to the window
retrieve   what a plan keeps of the keys outside the window
paged      attention over a range of keys, tile by tile
kept       attention over the keys that were kept
graph      attention over the keys that a search of a graph found
selection  which blocks of keys a block of queries attends to
tiles      attention over listed blocks
softmax    the softmax that all of them share: online, and merged from parts
counts     how much was read
"""

from alaya_jax.attention.softmax import Partial, merge

__all__ = ["Partial", "merge"]
