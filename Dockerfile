# The environment of vaecf, for a CPU or an NVIDIA GPU:
#
#     docker build --tag vaecf .                  # GPU, CUDA 12
#     docker build --tag vaecf --target cpu .
#
# README.md says how to run the image. `make test` works in both.
FROM python:3.11.13-slim-bookworm AS base

# Open MPI is for the commands of NVIDIA's recipe. Debian keeps one version of
# each package, so a pinned version would soon not be found.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes make openmpi-bin \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --user-group vaecf \
    && mkdir /code /data /opt/venv \
    && chown vaecf:vaecf /code /data /opt/venv

# make, pip and the entry points all use the environment in VENV.
ENV VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1
USER 1000
WORKDIR /code

# Packages first: a change of the code does not install them again.
COPY --chown=vaecf:vaecf Makefile README.md LICENSE pyproject.toml ./
COPY --chown=vaecf:vaecf vaecf/__init__.py vaecf/
RUN make tools


FROM base AS cpu
COPY --chown=vaecf:vaecf . .
CMD ["bash"]


# The last target is the one that is built without --target.
FROM base AS cuda
RUN pip install --disable-pip-version-check --editable '.[cuda12]'
# With them the NVIDIA runtime shows the GPUs to the container.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --chown=vaecf:vaecf . .
CMD ["bash"]
