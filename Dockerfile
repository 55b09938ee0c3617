# The API server on a CPU, for other machines, so that it needs a token; docs/serving.md has the commands.
# A test runs the steps below without Docker: tests/test_dockerfile.py.
FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
WORKDIR /srv
COPY constraints.txt ./
COPY --from=build /wheels /wheels
# torch first, from PyTorch's index of CPU builds: the registry's own build for Linux brings CUDA.
RUN python -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
RUN python -m pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/spar_unified-*.whl)[serve]"
RUN useradd --create-home --uid 1000 spar
USER spar
EXPOSE 8000
HEALTHCHECK --start-period=60s --timeout=10s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
CMD ["spar", "serve", "--host", "0.0.0.0", "--port", "8000", "--token-file", "/run/secrets/spar_token"]
