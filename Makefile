# Two commands do everything from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AUDIT := build/audit

# make demo DATA=DIR WEIGHTS=FILE [COMPARE=1] [PER_CLASS=40] [ROUNDS=6] \
#   [PRUNE_HEADS=0.4 | PRUNE_MACS=0.5] [CRITERION=taylor] [SETTINGS=FILE.toml] [SEED=0] \
#   [OUT=demo-output]
OUT ?= demo-output
DEMO_FLAGS = --out $(OUT) \
  $(if $(DATA),--data $(DATA)) $(if $(WEIGHTS),--weights $(WEIGHTS)) \
  $(if $(filter-out 0,$(COMPARE)),--compare) $(if $(PER_CLASS),--per-class $(PER_CLASS)) \
  $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(PRUNE_HEADS),--prune-heads $(PRUNE_HEADS)) \
  $(if $(PRUNE_MACS),--prune-macs $(PRUNE_MACS)) $(if $(CRITERION),--criterion $(CRITERION)) \
  $(if $(SETTINGS),--settings $(SETTINGS)) $(if $(SEED),--seed $(SEED))

.PHONY: demo test system audit bench-bytes bench-edge bench-hub bench-newcomer bench-pruning bench-telemetry chaos chaos-updater \
  dashboards images reference sbom fuzz idle liars scale stragglers lint format clean

demo: $(STAMP)
	$(BIN)/fieldfed-server demo $(DEMO_FLAGS)

test: $(STAMP) lint
	$(BIN)/python -P -m pytest -m "not system" -n 2

# What takes longer, or needs Debian's programs: farms that sleep, bad and rural links, versions on real
# photographs, 4 GB of replies, a broker, alerts, a browser, machines as network namespaces.
system: $(STAMP)
	@.ci/debian chromium mosquitto prometheus nginx:nginx-light /usr/lib/nginx/modules/ngx_stream_module.so:libnginx-mod-stream systemd-analyze:systemd docker-compose buildah ip:iproute2
	$(BIN)/python -P -m pytest -m system

bench-bytes bench-edge bench-hub bench-newcomer bench-pruning: $(STAMP)
	$(if $(filter bench-pruning,$@),$(BIN)/pip install -q -c constraints.txt -e ".[bench]")
	$(BIN)/python -m tests.benchmarks.$(@:bench-%=%)

# Needs Debian's mosquitto: a thousand devices for MINUTES=10.
bench-telemetry: $(STAMP)
	@.ci/debian mosquitto
	$(BIN)/python -m tests.benchmarks.telemetry

# Benchmarks print a line per finished cell, go on where they stopped, and take MINUTES=N.
chaos fuzz idle liars scale stragglers: $(STAMP)
	$(BIN)/python -m tests.benchmarks.$@

chaos-updater: $(STAMP)
	$(BIN)/python -m tests.benchmarks.updater

# Builds all three images with buildah, as root, and tries them: 30 GB of disk where torch brings CUDA.
# WHEELS=DIR: a folder that has all wheels already.
images: $(STAMP)
	@.ci/debian buildah
	FIELDFED_IMAGES=all FIELDFED_WHEELS=$(WHEELS) $(BIN)/python -P -m pytest -s tests/system/test_containers.py

# After a change to deploy/grafana/*.py or to deploy/runbooks.md.
dashboards: $(STAMP)
	$(BIN)/python -m deploy.grafana.dashboards

# After a change to a command, a setting, an exit code or a metric.
reference: $(STAMP)
	$(BIN)/python -m deploy.reference

# What is installed, as a CycloneDX bill of materials. The tool that writes it has an environment of
# its own, so that it does not list itself.
sbom: $(STAMP) $(AUDIT)/.installed
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.json $(BIN)/python
	@echo "wrote build/sbom.json"

$(AUDIT)/.installed: constraints.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt cyclonedx-bom
	@touch $@

# No key, token, machine path or registry in what git tracks; nothing installed contradicts another.
audit: $(STAMP)
	$(BIN)/pip check
	$(BIN)/python -P -m pytest tests/deploy/test_tracked.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build isolation is off so that the pinned setuptools builds, not whatever is newest today.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build demo-output bench-work
