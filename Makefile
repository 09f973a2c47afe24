PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test check results

# One installation, made again when the requirements change.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt --editable .
	touch $@

# Split the bundled model, measure it through the packed cache, plot, generate. Results in build/demo.
demo: .venv/installed
	$(RUN) scripts/demo.py

# Measure what the README states and write its tables (about fifteen minutes).
results: .venv/installed
	$(RUN) scripts/demo.py --windows 16 --prefill 1664 --output build/results
	$(RUN) scripts/benchmark_cache.py --output scripts/results/benchmark_cache.json
	cp build/results/perplexity.json build/results/perplexity.png scripts/results/
	$(RUN) scripts/readme_tables.py

# Everything a developer checks; CI calls the same.
test: .venv/installed check
	$(RUN) -m pytest -q

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
