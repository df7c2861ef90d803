import subprocess
import sys

_LEAN = """
import sys
from model.lean import import_torch
import_torch()
import torch
print("torch._decomp" in sys.modules, torch.nn.functional.gelu(torch.zeros(2)).tolist())
import torch._meta_registrations
print("torch._decomp" in sys.modules, torch._meta_registrations.__file__ is not None)
before = sys.modules["torch._meta_registrations"]
import_torch()
print(sys.modules["torch._meta_registrations"] is before)
"""


def test_what_is_left_out_is_there_for_whoever_imports_it_later() -> None:
    done = subprocess.run([sys.executable, "-c", _LEAN], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False [0.0, 0.0]", "True True", "True"]
