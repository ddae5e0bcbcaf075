"""The one error that the data package raises for what a user can repair."""


class DataError(ValueError):
    """Data cannot be read, prepared or streamed as the settings ask.

    The message is one sentence that names the setting, its value and the remedy.
    """
