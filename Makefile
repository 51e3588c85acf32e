PYTHON ?= python3
TOX := .venv/bin/tox

.PHONY: bench bench-certificates bench-distributed demo distributed docs text test lint type clean

demo: $(TOX)  ## private training on real data
	$(TOX) run -q -e demo -- $(ARGS)

distributed: $(TOX)  ## the same by two processes
	$(TOX) run -q -e distributed -- $(ARGS)

text: $(TOX)  ## private fine-tuning of a language model on real texts
	$(TOX) run -q -e text -- $(ARGS)

test: $(TOX)  ## all tests
	$(TOX) run -e torch213 -- $(ARGS)

bench: $(TOX)  ## time and peak memory of a step, as ratios to the step without privacy
	$(TOX) run -q -e bench -- $(ARGS)

bench-certificates: $(TOX)  ## what it costs to prove that samples have gradients of their own
	$(TOX) exec -q -e bench -- python benchmarks/certificates.py $(ARGS)

bench-distributed: $(TOX)  ## time, bytes sent and memory of a step over several processes, likewise
	$(TOX) run -q -e bench-distributed -- $(ARGS)

docs: $(TOX)  ## the documentation as a site, in site/
	$(TOX) run -e docs -- site $(ARGS)

lint type: $(TOX)
	$(TOX) run -e $@

clean:
	rm -rf .tox .venv site

$(TOX):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; say which: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check "tox>=4.20"
