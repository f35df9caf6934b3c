# syntax=docker/dockerfile:1
# Two stages: wheels are built and installed into a virtual environment, then only that environment is shipped.
# The steps are the README's own: `python3 -m venv`, `pip install .`, then the commands.
FROM python:3.12-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/teacher-cache
COPY pyproject.toml README.md LICENSE ./
COPY cache_tools cache_tools
COPY pipeline pipeline
COPY teacher_cache teacher_cache
COPY train train
RUN /opt/teacher-cache/bin/pip install .

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="teacher-cache" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 1000 teacher \
    && install --directory --owner=1000 --group=1000 /home/teacher/caches /home/teacher/work
COPY --from=build /opt/teacher-cache /opt/teacher-cache
ENV PATH=/opt/teacher-cache/bin:$PATH \
    TEACHER_CACHE_HOME=/home/teacher/caches \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/teacher/work
VOLUME /home/teacher/caches
CMD ["build-cache", "--help"]
