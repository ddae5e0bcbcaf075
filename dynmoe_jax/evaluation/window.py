"""Choice of how many tokens a model reads at once, and of what is said of it."""

from dynmoe_jax import config
from dynmoe_jax.console import console, warn


def choose_window(asked: int | None, cfg: config.Config, imported: bool) -> int:
    """Chooses the tokens read at once: what a run was trained on, or an imported model's room.

    A window that is shorter than the model's, or longer, is said.

    Args:
      asked: ``--window``; None: choose.
      cfg: of the run.
      imported: whether its model was only imported: how long the texts were that it was trained on
        is then not known here, and ``config.data.seq_len`` means nothing.
    """
    room = cfg.model.max_seq_len
    trained = room if imported else min(cfg.data.seq_len, room)
    window = asked or trained
    if window > room:
        warn(
            f"--window={window} is more than the {room:,} positions that the model was made for "
            "(config.model.max_seq_len); what it says beyond them means little."
        )
    elif window < room:
        why = "as --window says"
        if not asked:
            why = "what the run was trained on (config.data.seq_len)"
        console.print(
            f"The model reads {window:,} tokens at once, {why}; it has room for {room:,}"
            + ("." if asked else " (--window)."),
            markup=False,
            soft_wrap=True,
        )
    return window
