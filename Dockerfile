# The image of Anthesis, for CPUs and NVIDIA GPUs alike.
#
#   docker build -t anthesis .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" anthesis train run.toml
#
# BASE_IMAGE is any Debian or Ubuntu with Python 3.11 or newer among its packages. For GPUs it needs
# no CUDA: torch of the plain index brings CUDA and NCCL, and the driver comes from the node
# (`--gpus all`). A site that wants NVIDIA's base all the same says
#   --build-arg BASE_IMAGE=docker.io/nvidia/cuda:VERSION-base-ubuntu24.04
# and one that has no GPUs saves several GB with a torch built for CPUs:
#   --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#
# Behind a mirror or a proxy, none of which stays in the image:
#   --secret id=pipconf,src=pip.conf    settings of pip, passwords and all
#   --secret id=ca,src=ca-bundle.crt    certificates to trust, instead of the public ones
#   --build-context wheels=FOLDER       wheels to choose from, beside those of an index
#
# No compiler is in the image, since nothing compiles at run time: the engine uses no op of
# DeepSpeed that has to be built, the optimizers are torch operations (on CPUs numba's, which
# brings LLVM), and nothing goes through torch.compile or Triton, which would ask for gcc.
#
# No `# syntax=` line: it would send builders without a way out to a registry.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-20250520-slim

FROM scratch AS wheels

FROM ${BASE_IMAGE} AS base
# tini hands signals to all ranks (-g) and reaps what they leave.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv
# By its path: a base may have another Python in front of Debian's.
RUN /usr/bin/python3 -m venv /opt/venv
WORKDIR /source
ARG PIP_EXTRA_INDEX_URL
# First what hardly changes. pyproject.toml alone says the versions.
COPY pyproject.toml ./
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=bind,from=wheels,target=/run/wheels \
    /opt/venv/bin/python -c "import tomllib; \
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && /opt/venv/bin/pip install --no-cache-dir --find-links /run/wheels -r /tmp/requirements.txt
COPY . .
RUN --mount=type=secret,id=pipconf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=bind,from=wheels,target=/run/wheels \
    /opt/venv/bin/pip install --no-cache-dir --find-links /run/wheels . \
    && /opt/venv/bin/pip check

FROM base AS runtime
ARG BASE_IMAGE
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="anthesis" \
      org.opencontainers.image.description="Pretrain GPT-style language models with DeepSpeed ZeRO" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# A user that is nobody's on the node. Where files are to be one's own, `--user` names another, so
# both folders are open to all, as /tmp is.
RUN groupadd --gid 10001 anthesis \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /bin/sh anthesis \
    && install -d -m 1777 /home/anthesis /work
COPY --from=build /opt/venv /opt/venv
COPY configs /opt/anthesis/configs
# USER for users without a name, whom torch asks for one; NVIDIA_* for runtimes that give an image
# no GPU unless it asks (enroot, and with it Slurm's pyxis).
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/anthesis \
    USER=anthesis \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["tini", "-g", "--", "anthesis"]
CMD ["--help"]
