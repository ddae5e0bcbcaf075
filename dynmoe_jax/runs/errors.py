"""Error of a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint, of a run or of another project, cannot be written or read.

    The message is one sentence for the user that names the folder, the file, the tensor or the
    setting.
    """
