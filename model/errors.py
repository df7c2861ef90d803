"""What can go wrong with a model, each said as: what was found, what was wanted, what to do.

ModelError
├── CheckpointError    files that are missing, broken or do not match the configuration
├── UnsupportedModel   a sound checkpoint of a kind that this library does not run
├── InvalidTokens      token ids that the model cannot take
└── DeviceLost         a device that computes nothing more for this process
"""


class ModelError(Exception):
    """Root of what this library raises for a checkpoint, a text or a device.

    A caller's mistake raises Python's own: ValueError for rows, windows or settings that are none, IndexError for ids,
    segments or positions outside a table. MemoryError says that a kernel got no memory.
    """


class CheckpointError(ModelError):
    """A checkpoint whose files are missing, broken or contradict its configuration."""


class UnsupportedModel(ModelError):
    """A checkpoint of a kind that this library does not run."""


class InvalidTokens(ModelError):
    """Token ids outside the vocabulary, or a text of no tokens or too many."""


class DeviceLost(ModelError):
    """A device that has failed: whatever this process asks of it from now on fails too."""
