#!/bin/sh
# shrink.sh FOLDER: remove from a virtual environment what its packages bring for their own developers. Nothing that a program
# can import is removed, but for tests.
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)

# headers, CMake files and tools for extensions in C++, and torch's own tests; torch looks for its memory manager at each start
for name in include share test; do
    rm -rf "$packages/torch/$name"
done
find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete
find "$packages" -type d -name tests -prune -exec rm -rf {} +
find "$packages" -name '*.a' -delete
# symbols that only a debugger reads
strip --strip-unneeded "$packages"/torch/lib/libtorch_cpu.so "$packages"/torch/lib/libtorch_python.so
# bytecode of what is imported in rare cases only, and compiled then
for name in networkx sympy torch/_inductor transformers/models; do
    find "$packages/$name" -type d -name __pycache__ -prune -exec rm -rf {} +
done
