PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test check results schemes

# One installation, made again when the requirements change.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt --editable .
	touch $@

# Split the bundled model, measure it through the packed cache, plot, generate. Results in build/demo.
demo: .venv/installed
	$(RUN) scripts/demo.py

# Measure what the README states and write its tables (about half an hour).
results: .venv/installed
	$(RUN) scripts/demo.py --windows 16 --prefill 1664 --output build/results
	$(RUN) scripts/benchmark_cache.py --output scripts/results/benchmark_cache.json
	$(RUN) scripts/compare_schemes.py --recommended --text stdlib:test --prefill 1792 --chunk 1 --output scripts/results/recommended.json
	cp build/results/perplexity.json build/results/perplexity.png scripts/results/
	$(RUN) scripts/readme_tables.py

# Measure every quantization scheme and write the tables of KIVI_INTEGRATION.md (about an hour; goes on where it stopped).
schemes: .venv/installed
	$(RUN) scripts/measure_distortion.py --output scripts/results/distortion.json
	$(RUN) scripts/benchmark_quantize.py --output scripts/results/benchmark_quantize.json
	$(RUN) scripts/compare_schemes.py --output build/schemes.json
	cp build/schemes.json scripts/results/schemes.json
	$(RUN) scripts/readme_tables.py

# Everything a developer checks; CI calls the same.
test: .venv/installed check
	$(RUN) -m pytest -q

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
