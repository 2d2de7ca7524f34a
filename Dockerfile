# refleet on CPU: publisher and workers run from this one image (see compose.yaml).
FROM python:3.11-slim AS build
WORKDIR /src
# the codec kernels are in C; without a compiler a slower form of them is used
RUN apt-get update -q && apt-get install -y -q --no-install-recommends gcc libc6-dev
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY common common
COPY publisher publisher
COPY worker worker
# The CPU build of torch: the default wheel for Linux brings several GB of CUDA libraries that these services don't use.
RUN pip install --no-cache-dir --prefix /install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt .

FROM python:3.11-slim
COPY --from=build /install /usr/local
RUN useradd --create-home --uid 10001 refleet \
 && mkdir /store /state /models /checkpoints && chown refleet /store /state /models
USER refleet
ENV PYTHONUNBUFFERED=1
CMD ["refleet", "--help"]
