"""What can be wrong with somebody else's checkpoint."""


class CheckpointError(ValueError):
    """A foreign checkpoint cannot be read, or is not what its configuration says.

    The message is one sentence that names the file, the tensor or the setting.
    """
