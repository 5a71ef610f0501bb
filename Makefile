# make demo    sets up and goes the whole way on the trained miniature
# make test    the test suite
# make lint    ruff, mypy (strict), import-linter
# make bench   what bench/README.md reports
#
# PYTHON makes the virtual environment; TORCH is installed first, so that nothing asks for another build of it
# (`make TORCH=torch test` takes whichever build your index offers).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
IN := $(VENV)/bin
OUT ?= demo-output

.PHONY: demo test lint bench setup clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml CMakeLists.txt $(shell find plugins/native -type f)
	$(PYTHON) -m venv $(VENV)
	$(IN)/python -m pip install -q --upgrade pip
	$(IN)/python -m pip install -q "$(TORCH)"
	$(IN)/python -m pip install -q -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(IN)/shuntyard demo $(OUT)

test: $(VENV)/ready
	$(IN)/python -m pytest -n 2 --dist loadfile

# mypy and import-linter read files, not import hooks: for them the package is put together out of links.
TREE := build/lint/shuntyard

lint: $(VENV)/ready
	mkdir -p $(TREE)
	for part in plugins exporter engines validate cli; do ln -sfn "$(CURDIR)/$$part" $(TREE)/$$part; done
	for part in __init__.py errors.py py.typed; do ln -sfn "$(CURDIR)/package/$$part" $(TREE)/$$part; done
	$(IN)/ruff check .
	$(IN)/ruff format --check .
	MYPYPATH=build/lint $(IN)/mypy -p shuntyard
	MYPYPATH=build/lint:examples $(IN)/mypy tests bench examples
	PYTHONPATH=build/lint $(IN)/lint-imports

bench: $(VENV)/ready
	$(IN)/python bench/moe_layer.py
	$(IN)/python bench/model.py
	$(IN)/python bench/rewrite.py

clean:
	rm -rf build $(VENV) $(OUT)
