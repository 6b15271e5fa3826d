# Each target does all the set-up it needs. ARGS is passed on: make train ARGS='steps=60 name=mine'
VENV ?= .venv
export VENV PYTHON ENGINE
RUN = $(VENV)/bin/python

.PHONY: train train-agent test test-graders test-models test-agents test-unit test-integration test-oracle test-recipes test-cluster test-gpu faults soak lint compare credit-study bench bench-long simulation demo-report setup clean

train: setup
	$(RUN) -m deploy.cli train --config deploy/configs/smollm2.yaml $(ARGS)

# Episodes of several turns: a policy that cannot multiply learns to use a calculator.
train-agent: setup
	$(RUN) -m deploy.cli train --config deploy/configs/smollm2-calculator.yaml $(ARGS)

test: test-unit test-integration

# A file of tests a process; the runs on real parts have the machine for themselves.
test-unit: setup
	$(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --ignore tests/integration $(ARGS)

test-integration: setup
	$(RUN) -m pytest tests/integration $(ARGS)

# Stored answers of every form against themselves in five spellings, and against each other.
test-graders: setup
	$(RUN) -m pytest -m graders tests/graders $(ARGS)

# Some sixty architectures of tiny random models: the learner against transformers, and two updates
# and a resume on real vLLM. ARGS='-k mixtral' chooses; MEASURED=FILE keeps the numbers.
test-models: setup
	$(RUN) -m pytest -m models tests/models $(ARGS)

# Episodes on real parts: weights that change between turns and inside of one, what is killed, replay.
test-agents: setup
	$(RUN) -m pytest -m agents tests/agents $(ARGS)

# Our losses against TRL's, in an environment of its own.
test-oracle: setup
	@bash tests/bench/peer_setup.sh
	PYTHONPATH=. $${TRL_PYTHON:-.venv-trl/bin/python} -m pytest tests/learner/test_trl_oracle.py $(ARGS)

# Every recipe, ten steps on real parts; the examples, a notebook and an evaluation: a quarter of an
# hour on two cores.
test-recipes: setup
	$(RUN) -m pytest -m "long and not models" $(ARGS)

# Several Ray nodes on this machine.
test-cluster: setup
	$(RUN) -m pytest -m cluster $(ARGS)

# On a machine with CUDA devices: runs on one, two and more, and the learner's speed. The report is
# gpu-report.txt.
test-gpu: setup
	$(RUN) -m pytest -m gpu tests/gpu $(ARGS)

# Real runs, killed and broken on purpose.
faults: setup
	$(RUN) -m pytest -m faults $(ARGS)

# ARGS='--minutes 20': processes killed at random, and the account at the end.
soak: setup
	PYTHONPATH=.:tests/support $(RUN) tests/faults/soak.py $(ARGS)

# Five hours on two cores; what is finished, or on record in tests/bench/results, is not run again.
compare: setup
	PYTHONPATH=.:tests/bench $(RUN) tests/bench/compare.py guess letters updates staleness long guidance epochs recipes --keep $(ARGS)

# Which rule's credit points at the tokens that matter: exact truths, and values by branches.
credit-study: setup
	PYTHONPATH=.:tests/bench $(RUN) tests/bench/credit_study.py $(ARGS)

# Every figure of speed as a ratio to something measured beside it.
bench: setup
	@bash tests/bench/peer_setup.sh
	$(RUN) tests/bench/bench.py $(ARGS)

bench-long: setup
	@bash tests/bench/peer_setup.sh
	$(RUN) tests/bench/scaling.py
	$(RUN) tests/bench/bench.py --long $(ARGS)

# The simulation behind `plan` against runs of this machine, and what it says of 8 to 4,096 GPUs.
simulation: setup
	$(RUN) tests/bench/simulation.py
	$(RUN) tests/bench/scale_study.py

# A run of the tiny preset, two minutes, and its page in one file, demo-report.html.
demo-report: setup
	$(RUN) -m deploy.cli train --config deploy/configs/tiny.yaml name=demo resume=auto steps=40 $(ARGS)
	$(RUN) -m deploy.cli inspect runs/demo --html demo-report.html

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=tests/support:tests/bench $(VENV)/bin/mypy tests/bench/*.py

setup:
	@bash deploy/setup.sh

clean:
	rm -rf $(VENV) .venv-trl .venv-agents .venv-verifiers .mypy_cache .ruff_cache .hypothesis
