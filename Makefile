# make quickstart   set up, train and distil on the embedded data, print a table, draw the curves (output/quickstart)
# make test         set up and run the tests, in minutes
# make test-slow    the tests that `make test` leaves out;  make test-all   both
# make lint         ruff and mypy
# make gpu          measure a GPU with all that the library has for one, in 8 minutes (output/gpu/report.md)
# make detection, make test-detection    set up detectron2 too; run the tests of detection/

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow test-all lint gpu clean

quickstart: $(VENV)/.installed
	$(RUN) tools/quickstart.py

# Processes of one thread each: on small networks this is faster than one process of several threads.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -q

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

test-all:
	$(MAKE) test
	$(MAKE) test-slow

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# By the first interpreter that sees a GPU, else by one that has the packages: the environment's, then PYTHON. Only where
# there is none is the environment made, which takes a network. (Not by $(MAKE), which `make -n` would run.)
# GPU_ARGS="--device cpu --quick" rehearses it where there is no GPU.
SEES_A_GPU := import sys, torch, torchvision, yacs; sys.exit(0 if torch.cuda.is_available() else 3)

gpu:
	@best=; for python in $(RUN) $(PYTHON); do \
		$$python -c "$(SEES_A_GPU)" 2>/dev/null; \
		case $$? in 0) best=$$python; break;; 3) best=$${best:-$$python};; esac; \
	done; \
	if [ -z "$$best" ]; then make $(VENV)/.installed-dev && best=$(RUN) || exit; fi; \
	exec $$best benchmarks/gpu.py $(GPU_ARGS)

# Each mark is newer than what it was made from, so a second run installs nothing.
$(VENV)/.installed: requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# detection/ is a folder too.
.PHONY: detection test-detection

detection: $(VENV)/.installed-detection

test-detection: $(VENV)/.installed-detection
	$(PYTEST) tests/detection

# The wheel is tagged for Python 3.10 but is plain Python once its bundled binary, which nothing here needs, is gone.
$(VENV)/.installed-detection: $(VENV)/.installed-dev detection/detectron2.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev,detection]'
	site=$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && rm -rf "$$site/_detectron2" && \
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
		--python-version 3.10 --implementation cp --abi none --platform any \
		--target "$$site/_detectron2" -r detection/detectron2.txt && \
	rm -rf "$$site/_detectron2/tools" "$$site"/_detectron2/detectron2/_C.*.so && \
	echo "$$site/_detectron2" > "$$site/_detectron2.pth"
	touch $@
