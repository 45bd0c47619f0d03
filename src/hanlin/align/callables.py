"""A function of the user's own, named in a recipe as `module:function`."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from hanlin.core.errors import HanlinError


def load_callable(name: str) -> Callable[..., Any]:
    """Import it; modules in the working directory are found too. A wrong name is a `HanlinError`."""
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise HanlinError(f"{name!r} names no function; expected module:function, such as my_rewards:score.")
    sys.path.insert(0, "")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise HanlinError(
            f"There is no module {error.name!r} ({name!r} asks for {module_name}). Put its file into the working "
            "directory, or install it."
        ) from error
    finally:
        sys.path.remove("")
    found = getattr(module, function, None)
    if not callable(found):
        raise HanlinError(f"The module {module_name} has no function {function!r} ({module.__file__}).")
    return found
