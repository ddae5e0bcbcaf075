"""Documents as sources yield them, and the records that are broken."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text.

    Attributes:
      text: never empty, free of NULs and lone surrogates.
      domain: the kind of text it is, e.g. ``"code"``.
      origin: where it came from: ``"FILE:LINE"``, a file, or ``"DATASET:INDEX"``.
      responses: places of responses in the text of a conversation, as
        :func:`dynmoe_jax.data.chat.conversation.write_spans` writes them.
    """

    text: str
    domain: str
    origin: str
    responses: str = ""


class Broken(NamedTuple):
    """Something that should have been a document.

    Attributes:
      origin: where it is, ``"FILE:LINE"`` or a file.
      reason: what is wrong, a few words.
      records: how many records are lost by it.
    """

    origin: str
    reason: str
    records: int = 1


def checked(text: object, domain: object, origin: str, stand_in: str) -> Document | Broken | None:
    """A record's fields as a document.

    Args:
      text: the value found in the text field.
      domain: the value found in the domain field, None where there is none.
      origin: where the record is.
      stand_in: the domain of a record that has none.

    Returns:
      the document; Broken if a value has the wrong type or cannot be encoded; None if the text
      is empty or white space.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Broken(origin, f"not UTF-8 at byte {error.start}")
    if not isinstance(text, str):
        return Broken(origin, f"the text is of type {type(text).__name__}, not a string")
    if isinstance(domain, bytes):
        domain = domain.decode("utf-8", errors="replace")
    if domain is None or (isinstance(domain, str) and not domain):
        domain = stand_in
    if not isinstance(domain, str | int) or isinstance(domain, bool):
        return Broken(origin, f"the domain is of type {type(domain).__name__}, not a string")
    domain = str(domain)
    for string in (text, domain):
        if reason := unusable(string):
            return Broken(origin, reason)
    if not text or text.isspace():
        return None
    return Document(text, domain, origin)


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def unusable(string: str) -> str | None:
    """Says why no model can read a string; None if one can."""
    if "\0" in string:
        return "holds a NUL character; is it binary or UTF-16?"
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return "holds a lone surrogate, which has no UTF-8 encoding"
    return None


def field(record: dict, name: str) -> object:
    """The value of a field; ``"meta.source"`` also finds ``record["meta"]["source"]``.

    Raises:
      KeyError: there is no such field.
    """
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value
