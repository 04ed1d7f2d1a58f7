# Everything here works on a fresh machine: the first target that needs it makes .venv and installs into it.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint

# The main job on the demo model and rendered data; run again, it shows the table again.
demo: .venv/program
	$(BIN)/python train_cross_attention.py @ckpt/demo/feedback.args
	$(BIN)/python test.py --ckpt ckpt/demo_feedback/loop_3.pth --dataset demo_test --report
	@echo 'Next, the control: is it more than longer training?'
	@echo '  $(BIN)/python train_cross_attention.py @ckpt/demo/feedback.args --feedback off --no_text_cross_attn --no_image_cross_attn --save_path ckpt/demo_longer'
	@echo '  $(BIN)/python test.py --ckpt ckpt/demo_feedback/loop_3.pth --control ckpt/demo_longer --dataset demo_test'

# All tests, without network, in two processes; lint first, because it takes half a minute. Threads of one process
# sleep while they wait, so as not to hold up the other.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Style, who imports whom (pyproject.toml has the rules), and types.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# What the program needs, and, for tests, what is optional too.
.venv/program: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed: .venv/program requirements-dev.txt $(wildcard requirements/*.txt)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
