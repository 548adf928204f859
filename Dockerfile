# pear-megatron on NVIDIA's PyTorch image, which brings torch, nvcc, Transformer Engine and Apex:
#     docker build --tag pear-megatron .
#     enroot import --output pear-megatron.sqsh dockerd://pear-megatron     # for PEAR_CONTAINER in slurm/cluster.env
# Not built or run on a GPU yet. Dockerfile.cpu is the same without CUDA, for tests.
ARG IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${IMAGE}

# What the CUDA ops are compiled for: A100, H100, B200, and PTX for what comes after. The image's own
# TORCH_CUDA_ARCH_LIST names older GPUs as well.
ARG ARCHITECTURES="8.0;9.0;10.0+PTX"
ARG EXTRAS=hf,eval,rl

# The image pins every package that it brings; of these only torch must stay as it is.
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/torch.txt
ENV PIP_CONSTRAINT=/tmp/torch.txt \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /opt/pear-megatron
RUN pip install "setuptools>=77" "wheel>=0.45" "ninja>=1.11" "pybind11>=2.12"
COPY . .
# This checkout, not a package with a version; and what it requires.
# hadolint ignore=DL3013
RUN PEAR_MEGATRON_CUDA=1 TORCH_CUDA_ARCH_LIST="${ARCHITECTURES}" \
    pip install --no-build-isolation ".[${EXTRAS}]"

# From another folder, so that what is imported is what was installed.
WORKDIR /workspace
RUN python -c "import pear_megatron.ops.library as ops; assert ops.with_cuda, 'no CUDA ops'"
