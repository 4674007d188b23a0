"""Errors that a user of a model or of the converter can cause.

ModelError
├── ConfigError        a configuration this code does not support, or that contradicts itself
├── CheckpointError    files that are missing, damaged, or do not fit the configuration
├── ConversionError    a source that cannot be converted
└── QuantizationError  weights that cannot be rounded as asked
"""


class ModelError(Exception):
    """Base of everything that can be wrong with a model; its text is fit for the user's eyes."""


class ConfigError(ModelError):
    """An unsupported or contradictory configuration value."""


class CheckpointError(ModelError):
    """Missing, surplus, misshapen or unreadable tensors or files."""


class ConversionError(ModelError):
    """A source model that cannot be converted."""


class QuantizationError(ModelError):
    """Weights that cannot be rounded as asked, or are rounded already."""
