# make demo and make test work from a fresh clone on a machine with Python >= 3.11.
PYTHON ?= python3
FAISS ?= cpu# cpu, gpu or cuvs: the FAISS wheels exclude each other

VENV := .venv
BIN := $(VENV)/bin

export OMP_WAIT_POLICY ?= passive# torch and FAISS bring an OpenMP each: spinning threads starve the other

.PHONY: install demo test unit lint clean

install: $(VENV)/installed

# torch first and by its exact version, so that no other requirement chooses another build of it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(FAISS),demo,dev]'
	touch $@

demo: install
	$(BIN)/python benchmarks/demo.py --out runs/demo --json runs/demo/benchmark.json

test: install lint
	$(BIN)/pytest -q

unit: install
	$(BIN)/pytest -q tests/unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs dist .mypy_cache .pytest_cache .ruff_cache
