"""torch computes with one thread: its others would wait busily for the cores that the workers share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; also of programs that tests start
