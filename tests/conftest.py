"""What holds for all tests. Read before torch is imported."""

import os

# Tiny models: a second thread costs more than it gives, and where cores are shared it makes tests crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is asked of hubs, and nothing of what a test writes ends up among a user's runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
