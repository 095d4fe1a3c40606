"""Attention as query processing over paged keys: select, attend, merge.

engine     runs a plan for a batch, on one device or a mesh
kernels    the same by the operations of pallas_kernels, where they can run
layer      what a call takes: queries, a layer's memory
rows       what a retrieval takes: query rows that have their window, and look for more
window     which positions are the window
retrieve   what a plan keeps of the keys outside the window
paged      attention over a range of keys, tile by tile
kept       attention over the keys that were kept
graph      attention over the keys that a search of a graph found
selection  which blocks of keys a block of queries attends to
tiles      attention over listed blocks
softmax    the softmax of all of them, key after key or part by part
counts     what was read
"""

from alaya_jax.attention.softmax import Partial, merge

__all__ = ["Partial", "merge"]
