# The `hetero-fl` command for a server or a site (compose.yaml, docs/how_to/deploy.md).
#
#   docker build -t hetero_fl .
# For a much smaller image, use the package index of PyTorch's CPU wheels:
#   docker build -t hetero_fl --build-arg TORCH_INDEX=URL .
#
# All machines of a federation need the same versions of hetero_fl and torch: use one image.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/hetero_fl
RUN /opt/hetero_fl/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch torchvision
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY hetero_fl hetero_fl
COPY model_zoo model_zoo
RUN /opt/hetero_fl/bin/pip install ".[flower,tables]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/hetero_fl /opt/hetero_fl
ENV PATH=/opt/hetero_fl/bin:${PATH} PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=1000 HOME=/tmp
RUN useradd --uid 10001 --no-create-home hetero_fl && install -d -o hetero_fl /work
WORKDIR /work
USER hetero_fl
STOPSIGNAL SIGTERM
ENTRYPOINT ["hetero-fl"]
CMD ["--help"]
