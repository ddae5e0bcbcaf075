"""Tables of plain text."""


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
