# The CPU image (any Docker with BuildKit):
#     docker build -t clef:latest --build-arg REVISION="$(git rev-parse HEAD)" .
# The CUDA image: the package index's own build of torch in place of the CPU one:
#     docker build -t clef:cuda --build-arg TORCH_INDEX= .
# For a harness whose folder of results belongs to root, and that gives no --user:
#     docker build -t clef:latest --build-arg RUN_AS=0:0 .
ARG BASE_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
# Where pip runs; its layers are not part of the image.
ARG BUILD_IMAGE=${BASE_IMAGE}

# --- the requirements, in a virtual environment without pip ---------------------------------
FROM ${BUILD_IMAGE} AS requirements
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements.txt docker/slim.sh /build/
RUN python3 -m venv --without-pip /opt/flare-clef \
 && python3 -m pip --python /opt/flare-clef/bin/python install --no-compile \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r /build/requirements.txt \
 && sh /build/slim.sh /opt/flare-clef

# --- the package and its weights, each a layer of its own -----------------------------------
FROM requirements AS package
COPY . /build/source
# Without build isolation: with the setuptools of requirements.txt, not with today's.
RUN python3 -m pip --python /opt/flare-clef/bin/python wheel --no-build-isolation \
      --no-deps -w /build/wheel /build/source \
 && python3 -m pip --python /opt/flare-clef/bin/python install --no-deps --no-compile \
      --root /package /build/wheel/*.whl \
 && sh /build/slim.sh /package/opt/flare-clef \
 && cd /package && weights=$(find opt -type d -name _weights) \
 && mkdir -p "/weights/${weights%/*}" && mv "$weights" "/weights/$weights" \
 && install -D -m 755 /build/source/docker/entrypoint.sh /package/opt/flare-clef/entrypoint.sh \
 && install -D -m 755 /build/source/predict.sh /package/workspace/predict.sh

# --- the image ------------------------------------------------------------------------------
FROM ${BASE_IMAGE}
# The standard library as bytecode: an unprivileged user could not keep what Python compiles.
RUN python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' \
  | xargs python3 -m compileall -qq --invalidation-mode unchecked-hash \
      -x '/(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|site-packages|dist-packages)/' \
 # Any user may write here: a new named volume takes its owner and mode from these folders.
 && mkdir -p /workspace/inputs /workspace/outputs && chmod 1777 /workspace/inputs /workspace/outputs
COPY --from=requirements /opt/flare-clef /opt/flare-clef
COPY --from=package /weights/ /
COPY --from=package /package/ /
ENV PATH=/opt/flare-clef/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
ARG RUN_AS=1000:1000
USER ${RUN_AS}
ENTRYPOINT ["/opt/flare-clef/entrypoint.sh"]
CMD ["/workspace/predict.sh"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="flare-clef" \
      org.opencontainers.image.description="13 abdominal organs from a CT scan, as labels on the scan's own grid. For research, not for diagnosis." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND LicenseRef-weights-for-research-only"
