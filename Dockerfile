# The image of every node of a cluster on Kubernetes (kuberay/): the package and its pinned dependencies.
#   docker build -t REGISTRY/dpt_ray:0.1.0 . && docker push REGISTRY/dpt_ray:0.1.0
# torch's own wheels bring CUDA; the node's container toolkit brings the driver. KubeRay's probes need wget.
FROM python:3.12-slim

RUN apt-get update -q && apt-get install -q -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /home/ray/dpt_ray
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY dpt_ray dpt_ray
RUN pip install --no-cache-dir -q -c constraints.txt '.[s3]'
COPY configs configs
COPY jobs jobs

USER ray
# As in cluster.yaml: glibc keeps large blocks instead of page-faulting them in again.
ENV MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
