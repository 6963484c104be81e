"""The errors of trimtab. Each says what is wrong, where, and what to do; none is raised after something was touched."""

from __future__ import annotations


class TrimtabError(ValueError):
    """What the user can mend."""


class RecipeError(TrimtabError):
    """A recipe that cannot be run. The message lists the problems, each with its line, place, value and remedy."""


class DataError(TrimtabError):
    """Data that cannot be used. The message names file, row or line, and field."""


class NoField(DataError):
    """A row without a field that is needed."""

    name = ""
    """The field's."""


class BrokenLine(DataError):
    """A line of a file with too many or too few cells."""


class ModelError(TrimtabError):
    """A base model that cannot be loaded. The message names it and says what to check."""


class AdapterError(TrimtabError):
    """A folder that is not a whole ReFT adapter. The message says which file, and what to do."""


class RunError(TrimtabError):
    """A run that cannot start or go on. The message says what is in the way and what to do."""


class NotPossible(TrimtabError):
    """A way to adapt a model that this model or task has no place for. The message says why."""


class MemoryFull(RunError):
    """What does not fit into memory. The message says what to lower."""


class DivergedError(RunError):
    """A training run whose loss became NaN."""


class ConversionError(TrimtabError):
    """What cannot be read from, or written to, another format exactly; the message says what would be exact."""
