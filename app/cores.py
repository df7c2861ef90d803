"""What the API process makes of the cores that there are."""

from model.cgroup import available_cores

TOKENIZERS = max(2, min(4, available_cores() // 4))
"""Threads that tokenize what is small, and as many that tokenize what is large; the library releases the interpreter lock."""
