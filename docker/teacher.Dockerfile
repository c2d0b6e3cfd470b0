# The dump's image, on every node of a Ray cluster: docker build -f docker/teacher.Dockerfile -t stillhouse-teacher .
# vLLM's own image brings the CUDA build of torch that this vLLM was compiled against.
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION}

# KubeRay's health probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /stillhouse
COPY pyproject.toml README.md LICENSE ./
COPY storage ./storage
COPY teacher_dump ./teacher_dump
COPY student_train ./student_train
COPY stillhouse ./stillhouse
# The vllm that is there satisfies teacher-gpu, so pip leaves it and its torch alone.
RUN python3 -m pip install --no-cache-dir '.[teacher-gpu,s3]'

# Not the base image's server: Ray starts its own processes.
ENTRYPOINT []
CMD ["python3", "-m", "teacher_dump", "--help"]
