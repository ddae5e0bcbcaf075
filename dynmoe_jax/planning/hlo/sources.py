"""Functions of the program that HLO instructions come from, by the module's own tables."""

import re

_PACKAGE = "dynmoe_jax"
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ENTRY = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")


class Sources:
    """The tables of files, functions and stack frames at the head of a module's text."""

    def __init__(self, text: str):
        tables: dict[str, dict[int, str]] = {name: {} for name in _SECTIONS}
        current: dict[int, str] = {}
        for line in text.splitlines():
            if line in tables:
                current = tables[line]
            elif line.startswith(("%", "ENTRY")):
                break
            elif found := _ENTRY.match(line):
                current[int(found[1])] = found[2]
        self._files = {n: text.strip('"') for n, text in tables["FileNames"].items()}
        self._functions = {n: text.strip('"') for n, text in tables["FunctionNames"].items()}
        self._locations = {n: _fields(text) for n, text in tables["FileLocations"].items()}
        self._frames = {n: _fields(text) for n, text in tables["StackFrames"].items()}

    def module(self, frame: int | None) -> str:
        """The innermost function of this package on a stack, e.g. ``model.attention: project``.

        Args:
          frame: of :attr:`Instruction.frame`.

        Returns:
          the module without the package's name, and the function; empty if none is on the stack.
        """
        while frame in self._frames:
            location = self._locations[self._frames[frame]["file_location_id"]]
            path = self._files[location["file_name_id"]]
            inside = path.rpartition(f"/{_PACKAGE}/")
            if inside[1]:
                module = inside[2].removesuffix(".py").replace("/", ".")
                return f"{module}: {_short(self._functions[location['function_name_id']])}"
            # Parents are numbered from 1 where 0 would be no parent.
            frame = self._frames[frame].get("parent_frame_id", 1) - 1
        return ""


def _fields(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in _FIELD.findall(text)}


def _short(function: str) -> str:
    """``Decoder.hidden.<locals>.apply_group`` as ``Decoder.hidden.apply_group``."""
    return function.replace(".<locals>", "").replace(".<lambda>", "").replace(".__call__", "")
