# Research software, not for clinical use.
#
#   docker build -t sepsis-jax .
#   docker run --rm -v "$PWD/runs:/work/runs" sepsis-jax demo --out runs/demo
#
# For NVIDIA GPUs, which need the NVIDIA container toolkit on the host:
#
#   docker build --build-arg JAX=cuda13 -t sepsis-jax:cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" sepsis-jax:cuda bench --out runs/bench
FROM python:3.12-slim

ARG JAX=cpu
RUN useradd --create-home --uid 1000 researcher && mkdir /work && chown researcher /work
COPY . /source
RUN pip install --no-cache-dir -c /source/constraints.txt /source \
    && if [ "$JAX" != cpu ]; then \
        pip install --no-cache-dir -c /source/constraints.txt "jax[$JAX]"; fi \
    && rm -r /source

USER researcher
WORKDIR /work
ENTRYPOINT ["sepsis-jax"]
CMD ["--help"]
