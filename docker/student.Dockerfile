# The trainer's image, without vllm and ray: docker build -f docker/student.Dockerfile -t stillhouse-student .
# A devel image, since flash-attn is compiled with CUDA's compiler (offload is not: torch's AdamW makes its steps).
ARG TORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${TORCH_IMAGE}

WORKDIR /stillhouse
COPY pyproject.toml README.md LICENSE ./
COPY storage ./storage
COPY teacher_dump ./teacher_dump
COPY student_train ./student_train
COPY stillhouse ./stillhouse
RUN python3 -m pip install --no-cache-dir '.[student,s3]'

# flash-attn is optional (SDPA is used without it) and takes long to compile: --build-arg FLASH=1
ARG FLASH=0
RUN if [ "$FLASH" = 1 ]; then python3 -m pip install --no-cache-dir --no-build-isolation '.[flash]'; fi

ENTRYPOINT ["torchrun"]
CMD ["--help"]
