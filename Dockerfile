# One image for web processes and workers. docs/deploy.md explains how to build, run and check it.

# In production, pin the base by its digest: --build-arg BASE_DIGEST=sha256:...
ARG BASE_IMAGE=python:3.13-slim
ARG BASE_DIGEST=

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS build
# pip has an environment of its own, so the environment in the image does not contain it.
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/venv
COPY requirements.txt /build/
RUN /build/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: --requirement /build/requirements.txt
COPY . /app
RUN rm /app/requirements.txt && chmod -R a+rX /app && /opt/venv/bin/python -m compileall -q /app && mkdir /data

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}
ARG BASE_IMAGE
ARG BASE_DIGEST
ARG VERSION=0.1.0
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="TinyQueue" \
      org.opencontainers.image.description="A job queue on Redis: submit over HTTP, run typed Python handlers" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# A volume mounted here belongs to the user below, so handlers can write files.
COPY --from=build --chown=10001:10001 /data /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
# A container runs either a web process or a worker. The check passes if that process is healthy.
HEALTHCHECK --interval=30s --timeout=20s --start-period=30s --retries=3 \
    CMD ["python", "worker.py", "check", "--any"]
# For a worker: python worker.py
CMD ["python", "wsgi.py"]
