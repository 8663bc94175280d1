# Needs Python 3.11, pip and make; everything else goes into .venv with the versions of constraints.txt.
#   make suite   the whole suite under the profile cpu (PROFILE=t4 or another one to change it)
#   make seeds   the training with three seeds; notebook 08 reads what they gave
#   make badges REPO=owner/name   stamps the repository's address into the notebooks and the README, for Colab
#   make lint    ruff and mypy
#   make test    lint, the tests, then every notebook under the profile smoke
#   make site    the executed notebooks and the docs as a site
#   make engines the tests of other people's engines, each in an environment of its own over .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= cpu
BIN := .venv/bin
# Of these each breaks the others, or wants other versions than ours.
ENGINES := openenv verifiers verl
NOTEBOOKS = $(sort $(wildcard notebooks/[0-9A]*_*.ipynb))

.PHONY: suite seeds lint test engines site lab bench notebooks badges venv clean

suite: venv
	$(BIN)/python -m searchr1_lib run --profile $(PROFILE)

seeds: venv
	$(BIN)/python -m searchr1_lib sweep experiments/seeds.yaml --profile $(PROFILE) --seeds 0 1 2

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The notebooks need one another's files: one process, in order, in a run's folder that is thrown away.
test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "notebooks or not notebooks"
	runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	SEARCHR1_PROFILE=smoke SEARCHR1_RUNS="$$runs" JUPYTER_PREFER_ENV_PATH=1 \
	$(BIN)/python -m pytest -q -x --nbmake --nbmake-timeout=300 --nbmake-kernel=python3 notebooks

engines: venv $(ENGINES:%=.engines/%/.installed)
	$(BIN)/python -m pytest -q tests/test_engines_*.py
	for engine in $(ENGINES); do .engines/$$engine/bin/python -m pytest -q -n0 tests/test_engines_$$engine.py || exit 1; done

# What an engine wants in another version lies over ours; the rest is .venv's.
.engines/%/.installed: .venv/.installed
	$(PYTHON) -m venv .engines/$*
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	> $$(.engines/$*/bin/python -c "import site; print(site.getsitepackages()[0])")/over_venv.pth
	.engines/$*/bin/python -m pip install -e '.[$*]'
	touch $@

# The executed notebooks, the docs and a page for each module, with search: .site/html/index.html.
site: venv .site/.installed
	$(BIN)/python docs/stage.py
	NO_MKDOCS_2_WARNING=1 .site/venv/bin/mkdocs build -q -f .site/mkdocs.yml

.site/.installed: Makefile
	$(PYTHON) -m venv .site/venv
	.site/venv/bin/python -m pip install mkdocs-material==9.8.2 mkdocs-jupyter==0.26.3 'mkdocstrings[python]==1.0.8' \
	mkdocstrings-python==2.0.11
	touch $@

lab: venv
	$(BIN)/jupyter lab notebooks

bench: venv
	for bench in tests/benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python "$$bench" || exit 1; done

# Executes the committed notebooks in place, as a reader will see them; what they leave goes to runs/cpu.
notebooks: venv
	@test ! -e runs/cpu || { echo "runs/cpu exists: move it away first"; exit 1; }
	SEARCHR1_PROFILE=cpu JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	--ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)

# Needs Python alone. The address in pyproject.toml is no reason to install everything again.
badges:
	@test -n "$(REPO)" || { echo "say which repository on GitHub: make badges REPO=owner/name"; exit 2; }
	@current=$$(test .venv/.installed -nt pyproject.toml && echo yes); \
	$(PYTHON) -m searchr1_lib badges $(REPO) && { test -z "$$current" || touch .venv/.installed; }

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[encoder,server,trl,skyrl,tensorboard,dev]'
	touch $@

clean:
	rm -rf .venv .engines .site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
