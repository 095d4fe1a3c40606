"""How wide a page table is, and other arrays that a program is compiled for."""

TABLE_WIDTH = 512
"""Pages of the narrowest page table, wider ones are this times a power of four: a program is
compiled for each width, and what it costs follows the true length."""


def table_width(pages: int, shards: int = 1) -> int:
    """Entries of a page table for so many pages; of each device's, with so many devices."""
    return bucket(pages, TABLE_WIDTH // shards or 1, 4)


def bucket(count: int, smallest: int, factor: int) -> int:
    """The first of smallest, smallest * factor, ... that is at least `count`."""
    width = smallest
    while width < count:
        width *= factor
    return width
