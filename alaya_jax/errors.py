"""Every error a user can meet. Each message names the thing at fault and the way out."""


class AlayaError(Exception):
    """Base of all errors raised on purpose by this library."""


class ConfigError(AlayaError):
    """A model or run configuration that is not understood or contradicts itself."""


class CheckpointError(AlayaError):
    """A checkpoint that is missing, damaged or does not match its configuration."""


class TokenizerError(AlayaError):
    """A tokenizer or chat template that is missing or cannot be used."""


class RequestError(AlayaError, ValueError):
    """A request that cannot be served as asked: too long, of a wrong shape, contradictory."""


class CacheFullError(AlayaError):
    """The KV cache has no room for the tokens of a request, or for an index that it asks."""


class QueueFullError(AlayaError):
    """As many requests wait for an engine as may; some will be done soon."""


class EngineClosedError(AlayaError):
    """An engine was closed, or ended by an error, before a request of its had ended."""


class ContextError(AlayaError):
    """A stored context that is damaged, missing, or was made by another model."""


class GraphError(ContextError):
    """A context whose graph index is missing or damaged; its keys and values are not."""


class DatabaseError(AlayaError):
    """A database path that cannot be opened: unwritable, locked, or not a database."""


class DatabaseInUseError(DatabaseError):
    """A database that another process has open; it says which, and may be free soon."""


class RemoteError(AlayaError):
    """A shared store of contexts that cannot be reached, refuses, or lacks what it should have."""


class RemoteWarning(UserWarning):
    """A shared store failed, and work went on without it: what was lost, and what to do."""


class PlanError(RequestError):
    """A goal for attention that no plan reaches on this machine; it says which goals can be
    reached.
    """


class KernelError(AlayaError):
    """An operation that no implementation can run as asked; it says why for each."""
