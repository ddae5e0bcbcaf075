"""Environment in which chat templates of others are rendered.

A template is a program in Jinja's language that comes with a model.  It is rendered in Jinja's
immutable sandbox: no attribute that leads into Python, nothing changed that it is given, no file,
no import.  It is given strings, lists and dictionaries alone, and the few functions that templates
written for transformers call.  ``strftime_now`` is not among them, nor is the filter ``random``:
the same data would become other text tomorrow.
"""

import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks responses for transformers: its body as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        """The nodes up to ``{% endgeneration %}``."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Variables that a loop may set; none whose name begins with an underscore."""

    def __init__(*args: Any, **given: Any):
        self, *positional = args
        attributes = dict(*positional, **given)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"sets {name!r} in a namespace")


def _dict(*pairs: Any, **named: Any) -> dict[str, Any]:
    """A dictionary; not the class, which has attributes."""
    return dict(*pairs, **named)


def _tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    allowed = {name: how[name] for name in ("indent", "separators", "sort_keys") if name in how}
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def compiled(source: str) -> jinja2.Template:
    """The template, ready to be rendered.

    Raises:
      jinja2.exceptions.TemplateError: it is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    del environment.filters["random"]
    # lipsum, cycler and joiner, which Jinja has of its own, are not for this.
    range_ = environment.globals["range"]
    environment.globals.clear()
    environment.globals.update(
        range=range_, dict=_dict, namespace=_Namespace, raise_exception=_raise_exception
    )
    return environment.from_string(source)
