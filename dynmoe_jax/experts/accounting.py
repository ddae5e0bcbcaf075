"""What expert compute costs, from the rows really used."""


def expert_flops(rows: float, width: int, hidden_width: int) -> float:
    """FLOPs of the forward pass of SwiGLU experts: gate, up and down for each row.

    Args:
      rows: (token, expert) pairs computed.
      width: D.
      hidden_width: F.
    """
    return 6.0 * rows * width * hidden_width
