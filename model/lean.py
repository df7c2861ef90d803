"""torch, without what only its compilers ask for."""

import sys
from types import ModuleType

_METAS = "torch._meta_registrations"


def import_torch() -> None:
    """Import torch but for its description in Python of what operations do to shapes, which takes nearly as long as all else.

    torch.compile and torch.export ask for that; whoever imports it after this gets it.
    """
    if "torch" in sys.modules:
        return
    sys.modules[_METAS] = ModuleType(_METAS)
    try:
        import torch  # noqa: F401
    finally:
        del sys.modules[_METAS]
