# Nodes, first peers and chat sites in one image: docs/running-a-node.md#with-docker
FROM python:3.11-slim-bookworm

# torch with CUDA is the default; for an image without it, of a third of the size, give the index of torch's CPU wheels.
ARG TORCH_INDEX_URL=""

WORKDIR /opt/umbel
COPY . .
# Ranges are pyproject.toml's.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.6" \
    && pip install --no-cache-dir --editable ".[node,app,postgres]" \
    && useradd --uid 10001 --create-home umbel \
    && install -d -o umbel -g umbel /var/lib/umbel

USER 10001
ENV HF_HOME=/var/lib/umbel/hub \
    PYTHONUNBUFFERED=1
VOLUME /var/lib/umbel
CMD ["umbel-node", "--help"]
